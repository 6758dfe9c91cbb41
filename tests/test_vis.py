"""visualization/vis.py: what it draws and prints, and the errors for what cannot be drawn."""

import dataclasses
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import augment
import data
import explain
import run_figures
import small
import steps
import style
import utils
import vis
from checkpoint import Checkpoint, load_model, save_checkpoint, versions
from model import Model, Options, Subject, unique
from recipes import TrainConfig
from small import ROOT, SHAPES, images_of
from test_style import assert_readable
from utils import UserError, status_of
from ViT import ViT, ViTConfig

KINDS = {name: set(of) for name, of in (vis.OF_AN_IMAGE | vis.OF_THE_MODEL).items()}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw("model --dpi 50") draws the checkpoint tmp/run/last.pt into tmp/out.

    Unless the test has made one, it holds an untrained model of the same shape as `train`'s.
    """
    monkeypatch.setattr("model.load_dataset", small.load_small)
    monkeypatch.setattr(sys, "argv", ["visualization/vis.py"])
    checkpoint = tmp_path / "run/last.pt"

    def run(flags):
        if not checkpoint.exists():
            write_checkpoint(checkpoint, SHAPES)
        paths = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        fixed = [*paths, "--dpi", "40", "--device", "cpu"]
        return status_of(vis.main, [*fixed, *flags.split()])

    return run


@pytest.fixture
def readable(monkeypatch):
    """Checks every figure that is saved."""
    save = style.save

    def save_readable(figure, path, dpi):
        save(figure, path, dpi)
        figure.set_dpi(dpi)  # that of its layout
        assert_readable(figure, titled=path.stem != "overview")

    monkeypatch.setattr(style, "save", save_readable)


def write_checkpoint(path, dataset, training=None, **options):
    """A checkpoint of an untrained model for a data set, with 50 held-out images by default."""
    torch.manual_seed(0)
    expected = dataset.preprocessing
    size = {"patch_size": 8, "width": 16, "depth": 2, "heads": 2} | options
    config = ViTConfig(image_size=expected.size, channels=expected.channels, **size)
    model = ViT(config)
    torch.nn.init.normal_(model.head.weight)
    training = {"dataset": "shapes", "validation_images": 50} | (training or {})
    checkpoint = Checkpoint(
        recipe="demo",
        model=config,
        training=TrainConfig(**training),
        preprocessing=expected,
        classes=list(dataset.classes),
        weights=dict(model.state_dict()),
        history=[],
        versions=versions(),
    )
    save_checkpoint(path, checkpoint)


def cropped(rows, columns, channels=3):
    """SHAPES, with only a part of each image."""
    parts = (
        data.Split(images_of(split)[:, :channels, rows, columns], split.labels)
        for split in SHAPES.splits().values()
    )
    size = (rows.stop - rows.start, columns.stop - columns.start)
    expected = data.Preprocessing(size=size, mean=(0.3,) * channels, std=(0.2,) * channels)
    return data.Dataset("shapes", SHAPES.classes, expected, *parts)


@torch.no_grad()
def recorded(model, checkpoint, images):
    return explain.record(model, checkpoint.preprocessing.normalize(images))


def manifest(tmp_path) -> dict:
    return json.loads((tmp_path / "out/manifest.json").read_text())


def load(tmp_path, name) -> dict:
    with np.load(tmp_path / f"out/{name}.npz") as arrays:
        return dict(arrays)


def model_of(tmp_path, **options):
    return Model(tmp_path / "run/last.pt", torch.device("cpu"), Options(**options))


def figures_of(subject, *groups) -> set[str]:
    """The names of all figures in these groups, with the subject in those of one image."""
    of = {group: f"{group}/{subject}" if group in vis.OF_AN_IMAGE else group for group in groups}
    return {f"{of[group]}/{name}" for group in groups for name in KINDS[group]}


def only(monkeypatch, group, name):
    """Draws only one figure of a group."""
    table = vis.OF_AN_IMAGE if group in vis.OF_AN_IMAGE else vis.OF_THE_MODEL
    monkeypatch.setitem(table, group, {name: table[group][name]})


@pytest.mark.parametrize("pooling", ["class --positions learned", "mean"])
def test_all_draws_every_figure(train, draw, readable, tmp_path, pooling, capsys):
    assert train(f"--name run --epochs 1 --precision fp32 --pooling {pooling}") == 0
    assert draw("--index 3 --save-data") == 0
    names = figures_of("validation-3", "image", "steps", "model", "data", "run")
    written = manifest(tmp_path)
    assert written["figures"].keys() == names | {"explorer"} and written["not_applicable"] == {}
    for name in names:
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert len(image.convert("L").getcolors()) > 5, name
        assert (tmp_path / f"out/{name}.npz").exists()
    path = tmp_path / "run/last.pt"
    assert written["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written["arguments"]["index"] == [3] and written["arguments"]["save_data"] is True
    assert written["arguments"]["data_dir"] == "data" and written["checkpoint"] == str(path)
    assert f"{len(names) + 1} figures in {tmp_path / 'out'}" in capsys.readouterr().out

    model, checkpoint = load_model(path)
    images, labels = images_of(SHAPES.validation), SHAPES.validation.labels
    logits, attention, _ = recorded(model, checkpoint, images)
    for name, patch in (("attention", None), ("attention-of-patch", (2, 2))):
        saved = load(tmp_path, f"image/validation-3/{name}")["attention"]
        expected = [explain.map_of(A[3], model.config, patch) for A in attention]
        np.testing.assert_allclose(saved, torch.stack(expected), atol=1e-6)
    order = logits[3].argsort(descending=True)[:2].tolist()
    image = checkpoint.preprocessing.normalize(images[[3, 3]])
    expected = explain.explanations(model, image, torch.tensor(order))
    saved = load(tmp_path, "image/validation-3/explanations")
    assert list(saved) == ["attention", "rollout", "relevance", "LeGrad"]
    for values, wanted in zip(saved.values(), expected.values(), strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-5)
    counts = load(tmp_path, "run/confusion")["counts"]
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert counts.trace() / counts.sum() == pytest.approx(accuracy)
    assert written["figures"]["run/confusion"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy == pytest.approx(checkpoint.history[-1].validation_accuracy, abs=1e-9)
    saved = load(tmp_path, "data/attention-distance")
    assert saved["distance"].shape == saved["entropy"].shape == (2, 2)
    stated = written["figures"]["data/attention-distance"]["mean px"]
    assert stated == pytest.approx(saved["distance"].mean())


def test_the_probe_does_not_depend_on_its_batches_but_on_the_seed(draw, tmp_path, monkeypatch):
    assert draw("model") == 0  # writes the checkpoint
    monkeypatch.setattr("model.PROBE_IMAGES", 20)
    whole = model_of(tmp_path).probe
    monkeypatch.setattr("model.PROBE_BATCH", 7)
    torch.testing.assert_close(model_of(tmp_path).probe, whole)
    assert not torch.equal(model_of(tmp_path, seed=1).probe.labels, whole.labels)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("--layer 2", lambda maps: maps[1:]),
        ("--head 1", lambda maps: maps[:, :1]),
        ("--layer 1 --head max", lambda maps: maps[:1].max(axis=1, keepdims=True)),
    ],
)
def test_layers_and_heads_can_be_chosen(draw, tmp_path, monkeypatch, flags, chosen):
    only(monkeypatch, "image", "attention-of-patch")
    maps = []
    for each in ("", flags):
        assert draw(f"image --index 0 --save-data --query 2,4 {each}") == 0
        maps.append(load(tmp_path, "image/validation-0/attention-of-patch")["attention"])
    assert maps[0].shape == (2, 2, 4, 4)
    np.testing.assert_array_equal(maps[1], chosen(maps[0]))


def test_augmentation_has_a_row_for_each_operation_of_the_recipe(draw, tmp_path, monkeypatch):
    only(monkeypatch, "data", "augmentation")
    used = {"crop_padding": 2, "cutmix": 1.0, "mixup": 0.8}
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, used)
    assert draw("data --save-data --seed 3") == 0
    saved = {k: torch.from_numpy(v) for k, v in load(tmp_path, "data/augmentation").items()}
    operations = ["random_flip", "random_crop", "Mixup", "CutMix"]
    assert list(saved) == ["original", *operations, "whole_recipe"]
    images = saved["original"]
    flipped = augment.flip(images, torch.rand(len(images), generator=utils.generator_for(3)) < 0.5)
    assert torch.equal(saved["random_flip"], flipped) and not torch.equal(flipped, images)
    assert torch.equal(saved["random_crop"], augment.random_crop(images, 2, utils.generator_for(3)))
    augmentation = augment.Augmentation(TrainConfig(**used), ViTConfig(), 8, torch.device("cpu"))
    expected = augmentation(images, torch.arange(8), torch.arange(8), 0, 3).images
    assert torch.equal(saved["whole_recipe"], expected)

    write_checkpoint(tmp_path / "run/last.pt", SHAPES, {"flip": "off", "crop_padding": 0})
    assert draw("data") == 0
    reason = manifest(tmp_path)["not_applicable"]["data/augmentation"]
    assert reason == "the recipe uses no augmentation"


@pytest.mark.parametrize("target", ["pred", "label", "star"])
def test_the_target_comes_first_and_then_the_most_probable_other_class(draw, tmp_path, target):
    assert draw(f"image --index 0 --query cls --target {target}") == 0
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    images, labels = SHAPES.validation.take(torch.arange(1))
    logits = recorded(model, checkpoint, images).logits
    order = [checkpoint.classes[k] for k in logits[0].argsort(descending=True)]
    label = checkpoint.classes[labels[0]]
    first = {"pred": order[0], "label": label, "star": "star"}[target]
    second = next(name for name in order if name != first)
    entries = manifest(tmp_path)["figures"]
    assert entries["image/validation-0/explanations"]["targets"] == [first, second]
    drawn = figures_of("validation-0", "image")
    assert drawn - entries.keys() == {"image/validation-0/attention-of-patch"}


def test_two_patches_in_all_have_no_three_principal_components(draw, tmp_path, monkeypatch):
    only(monkeypatch, "data", "token-pca")
    monkeypatch.setattr("model.PROBE_IMAGES", 2)
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, patch_size=32)
    assert draw("data") == 0
    assert "data/token-pca" in manifest(tmp_path)["not_applicable"]


def test_without_held_out_images_the_test_images_are_shown(draw, tmp_path, monkeypatch, capsys):
    only(monkeypatch, "run", "confusion")
    assert draw("run") == 0
    assert manifest(tmp_path)["split"] == "validation"
    assert draw("run --split test --save-data") == 0
    assert load(tmp_path, "run/confusion")["counts"].sum() == 60
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, {"validation_images": 0})
    assert draw("run") == 0
    assert manifest(tmp_path)["split"] == "test"
    neither = dataclasses.replace(SHAPES, validation=None, test=None)
    monkeypatch.setattr("model.load_dataset", lambda *_, **__: neither)
    capsys.readouterr()
    assert draw("run") == 2
    assert capsys.readouterr().err == "vis.py: shapes has no validation images\n"


def test_a_perfect_model_has_no_mistakes(draw, tmp_path, monkeypatch, capsys):
    one_hot = torch.nn.functional.one_hot
    monkeypatch.setattr("model.predict", lambda _, split, __: 9.0 * one_hot(split.labels, 10))
    assert draw("run") == 0
    assert "run/mistakes" in manifest(tmp_path)["not_applicable"]
    assert "not applicable: run/mistakes: the model makes no mistakes" in capsys.readouterr().out
    assert manifest(tmp_path)["figures"]["run/confusion"]["accuracy"] == 1


def test_without_the_data_set_what_needs_none_is_drawn(draw, tmp_path, monkeypatch, capsys):
    def no_data(*_, **__):
        raise UserError("no CIFAR-10 in data")

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    monkeypatch.setattr("model.load_dataset", lambda *_, **__: pytest.fail("it was loaded"))
    assert draw("model") == draw(f"image --image {tmp_path / 'red.png'} --query cls") == 0
    monkeypatch.setattr("model.load_dataset", no_data)
    assert draw(f"--image {tmp_path / 'red.png'}") == 0
    written = manifest(tmp_path)
    drawn = figures_of("red.png", "image", "steps", "model")
    assert written["figures"].keys() == drawn | {"explorer"}
    assert set(written["not_applicable"].values()) == {"no CIFAR-10 in data"}
    assert draw("") == 0
    assert {"image", "steps", "explorer"} <= manifest(tmp_path)["not_applicable"].keys()
    capsys.readouterr()
    for flags in ("data", "image", "steps", "all --index 0"):
        assert draw(flags) == 2
        assert capsys.readouterr().err == "vis.py: no CIFAR-10 in data\n"


@pytest.mark.parametrize("removal", ["drop", "black"])
def test_faithfulness_has_a_table_of_all_maps(draw, readable, tmp_path, removal, capsys):
    assert draw(f"faithfulness --images 6 --save-data --removal {removal}") == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = {line.split(" | ")[0].removeprefix("| ") for line in table[1:]}
    assert len(names) == 6 and {"relevance", "gradient x input", "random order"} < names
    areas = manifest(tmp_path)["figures"]["faithfulness/maps"]["areas"]
    saved = load(tmp_path, "faithfulness/maps")
    for name, values in areas.items():
        curves = saved[name.replace(" ", "_")]  # (4, images, shares)
        assert curves.shape == (4, 6, 8)
        np.testing.assert_allclose(curves[0, :, 0], curves[1, :, -1], rtol=1e-5)  # whole image
        assert values["deletion"] == pytest.approx(explain.area(torch.tensor(curves[0])).mean())
        low, high = values["deletion_interval"]
        assert low <= values["deletion"] <= high
    assert load(tmp_path, "faithfulness/heads")["lost"].shape == (2, 2)


def test_above_20_classes_the_most_frequent_confusions_are_named(
    draw, readable, monkeypatch, tmp_path
):
    names = tuple(f"number {k}" for k in range(25))
    images = map(images_of, SHAPES.splits().values())
    splits = [data.Split(each, torch.arange(len(each)) % 25) for each in images]
    dataset = data.Dataset("shapes", names, SHAPES.preprocessing, *splits)
    monkeypatch.setattr("model.load_dataset", lambda *_, **__: dataset)
    write_checkpoint(tmp_path / "run/last.pt", dataset, classes=25)
    for group, name in (("run", "confusion"), ("data", "class-tokens")):
        only(monkeypatch, group, name)
        assert draw(group) == 0
    counts = 9 * np.eye(25, dtype=int)
    counts[3, 7], counts[4, 1] = 5, 2
    lines = run_figures.confusions(model_of(tmp_path), counts)
    assert lines == ["number 3 as\n    number 7: 5", "number 4 as\n    number 1: 2"]


def test_non_square_images_have_a_wide_grid(draw, readable, monkeypatch, tmp_path):
    dataset = cropped(slice(8, 24), slice(4, 28))
    monkeypatch.setattr("model.load_dataset", lambda *_, **__: dataset)
    write_checkpoint(tmp_path / "run/last.pt", dataset)
    assert draw("--index 1 --query 2,3 --save-data") == 0
    assert load(tmp_path, "image/validation-1/attention-of-patch")["attention"].shape[2:] == (2, 3)
    assert load(tmp_path, "data/attention-examples")["rollout"].shape == (50, 2, 3)
    assert len(manifest(tmp_path)["figures"]) == 3 + 11 + 1 + 2 + 7 + 3
    # The model sees the images normalized as the checkpoint states.
    patches = load(tmp_path, "steps/validation-1/1-image")["patches"]
    pixels = images_of(dataset.validation)[1] / 255
    assert patches.mean() == pytest.approx((pixels.mean().item() - 0.3) / 0.2, rel=1e-4)


def test_a_single_patch_and_a_single_channel_can_be_drawn(draw, readable, monkeypatch, tmp_path):
    dataset = cropped(slice(8, 16), slice(8, 16), channels=1)
    monkeypatch.setattr("model.load_dataset", lambda *_, **__: dataset)
    write_checkpoint(tmp_path / "run/last.pt", dataset, pooling="mean")
    assert draw("") == 0
    assert set(manifest(tmp_path)["not_applicable"]) == {"data/attention-distance"}


@pytest.fixture
def of_torchvision(tmp_path):
    """A small ViT of torchvision for 7 classes, with its state dict in tmp/vit.pth."""
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}
    model = torchvision.models.VisionTransformer(**size, mlp_dim=64, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return model


def test_weights_of_torchvision_are_explained_on_the_photo(
    draw, readable, of_torchvision, tmp_path
):
    """A photo of 120 x 60 pixels, of which the model sees the middle square; a broken file."""
    x, y = np.meshgrid(np.arange(120), np.arange(60))
    photo = np.stack([2 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    name = "\u732b $x^$" + "long" * 50 + ".png"
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo).save(tmp_path / "photos" / name)
    (tmp_path / "photos/broken.jpg").write_text("no photo")
    flags = f"image --weights {tmp_path}/vit.pth --heads 2 --dir {tmp_path}/photos --save-data"
    flags += f" --out {tmp_path}/out --dpi 40 --device cpu"
    assert status_of(vis.main, [*flags.split(), "--target", "class 3"]) == 0
    options = Options(weights=str(tmp_path / "vit.pth"), heads=2, dir=tmp_path / "photos")
    model = Model(tmp_path / "vit.pth", torch.device("cpu"), options)
    (subject,) = model.subjects([])
    assert np.array_equal(subject.photo, photo)
    # What the model sees, pixel by pixel, lies within the outline.
    x0, y0, x1, y1 = subject.crop
    centers = x0 + (np.arange(32) + 0.5) / 32 * (x1 - x0) - 0.5
    assert abs(subject.pixels[0, 16].numpy() - 2 * centers).max() < 2
    centers = y0 + (np.arange(32) + 0.5) / 32 * (y1 - y0) - 0.5
    assert abs(subject.pixels[1, :, 16].numpy() - 4 * centers).max() < 3
    with torch.no_grad():
        logits = of_torchvision(model.normalize(subject.pixels[None]))[0]
    torch.testing.assert_close(model.probabilities_of(subject), logits.softmax(0))
    best = next(k for k in logits.argsort(descending=True).tolist() if k != 3)
    entry = manifest(tmp_path)["figures"][f"image/{name}/explanations"]
    assert entry["targets"] == ["class 3", f"class {best}"]


def test_a_folder_of_weights_names_the_figures_and_its_heads_hold(of_torchvision, tmp_path):
    (folder := tmp_path / "b16").mkdir()
    (tmp_path / "vit.pth").rename(folder / "pytorch_model.bin")
    stated = {"architecture": "", "model_args": {"num_heads": 2}}
    utils.write_json(folder / "config.json", stated)
    for path in (folder, folder / "pytorch_model.bin"):
        assert Model(path, torch.device("cpu"), Options(weights=str(path))).run == "b16"
    with pytest.raises(UserError, match=r"--heads 4 is not that of .*b16, 2"):
        Model(folder, torch.device("cpu"), Options(weights=str(folder), heads=4))


def test_a_start_layer_leaves_out_the_layers_before_it(of_torchvision, tmp_path):
    options = {"weights": str(tmp_path / "vit.pth"), "heads": 2}
    subject = Subject("", "", images_of(SHAPES.test)[0], None)
    model = Model(tmp_path / "vit.pth", torch.device("cpu"), Options(**options, start_layer=2))
    A, gradients = explain.attention_gradients(
        model.vit, model.normalize(subject.pixels[None]), torch.tensor([3])
    )
    found = model.explain(subject, 3)
    later = explain.rollout(A[1:]), explain.relevance(A[1:], gradients[1:])
    for name, M in zip(("rollout", "relevance"), later, strict=True):
        expected = explain.relative_to_uniform(M[:, 0, 1:])
        torch.testing.assert_close(found[name].flatten(1), expected)


def test_what_needs_too_much_memory_is_refused_before_it_is_computed(monkeypatch, tmp_path):
    """The estimate is close to what torch keeps for the backward pass."""
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, depth=4)
    model = model_of(tmp_path, what="image")
    kept = []
    images = torch.zeros(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        explain.record(model.vit, images)
    once = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    weights = {p.untyped_storage().data_ptr() for p in model.vit.parameters()}
    measured = sum(size for place, size in once.items() if place not in weights)
    squares = 4 * (4 + 3) * 2 * 17**2  # the gradients, and three more matrices
    assert explain.bytes_needed(model.config, 0) == pytest.approx(measured + squares, rel=0.3)
    monkeypatch.setattr(vis, "MOST_BYTES", explain.bytes_needed(model.config, 2))
    with pytest.raises(UserError, match="17 tokens need about 0 GB; pass --start-layer 3"):
        vis.check_options(model)


# ---------------------------------------------------------------------------- the ten steps


def test_steps_show_the_chosen_patch_layer_and_head(draw, tmp_path):
    """Compares the figures' arrays with the model's own parts."""
    write_checkpoint(tmp_path / "run/last.pt", SHAPES)
    assert draw("steps --index 3 --query 2,4 --layer 2 --head 1 --save-data") == 0
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    pixels, _ = SHAPES.validation.take(torch.tensor([3]))
    logits, attention, tokens = recorded(model, checkpoint, pixels)
    attention = torch.stack([A[0] for A in attention])
    saved = {
        name: torch.from_numpy(values)
        for path in (tmp_path / "out/steps/validation-3").glob("*.npz")
        for name, values in load(tmp_path, f"steps/validation-3/{path.stem}").items()
    }
    torch.testing.assert_close(saved["attention"], attention)
    torch.testing.assert_close(saved["scores"].softmax(dim=-1), attention[1])
    block = model.blocks[1].requires_grad_(False)
    mixed = (attention[1] @ saved["v"]).transpose(0, 1).flatten(1) @ block.attn.proj.weight.T
    z = tokens[1][0] + mixed + block.attn.proj.bias
    hidden = torch.nn.functional.gelu(saved["hidden"])
    torch.testing.assert_close(z + block.mlp.fc2(hidden), saved["tokens"][2])
    embedded = saved["embedded"] + model.embed.pos_embed[0, 1:].detach()
    torch.testing.assert_close(embedded, saved["tokens"][0, 1:])
    torch.testing.assert_close(saved["lens"][-1], logits[0].softmax(0))


def test_a_scene_points_at_the_chosen_patch(tmp_path):
    """If attention is the identity, each patch has all its weight on itself."""
    write_checkpoint(tmp_path / "run/last.pt", SHAPES)
    pixels = SHAPES.test.take(torch.arange(1)).images[0]
    scene = steps.scene_of(model_of(tmp_path, query=(2, 3)), Subject("", "", pixels, None))
    assert (scene.number, scene.token, scene.block) == (6, 7, 1)
    row = scene.of_patch(torch.eye(17))
    assert row.shape == (4, 4) and row[1, 2] == 1 and row.sum() == 1
    assert np.array_equal(scene.pieces()[1, 2], pixels.permute(1, 2, 0)[8:16, 16:24])
    sharpest = [scene.of_patch(A).max() for A in scene.walk.attention[1]]
    assert scene.head == int(np.argmax(sharpest))


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("image --index 50", "--index 50 is out of range 0 to 49 of the validation images of"),
        ("image --index zero", "'zero' is not numbers such as 0,7"),
        ("image --layer 3", "--layer 3 is out of range 1 to 2"),
        ("image --layer first", "'first' is not a number or all"),
        ("image --head most", "'most' is not a number or all, mean, max, min"),
        ("image --query 5,1", "--query 5,1 is out of range 1,1 to 4,4"),
        ("image --query 5", "'5' is not cls or a patch such as 3,4"),
        ("image --target sta", "--target 'sta' is not a class; did you mean 'star'?"),
        ("image --target zebra", "--target 'zebra' is not a class; choose from disc, ring,"),
        ("image --image x.png --target label", "--target label needs images of a data set"),
        ("image --start-layer 3", "--start-layer 3 is out of range 1 to 2"),
        ("image --start-layer 2 --layer 1", "--layer 1 comes before --start-layer 2"),
        ("image --weights x.pth", "--weights and --checkpoint each name a model"),
        ("image --image nowhere.png", "cannot read nowhere.png as an image: No such file"),
        ("image --dir nowhere", "cannot read the folder nowhere: No such file or directory"),
        ("image --dir=", "'' cannot be a path: it is empty"),
        ("model --image-size 64", "--image-size is for --weights, which takes a checkpoint too"),
        ("image --index 0 --dir nowhere", "not allowed with"),
        ("faces", "invalid choice: 'faces'"),
        ("model --dpi 5", "dpi must be in [20, 1200], not 5"),
        ("model --checkpoint nowhere.pt", "nowhere.pt"),
        ("model --chekpoint x", "did you mean --checkpoint?"),
        ("model --checkpoint {tmp}/vit.pth", "for weights of another program, pass --weights"),
        ("model --out {tmp}/vit.pth", "vit.pth: File exists"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_of_one_line(
    draw, of_torchvision, tmp_path, capsys, flags, message
):
    try:
        status = draw(flags.format(tmp=tmp_path))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error, error
    assert error.startswith("vis.py: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_newest_checkpoint_is_the_default(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vis, "ROOT", tmp_path)
    assert status_of(vis.main, ["model"]) == 2
    assert "src/trainer.py --recipe demo" in capsys.readouterr().err
    for age, name in enumerate(("b/last.pt", "a.pt", "c/last.pt")):
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
        os.utime(path, (age, age))
    (tmp_path / "checkpoints/moved.pt").symlink_to("nowhere")
    assert vis.newest_checkpoint() == tmp_path / "checkpoints/c/last.pt"


def test_names_that_repeat_are_numbered():
    assert list(unique(["a", "b", "a", "a-2", "a"])) == ["a", "b", "a-2", "a-2-2", "a-3"]


def test_it_runs_from_any_folder_without_a_display(draw, tmp_path):
    assert draw("model") == 0
    (tmp_path / "matplotlibrc").write_text("text.usetex: True")  # without TeX installed
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    environment |= {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://of_a_notebook"}
    flags = "model --format svg --checkpoint run/last.pt --out here --device cpu"
    program = [sys.executable, ROOT / "visualization/vis.py", *flags.split()]
    done = small.ran(*program, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "here/model").iterdir()}
    assert written == {"filters.svg", "positions.svg"}
