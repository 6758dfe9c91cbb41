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
from explorer import pack
from test_vis import write_checkpoint
from utils import status_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium")
KINDS = {
    "class": {"pooling": "class", "positions": "learned"},
    "mean": {"pooling": "mean", "positions": "sincos"},
}
RUN = """async removed => {
    const kept = all.filter(patch => !removed.includes(patch));
    const answer = await ask("forward", shown().pixels, kept, 1);
    const relevance = mapOf({ kept, ...answer }, "relevance", model.depth - 1, -1);
    const outputs = [...answer.logits, ...answer.attention, relevance.filter(value => value >= 0)];
    return outputs.map(values => [...values]);
}"""
CURVE = """async () => {
    const whole = { kept: all, ...await ask("forward", shown().pixels, all, -1) };
    return [shown().curves.relevance, [...mapOf(whole, "relevance", model.depth - 1, -1)]];
}"""
IS_CURRENT = "() => isCurrent()"
IS_DONE = "() => isCurrent() && Object.values(shown().curves).flat().length === 4 * SHARES"


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
        assert status_of(vis.main, ["explorer", *where, "--device", "cpu", *flags.split()]) == 0
        return tmp_path / "out/explorer.html"

    return written


@pytest.fixture
def visit(browser):
    """visit(path, "#layer=1") opens a page, which may request nothing and log nothing."""
    said, asked, pages = [], [], []

    def opened(path, anchor="", width=1440, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(f"{path.as_uri()}{anchor}")
        page.wait_for_function("() => result")
        pages.append(page)
        return page

    yield opened
    assert said == [] and [url for url in asked if not url.startswith(("blob:", "file:"))] == []
    assert sum(url.startswith("file:") for url in asked) == len(pages)
    for page in pages:
        page.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", ["", "--int8"])
@pytest.mark.parametrize("removed", [[], [0, 5, 6, 15], list(range(1, 16))])
def test_the_page_computes_what_torch_does(make, visit, tmp_path, kind, flag, removed):
    page = visit(make(f"--index 3,4 {flag}", **KINDS[kind]), "#image=1")
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    for weight in (*model.parameters(), *model.buffers()):
        int8 = bool(flag) and weight.ndim == 2
        weight.data = pack(weight.detach(), int8)[1]  # as the page reads them
    pixels = small.SHAPES.validation.take(torch.tensor([4])).images
    first = model.config.tokens - model.config.patches
    left = [row for row in range(model.config.tokens) if row - first not in removed]
    with model.embed.register_forward_hook(lambda *call: call[-1][:, left]):
        record = explain.record(model, checkpoint.preprocessing.normalize(pixels))
    logits = [model.head(model.norm(model.pool(z))) for z in record.tokens]
    gradients = torch.autograd.grad(record.logits[0, 1], record.attention)
    R = explain.relevance(record.attention, gradients)
    R = R[..., 0, 1:] if first else (R - torch.eye(len(left))).mean(dim=-2)
    expected = [*logits, *record.attention, explain.relative_to_uniform(R)]
    for ours, theirs in zip(page.evaluate(RUN, removed), expected, strict=True):
        ours = torch.tensor(ours, dtype=torch.float32)
        torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=1e-3)


def test_its_deletion_curves_are_those_of_the_study(make, visit, tmp_path):
    page = visit(make("--index 3"))
    page.wait_for_function(IS_DONE)
    curve, relevance = map(torch.tensor, page.evaluate(CURVE))
    order = relevance.argsort(stable=True)[None]
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    pixels = small.SHAPES.validation.take(torch.tensor([3])).images
    image = checkpoint.preprocessing.normalize(pixels)
    target = model(image).argmax(1)
    left, _ = explain.kept_probabilities(model, image, target, order, 8, None)
    torch.testing.assert_close(curve, left[0].flip(0), rtol=0, atol=1e-3)
    assert f"{explain.area(curve):.2f}" in page.inner_text("#areas")


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
        page.wait_for_function(IS_CURRENT)
        return sorted(page.evaluate("() => [...state.removed]"))

    page.mouse.move(*center(6))
    assert page.evaluate("() => state.patch") == 6 and removed() == []
    before = page.inner_text("#classes")
    page.mouse.down()
    page.mouse.move(*center(7))
    page.mouse.up()
    assert removed() == [6, 7] and page.inner_text("#classes") != before
    assert page.inner_text("#chosen") == "Row 2, column 4: removed."
    assert "2 of 16 patches removed" in page.inner_text("#prediction")
    page.mouse.click(*center(7))
    assert removed() == [6]
    page.focus("#picture")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("() => state.patch") == 11
    page.keyboard.press("Space")
    assert removed() == [6, 11]
    page.click("#restore")
    assert removed() == [] and page.inner_text("#classes") == before
    page.click("#map", position={"x": 2.5 * side, "y": 0.5 * side})
    assert removed() == [] and page.evaluate("() => state.patch") == 2


