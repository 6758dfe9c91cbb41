"""The explorer in a real browser: the model in the page is the model in torch."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import explain
import small
import vis
from checkpoint import load_model
from data import Preprocessing
from test_vis import write_checkpoint
from utils import status_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium")
KINDS = {
    "class": {"pooling": "class", "positions": "learned"},
    "mean": {"pooling": "mean", "positions": "sincos"},
}
RUN = """removed => {
    state.removed = new Set(removed); ran = ""; run();
    return [...result.logits, ...result.attention].map(values => [...values]);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, and with a small /dev/shm
        yield started.chromium.launch(executable_path=CHROMIUM, args=flags)


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make("--index 3", pooling="mean") writes a model and its page and returns the page's path."""
    monkeypatch.setattr("sys.argv", ["visualization/vis.py"])

    def written(flags="", dataset=small.SHAPES, **options):
        monkeypatch.setattr("model.load_dataset", lambda *_, **__: dataset)
        checkpoint = tmp_path / "run/last.pt"
        write_checkpoint(checkpoint, dataset, **options)
        where = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        assert status_of(vis.main, ["explorer", *where, *flags.split()]) == 0
        return tmp_path / "out/explorer.html"

    return written


@pytest.fixture
def visit(browser):
    """visit(path, "#layer=1") opens a page; it may ask for nothing, nor say anything."""
    said, asked, pages = [], [], []

    def opened(path, anchor="", width=1440, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{path.as_uri()}{anchor}")
        page.evaluate("() => started")
        pages.append(page)
        return page

    yield opened
    assert said == [] and [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in asked) == len(pages)
    for page in pages:
        page.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [[], [0, 5, 6, 15], list(range(1, 16))])
def test_the_page_computes_what_torch_does(make, visit, tmp_path, kind, removed):
    page = visit(make("--index 3,4", **KINDS[kind]), "#image=1")
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.half().float()  # as the page has them
    pixels = small.SHAPES.validation.take(torch.tensor([4])).images
    first = model.config.tokens - model.config.patches
    left = [row for row in range(model.config.tokens) if row - first not in removed]
    with torch.no_grad(), model.embed.register_forward_hook(lambda *call: call[-1][:, left]):
        record = explain.record(model, checkpoint.preprocessing.normalize(pixels))
        logits = [model.head(model.norm(model.pool(z))) for z in record.tokens]
    expected = [*logits, *record.attention]
    for ours, theirs in zip(page.evaluate(RUN, removed), expected, strict=True):
        ours = torch.tensor(ours, dtype=torch.float32)
        torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["wide", "tall", "small", "clear", "rotated", "cropped"])
def test_a_file_is_seen_as_predict_sees_it(make, visit, tmp_path, kind):
    size = {"wide": (150, 90), "tall": (47, 200), "small": (20, 20)}.get(kind, (60, 50))
    noise = np.random.default_rng(0).integers(256, size=(6, 5, 3), dtype=np.uint8)
    image, exif = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), Image.Exif()
    if kind == "clear":
        image.putalpha(Image.linear_gradient("L").resize(size))
    if kind == "rotated":
        exif[0x0112] = 6
    image.save(tmp_path / "own.png", exif=exif)
    options = {"crop": 0.8, "interpolation": "bilinear"} if kind == "cropped" else {}
    expected = Preprocessing(size=(32, 32), mean=(0.4,) * 3, std=(0.2,) * 3, **options)
    dataset = dataclasses.replace(small.SHAPES, preprocessing=expected)
    page = visit(make("--index 3", dataset=dataset))
    page.set_input_files("#file", tmp_path / "own.png")
    page.wait_for_function("() => state.image === 1")
    pixels = torch.tensor(page.evaluate("() => [...pictures[1].pixels]")).view(32, 32, 3)
    differing = (pixels.permute(2, 0, 1) - expected.read(tmp_path / "own.png").int()).abs()
    assert differing.max() <= 1 + (kind == "clear")
    classes = page.inner_text("#classes")
    Image.new("RGB", (32, 32), "green").save(tmp_path / "another.png")
    page.set_input_files("#file", tmp_path / "another.png")
    page.wait_for_function("() => pictures[1].title === 'another.png'")
    page.wait_for_function("old => $('classes').innerText !== old", arg=classes)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no"})
    page.wait_for_function("() => /a.png cannot be read/.test(document.body.textContent)")


