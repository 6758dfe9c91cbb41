"""Figures: readable, of the requested size, the same in every file. test_vis.py draws them all."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import figures

DRAW = np.random.default_rng(0)


def picture(height=16, width=24):
    return DRAW.integers(0, 256, (height, width, 3), dtype=np.uint8)


def attention_maps(layers=3, heads=2, grid=(2, 3), title="title"):
    return figures.attention_maps(
        picture(),
        DRAW.random((layers, heads, *grid)),
        layers=[f"layer {layer + 1}" for layer in range(layers)],
        heads=[str(head + 1) for head in range(heads)],
        tokens=7,
        title=title,
        caption="caption",
    )


@figures.styled  # which sets how many ticks there are
def assert_readable(figure, titled=True):
    """It has a title and no small text, and nothing leaves it."""
    assert bool(figure.get_suptitle()) == titled
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 7
    inches, room = figure.get_size_inches(), 0.02
    ink = figure.get_tightbbox()
    assert -room < ink.x0 and ink.x1 < inches[0] + room
    assert -room < ink.y0 and ink.y1 < inches[1] + room


def test_a_long_title_takes_several_lines():
    title = "validation image 12 of a folder: predicted automobile (99.9%), true class automobile"
    assert_readable(attention_maps(1, 1, title=title))


def test_a_file_has_the_requested_size_and_the_same_figure_gives_the_same_file(tmp_path):
    for dpi in (50, 120):
        figure = attention_maps()
        figures.save(figure, tmp_path / "a.png", dpi)
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == pytest.approx(figure.get_size_inches() * dpi, abs=1)
    values = DRAW.random((4, 4))
    for kind in ("png", "pdf", "svg"):
        for name in ("b", "c"):
            figure = figures.layer_similarity(values, title="title", caption="caption")
            figures.save(figure, tmp_path / f"{name}.{kind}", 50)
        assert (tmp_path / f"b.{kind}").read_bytes() == (tmp_path / f"c.{kind}").read_bytes()


def test_text_in_svg_and_pdf_stays_text(tmp_path):
    figure = figures.layer_similarity(DRAW.random((4, 4)), title="title", caption="caption")
    figures.save(figure, tmp_path / "a.svg", 50)
    assert ">linear CKA</text>" in (tmp_path / "a.svg").read_text()
    figures.save(figure, tmp_path / "a.pdf", 50)
    content = (tmp_path / "a.pdf").read_bytes()
    assert b"/Type /Font" in content and b"/Subtype /Type3" not in content


def test_attention_maps_stand_with_layers_down_and_heads_across():
    maps = np.zeros((2, 3, 1, 1))
    maps[0, 2] = 1  # layer 1, head 3: at the right of the first row
    figure = figures.attention_maps(
        picture(),
        maps,
        layers=["1", "2"],
        heads=["1", "2", "3"],
        tokens=2,
        title="",
        caption="",
    )
    lit = [image for image in figure.axes[1].get_images() if image.get_array().max() == 2]
    x0, _, _, y0 = lit[0].get_extent()
    assert len(lit) == 1 and y0 == 0 and x0 == pytest.approx(2 * (1 + figures.GAP))
    scales = {image.norm.vmax for image in figure.axes[1].get_images()}
    assert len(scales) == 1  # one scale for all


def test_signed_values_have_0_in_the_middle_of_a_diverging_map():
    figure = figures.position_similarity(DRAW.uniform(-1, 1, (2, 3, 2, 3)), title="", caption="")
    for image in figure.axes[0].get_images():
        assert image.get_cmap().name == "RdBu_r" and image.norm.vmin == -image.norm.vmax
