"""What the figures share: readable, reproducible, to scale, of the requested size."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import style
from curves import shown, write_curves
from recipes import TrainConfig

DRAW = np.random.default_rng(0)


@style.styled  # it affects the number of ticks
def assert_readable(figure, titled=True):
    """The figure has a title and no small text, and nothing extends beyond its edges."""
    assert bool(figure.get_suptitle()) == titled
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 7
    inches, room = figure.get_size_inches(), 0.02
    ink = figure.get_tightbbox()
    assert -room < ink.x0 and ink.x1 < inches[0] + room
    assert -room < ink.y0 and ink.y1 < inches[1] + room


@style.styled
def sheet(maps, title="title"):
    """A figure of maps (R, C, h, w) with the color bar of attention."""
    figure = style.new_figure(4, 3, title, "caption")
    axes = figure.subplots()
    rows, columns = (list("abc")[:count] for count in maps.shape[:2])
    style.tiles(axes, maps, rows, columns, cmap=style.ATTENTION, norm=style.RELATIVE)
    style.attention_bar(figure, axes)
    return figure


def test_a_long_title_takes_several_lines():
    title = "validation image 12 of a folder: predicted automobile (99.9%), true class automobile"
    assert_readable(sheet(DRAW.random((1, 1, 2, 3)), title))


def test_a_file_has_the_requested_size_and_the_same_figure_gives_the_same_file(tmp_path):
    maps = DRAW.random((3, 2, 2, 3))
    for dpi in (50, 120):
        figure = sheet(maps)
        style.save(figure, tmp_path / "a.png", dpi)
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == pytest.approx(figure.get_size_inches() * dpi, abs=1)
    for kind in ("png", "pdf", "svg"):
        for name in ("b", "c"):
            style.save(sheet(maps), tmp_path / f"{name}.{kind}", 50)
        assert (tmp_path / f"b.{kind}").read_bytes() == (tmp_path / f"c.{kind}").read_bytes()
    # Text stays text.
    assert ">weight relative to uniform</text>" in (tmp_path / "b.svg").read_text()
    content = (tmp_path / "b.pdf").read_bytes()
    assert b"/Type /Font" in content and b"/Subtype /Type3" not in content


def test_tiles_stand_with_rows_down_and_columns_across_on_one_scale():
    maps = np.zeros((2, 3, 1, 1))
    maps[0, 2] = 2  # at the right end of the first row
    images = sheet(maps).axes[0].get_images()
    (lit,) = [image for image in images if image.get_array().max() == 2]
    x0, _, _, y0 = lit.get_extent()
    assert y0 == 0 and x0 == pytest.approx(2 * (1 + style.GAP))
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(1 / 8, 8)}


def test_an_overlay_gives_a_lone_peak_the_color_of_a_block_and_leaves_uniform_as_it_is(tmp_path):
    """Smoothing must pass through the data: matplotlib's "bicubic" dims a lone peak to 44%."""

    def pixels(values):  # 20 pixels a patch
        figure = Figure(figsize=(1, 1))
        axes = figure.add_axes((0, 0, 1, 1))
        style.show_picture(axes, np.full((100, 100), 120, np.uint8))
        style.overlay(axes, values, (0, 0, 100, 100))
        style.save(figure, tmp_path / "a.png", 100)
        return np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), int)

    lone, block = np.ones((5, 5)), np.full((5, 5), 7.0)
    lone[1, 3] = 7
    peak, expected = pixels(lone)[28:32, 68:72], pixels(block)[28:32, 68:72]
    assert abs(peak - expected).max() < 10 < abs(peak - 120).max()
    assert abs(pixels(lone)[60:, :40] - 120).max() == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deer", "deer"),
        ("$\\frac$ of a $^", "$\\frac$ of a $^"),
        ("a\nb\x1b[0m", "a\\nb\\x1b[0m"),
        ("\u732b", "\\u732b"),
        ("\udcff", "\\udcff"),
        ("n" * 300 + ".jpg", "n" * 14 + "…" + "n" * 9 + ".jpg"),
    ],
)
def test_a_name_is_drawn_as_it_is_but_for_what_the_font_lacks(name, text, tmp_path, recwarn):
    assert shown(name) == text

    @style.styled
    def drawn():
        figure = style.new_figure(3, 2, shown(name, 80))
        figure.subplots().plot([0, 1], label=shown(name))
        figure.axes[0].legend()
        return figure

    style.save(drawn(), tmp_path / "a.png", 50)
    write_curves(tmp_path / "b.png", [], TrainConfig(), name)
    assert not recwarn.list