def test_mouse_and_keys_remove_patches_and_move_the_query(make, visit):
    page = visit(make("--index 3,4"), "#view=patch&patch=0")
    frame = page.locator("#picture").bounding_box()
    side = frame["width"] / 4

    def center(patch):
        return frame["x"] + (patch % 4 + 0.5) * side, frame["y"] + (patch // 4 + 0.5) * side

    def removed():
        return sorted(page.evaluate("() => [...state.removed]"))

    page.mouse.move(*center(6))
    assert page.evaluate("() => state.patch") == 6 and removed() == []
    before = page.inner_text("#classes")
    page.mouse.down()
    page.mouse.move(*center(7))
    page.mouse.up()
    assert removed() == [6, 7] and page.inner_text("#classes") != before
    assert "is removed" in page.inner_text("#map-caption")
    page.mouse.click(*center(7))
    assert removed() == [6]
    page.focus("#picture")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("() => state.patch") == 11
    page.keyboard.press("Space")
    assert removed() == [6, 11]
    page.click("#restore")
    assert removed() == [] and page.inner_text("#classes") == before
    page.uncheck("#removes")
    page.mouse.click(*center(2))
    assert removed() == [] and page.evaluate("() => state.patch") == 2


def test_the_most_and_the_least_attended_are_removed(make, visit):
    page = visit(make("--index 3"), "#view=classifier&layer=1")
    values = torch.tensor(page.evaluate("() => [...shown(0, -1)]"))
    assert values.mean().item() == pytest.approx(1, abs=0.2)  # times uniform
    for button, most in (("#remove-most", True), ("#remove-least", False)):
        page.click(button)
        expected = values.argsort(descending=most)[:2].sort().values.tolist()
        assert sorted(page.evaluate("() => [...state.removed]")) == expected
        page.click("#restore")
    for _ in range(20):
        page.click("#remove-most")
    assert page.evaluate("() => kept.length") == 1


def test_layer_head_and_picture_change_what_is_shown(make, visit):
    page = visit(make("--index 3,4"))
    assert page.inner_text("#layer-number") == "2 of 2"
    seen = {page.inner_text("#map-caption")}
    for change in (
        lambda: page.locator("#layer").fill("1"),
        lambda: page.select_option("#head", "1"),
        lambda: page.select_option("#view", "rollout"),
        lambda: page.locator("#images button").nth(1).click(),
    ):
        change()
        seen.add(page.inner_text("#map-caption"))
    assert len(seen) == 5
    page.select_option("#view", "classifier")
    page.locator("#tiles").click(position={"x": 60, "y": 100})
    assert page.evaluate("() => [state.layer, state.head]") == [1, 0]


def test_a_linked_view_opens_as_it_was(make, visit):
    path = make("--index 3,4,5")
    page = visit(path)
    page.locator("#images button").nth(2).click()
    page.locator("#layer").fill("1")
    page.select_option("#head", "0")
    page.click("#remove-most")
    hash_, shown = page.evaluate("() => location.hash"), page.inner_text("body")
    again = visit(path, hash_)
    assert again.inner_text("body") == shown and again.evaluate("() => location.hash") == hash_
    broken = visit(path, "#image=99&layer=x&head=-7&view=constructor&patch=1e9&removed=4,,x,99,-1")
    seen = broken.evaluate("() => [state.image, state.layer, state.head, state.view]")
    assert seen == [0, 1, -1, "classifier"]
    assert broken.evaluate("() => [...state.removed]") == [4]


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1440, "light")])
def test_it_fits_a_phone_and_answers_touch(make, visit, width, scheme):
    page = visit(make("--index 3"), width=width, has_touch=True, color_scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.tap("#picture")
    assert page.evaluate("() => state.removed.size") == 1


def test_names_stay_text(make, visit, tmp_path):
    name = "<img src=x onerror=document.title='broken'>"
    classes = (name, "</script>", *small.SHAPES.classes[2:])
    dataset = dataclasses.replace(small.SHAPES, classes=classes)
    path = make("--index 3", dataset=dataset)
    (text,) = re.findall(r'type="application/json">(.*?)</script>', path.read_text())
    assert json.loads(text)["classes"][:2] == [name, "</script>"]
    page = visit(path)
    assert name in page.inner_text("#classes") and page.locator("img").count() == 0
    Image.new("RGB", (32, 32), "red").save(tmp_path / "own.png")
    buffer = (tmp_path / "own.png").read_bytes()
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": buffer})
    page.wait_for_function("() => state.image === 1")
    assert page.title() == "Inside a Vision Transformer" and page.locator("img").count() == 0


def test_a_model_too_large_for_a_page_has_none(make, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("explorer.LARGEST_IN_PAGE", 1000)
    assert not make("--index 3").exists()
    assert "weights are too many for a page" in capsys.readouterr().out
