"""Every kind of figure: drawn without a display, labeled, of the requested size, not blank."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import figures
from recipes import RECIPES
from utils import EpochRecord

DRAW = np.random.default_rng(0)
CLASSES = [f"class {k}" for k in range(10)]


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


HISTORY = [
    EpochRecord(
        epoch=epoch,
        step=10 * epoch,
        learning_rate=0.1,
        train_loss=1 / epoch,
        train_accuracy=0.5,
        seconds=1.0,
        images_per_second=100.0,
    )
    for epoch in (1, 2)
]

# For each figure how to draw one, and the labels that its axes and color bars must bear.
FIGURES = {
    "patches": (
        lambda: figures.patches(
            picture(), [picture(8, 8)] * 6, (2, 3), class_token=True, title="title"
        ),
        [],
    ),
    "attention_maps": (attention_maps, ["layer 1", "head", "weight relative to uniform"]),
    "explanations": (
        lambda: figures.explanations(
            picture(),
            {"rollout": DRAW.random((2, 2, 3)), "relevance": DRAW.random((2, 2, 3))},
            classes=["a 90%", "b 5%"],
            title="title",
            caption="caption",
        ),
        ["weight relative to uniform"],
    ),
    "head_worth": (
        lambda: figures.head_worth(
            DRAW.normal(size=(2, 3)), DRAW.random(7), title="title", caption="caption"
        ),
        ["head", "layer", "accuracy lost (points)", "accuracy (%)"],
    ),
    "perturbation": (
        lambda: figures.perturbation(
            {name: DRAW.random((2, 8)) for name in ("rollout", "random order")},
            {"rollout": (0.1, 0.2), "random order": (0.3, 0.4)},
            title="title",
            caption="caption",
        ),
        ["patches removed, most important first", "probability of the class"],
    ),
    "filters": (
        lambda: figures.filters(
            DRAW.normal(size=(9, 3, 4, 4)), np.arange(20.0)[::-1], title="title"
        ),
        ["component", "cumulative variance (%)"],
    ),
    "position_similarity": (
        lambda: figures.position_similarity(
            DRAW.uniform(-1, 1, (2, 3, 2, 3)), title="title", caption="caption"
        ),
        ["patch row", "patch column", "cosine similarity"],
    ),
    "by_layer_and_head": (
        lambda: figures.by_layer_and_head(
            [(DRAW.random((3, 2)), "pixels", 0.5), (DRAW.random((3, 2)), "entropy", 1.0)],
            title="title",
            caption="caption",
        ),
        ["layer", "pixels", "entropy", "uniform"],
    ),
    "token_norms": (
        lambda: figures.token_norms(DRAW.random((4, 50)), DRAW.random((4, 5)), title="title"),
        ["layer", "token norm |z|"],
    ),
    "sheet": (
        lambda: figures.sheet(
            {"input": [picture()] * 3, "rollout": [DRAW.random((2, 3, 3))] * 3},
            names=CLASSES[:3],
            title="title",
            caption="caption",
            wrong=[True, False, False],
            weights=True,
        ),
        ["input", "rollout", "weight relative to uniform"],
    ),
    "layer_similarity": (
        lambda: figures.layer_similarity(DRAW.random((4, 4)), title="title", caption="caption"),
        ["layer", "linear CKA"],
    ),
    "class_scatter": (
        lambda: figures.class_scatter(
            DRAW.normal(size=(30, 2)),
            np.arange(30) % 10,
            CLASSES,
            np.array([0.5, 0.2]),
            title="title",
            caption="caption",
        ),
        ["principal component 1 (50% of the variance)"],
    ),
    "training_curves": (
        lambda: figures.training_curves(HISTORY, RECIPES["shipped"].train, title="title"),
        ["epoch", "loss (nats)", "accuracy (%)"],
    ),
    "confusion_matrix": (
        lambda: figures.confusion_matrix(DRAW.integers(0, 9, (10, 10)), CLASSES, title="title"),
        ["predicted class", "true class", "share of the true class (%)"],
    ),
    "contact_sheet": (
        lambda: figures.contact_sheet(
            [picture()] * 8, CLASSES[:8], title="title", caption="caption"
        ),
        [],
    ),
    "reliability": (
        lambda: figures.reliability(
            DRAW.random(15), DRAW.random(15), np.arange(15), error=0.1, title="title"
        ),
        ["accuracy", "images"],
    ),
}


def texts(figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def assert_nothing_leaves(figure):
    inches, room = figure.get_size_inches(), 0.02
    ink = figure.get_tightbbox()
    assert -room < ink.x0 and ink.x1 < inches[0] + room
    assert -room < ink.y0 and ink.y1 < inches[1] + room


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_labeled_and_nothing_leaves_it_or_is_blank_or_smooth(name, tmp_path):
    draw, labels = FIGURES[name]
    figure = draw()
    words = [text.get_text() for text in texts(figure)]
    assert "title" in words
    for label in labels:
        assert label in words, words
    assert min(text.get_fontsize() for text in texts(figure)) >= 7
    drawn = [axes for axes in figure.axes if axes.has_data() or axes.texts or axes.patches]
    assert drawn == figure.axes if name != "contact_sheet" else len(drawn) == 8
    images = [image for axes in figure.axes for image in axes.get_images()]
    smooth = {image.get_interpolation() for image in images} - {"nearest"}
    assert smooth == ({"bicubic"} if name == "explanations" else set())
    figures.save(figure, tmp_path / "figure.png", dpi=100)
    assert_nothing_leaves(figure)
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("L"))
    for axes in figure.axes:
        box = axes.get_window_extent()
        top, bottom = (int(len(pixels) - y) for y in (box.y1, box.y0))
        part = pixels[top:bottom, int(box.x0) : int(box.x1)]
        assert part.std() > 1 or not axes.has_data()


def test_a_long_title_takes_several_lines():
    title = "validation image 12 of a folder: predicted automobile (99.9%), true class automobile"
    assert_nothing_leaves(attention_maps(1, 1, title=title))


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
    figure = FIGURES["layer_similarity"][0]()
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
    figure = FIGURES["position_similarity"][0]()
    for image in figure.axes[0].get_images():
        assert image.get_cmap().name == "RdBu_r" and image.norm.vmin == -image.norm.vmax