def test_the_most_and_the_least_attended_are_removed(make, visit):
    page = visit(make("--index 3"), "#view=classifier&layer=1")
    values = torch.tensor(page.evaluate("() => [...valuesAt(0, -1)]"))
    assert values.mean().item() == pytest.approx(1, abs=0.2)  # times uniform
    for button, most in (("#remove-most", True), ("#remove-least", False)):
        page.click(button)
        expected = values.argsort(descending=most)[:2].sort().values.tolist()
        assert sorted(page.evaluate("() => [...state.removed]")) == expected
        page.click("#restore")
        page.wait_for_function(IS_CURRENT)
    for _ in range(20):
        page.click("#remove-most")
    page.wait_for_function("() => isCurrent() && result.kept.length === 1")


def test_layer_head_class_and_picture_change_what_is_shown(make, visit):
    page = visit(make("--index 3,4"))
    assert page.inner_text("#layer-number") == "2 of 2"
    seen = {page.inner_text("#map-caption")}
    for change in (
        lambda: page.locator("#layer").fill("1"),
        lambda: page.select_option("#head", "1"),
        lambda: page.select_option("#view", "rollout"),
        lambda: page.locator("#images button").nth(1).click(),
        lambda: page.locator("#classes button").nth(0).press("Enter"),
        lambda: page.locator("#classes button").nth(1).press("Enter"),
    ):
        change()
        page.wait_for_function(IS_CURRENT)
        seen.add(page.inner_text("#map-caption"))
    assert len(seen) == 7 and page.evaluate("() => document.activeElement.closest('td') !== null")
    page.select_option("#view", "classifier")
    page.get_by_label("layer 2, head 1").press("Enter")
    assert page.evaluate("() => [state.layer, state.head]") == [1, 0]


def test_a_linked_view_opens_as_it_was(make, visit):
    path = make("--index 3,4,5")
    page = visit(path)
    page.locator("#images button").nth(2).click()
    page.locator("#layer").fill("1")
    page.select_option("#head", "0")
    page.click("#remove-most")
    page.click("#copy")
    page.wait_for_function(IS_DONE)
    hash_, shown = page.evaluate("() => location.hash"), page.inner_text("#stage")
    again = visit(path, hash_)
    again.wait_for_function(IS_DONE)
    assert again.inner_text("#stage") == shown and again.evaluate("() => location.hash") == hash_
    again.evaluate("() => { location.hash = '#image=1&view=rollout'; }")
    again.wait_for_function("() => state.image === 1 && state.view === 'rollout' && isCurrent()")
    broken = visit(path, "#image=99&layer=x&head=-7&view=constructor&patch=1e9&removed=4,,x,99,-1")
    seen = broken.evaluate("() => [state.image, state.layer, state.head, state.view]")
    assert seen == [0, 1, -1, "classifier"]
    assert broken.evaluate("() => [...state.removed]") == [4]


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1440, "light")])
def test_it_fits_a_phone_where_a_finger_scrolls_and_taps(make, visit, width, scheme):
    page = visit(make("--index 3"), width=width, has_touch=True, color_scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    x, y, w, h = page.locator("#picture").bounding_box().values()
    finger, session = {"x": x + w / 2, "y": y + h / 2}, page.context.new_cdp_session(page)
    for kind, up in [("Start", 0), *(("Move", 20 * n) for n in range(10)), ("End", None)]:
        points = [] if up is None else [finger | {"y": finger["y"] - up}]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    if width == 375:  # the page is longer than the screen
        page.wait_for_function("() => scrollY > 100")
    assert page.evaluate("() => state.removed.size") == 0
    page.tap("#picture")
    assert page.evaluate("() => state.removed.size") == 1


def test_names_stay_text(make, visit, tmp_path):
    names = ["<img src=x onerror=document.title='broken'>", "<!--<script>", "</script>", "w" * 300]
    dataset = dataclasses.replace(small.SHAPES, classes=(*names, *small.SHAPES.classes[4:]))
    path = make("--index 3", dataset=dataset)
    (text,) = re.findall(r'type="application/json">(.*?)</script>', path.read_text())
    assert json.loads(text)["classes"][:4] == names
    page = visit(path, width=375)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375
    Image.new("RGB", (32, 32), "red").save(tmp_path / "own.png")
    buffer = (tmp_path / "own.png").read_bytes()
    for name in names[:3]:
        assert name in page.inner_text("#classes")
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": buffer})
        page.wait_for_function("name => shown().title === name && isCurrent()", arg=name)
    assert page.title() == "Inside a Vision Transformer" and page.locator("img").count() == 0


def test_a_model_too_large_for_a_page_has_none(make, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("explorer.LARGEST_IN_PAGE", 1000)
    assert not make("--index 3").exists()
    assert "weights are too many for a page" in capsys.readouterr().out
