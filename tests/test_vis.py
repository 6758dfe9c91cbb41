"""visualization/vis.py: what it draws and prints, and the errors for what cannot be drawn."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import catalogue
import data
import explain
import figures
import small
import steps
import utils
import vis
from catalogue import OF_AN_IMAGE, OF_THE_MODEL, STEPS
from checkpoint import Checkpoint, load_model, save_checkpoint, versions
from recipes import TrainConfig
from small import ROOT, SHAPES
from test_figures import assert_readable
from utils import UserError, status_of
from ViT import ViT, ViTConfig

KINDS = {"image": set(OF_AN_IMAGE)} | {name: set(of) for name, of in OF_THE_MODEL.items()}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw("model --dpi 50") draws the checkpoint tmp/run/last.pt into tmp/out.

    Where no test has trained one, it is of an untrained model, in its shape like `train`'s.
    """
    monkeypatch.setattr(catalogue, "load_dataset", small.load_small)
    monkeypatch.setattr(sys, "argv", ["visualization/vis.py"])
    checkpoint = tmp_path / "run/last.pt"

    def run(flags):
        if not checkpoint.exists():
            write_checkpoint(checkpoint, SHAPES)
        paths = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        return status_of(vis.main, [*paths, "--dpi", "40", *flags.split()])

    return run


@pytest.fixture
def readable(monkeypatch):
    """Every figure that is saved is looked at."""
    save = figures.save

    def save_readable(figure, path, dpi):
        save(figure, path, dpi)
        figure.set_dpi(dpi)  # of its layout
        assert_readable(figure, titled=path.stem != "overview")

    monkeypatch.setattr(figures, "save", save_readable)


def write_checkpoint(path, dataset, training=None, **options):
    """A checkpoint of an untrained model for a data set, of 50 held-out images by default."""
    torch.manual_seed(0)
    size, channels = dataset.preprocessing.size, dataset.preprocessing.channels
    small_size = {"patch_size": 8, "width": 16, "depth": 2, "heads": 2}
    config = ViTConfig(image_size=size, channels=channels, **small_size | options)
    model = ViT(config)
    torch.nn.init.normal_(model.head.weight)
    training = {"dataset": "shapes", "validation_images": 50} | (training or {})
    checkpoint = Checkpoint(
        recipe="demo",
        model=config,
        training=TrainConfig(**training),
        preprocessing=dataset.preprocessing,
        classes=list(dataset.classes),
        weights=dict(model.state_dict()),
        history=[],
        versions=versions(),
    )
    save_checkpoint(path, checkpoint)


def cropped(dataset, rows, columns, channels=3):
    """The same data set with a part of each image."""

    def part(split):
        images, labels = whole(split)
        return data.Split(images[:, :channels, rows, columns], labels)

    size = (rows.stop - rows.start, columns.stop - columns.start)
    return dataclasses.replace(
        dataset,
        preprocessing=data.Preprocessing(size=size, mean=(0.3,) * channels, std=(0.2,) * channels),
        train=part(dataset.train),
        validation=part(dataset.validation),
    )


def whole(split):
    """All images (n, C, H, W) and labels (n,) of a split."""
    return split.take(torch.arange(len(split)))


@torch.no_grad()
def recorded(model, checkpoint, images):
    return explain.record(model, checkpoint.preprocessing.normalize(images))


def manifest(tmp_path) -> dict:
    return json.loads((tmp_path / "out/manifest.json").read_text())


@pytest.mark.parametrize("training", ["--pooling class --positions learned", "--pooling mean"])
def test_all_draws_every_figure_and_the_manifest_lists_them(
    train, draw, readable, tmp_path, training, capsys
):
    assert train(f"--name run --epochs 1 {training}") == 0
    assert draw("--index 3 --save-data") == 0
    names = {f"image/validation-3/{name}" for name in KINDS["image"]}
    names |= {f"steps/validation-3/{name}" for name in STEPS}
    names |= {f"{group}/{name}" for group in ("model", "data", "run") for name in KINDS[group]}
    written = manifest(tmp_path)
    assert written["figures"].keys() == names | {"explorer"} and written["not_applicable"] == {}
    for name in names:
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert len(image.convert("L").getcolors()) > 5, name
        assert (tmp_path / f"out/{name}.npz").exists()
    checkpoint = tmp_path / "run/last.pt"
    assert written["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["arguments"]["index"] == [3] and written["arguments"]["save_data"] is True
    assert written["arguments"]["data_dir"] == "data" and written["checkpoint"] == str(checkpoint)
    assert f"{len(names) + 1} figures in {tmp_path / 'out'}" in capsys.readouterr().out


def load(tmp_path, name) -> dict:
    with np.load(tmp_path / f"out/{name}.npz") as arrays:
        return dict(arrays)


def test_saved_arrays_are_what_the_functions_give(train, draw, tmp_path):
    flags = "--epochs 1 --pooling class --positions learned --precision fp32"  # that of figures
    assert train(f"--name run {flags}") == 0
    assert draw("--index 3 --save-data") == 0
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    images, labels = whole(SHAPES.validation)
    logits, attention, _ = recorded(model, checkpoint, images)

    saved = load(tmp_path, "image/validation-3/attention")["attention"]
    expected = torch.stack([A[3, :, 0, 1:] for A in attention]).unflatten(-1, (4, 4))
    np.testing.assert_allclose(saved, expected, atol=1e-6)
    saved = load(tmp_path, "image/validation-3/attention-of-patch")["attention"]
    middle = 1 + 2 * 4 + 2  # row 3, column 3 of 4
    expected = torch.stack([A[3, :, middle, 1:] for A in attention]).unflatten(-1, (4, 4))
    np.testing.assert_allclose(saved, expected, atol=1e-6)

    order = logits[3].argsort(descending=True)[:2].tolist()
    image = checkpoint.preprocessing.normalize(images[[3, 3]])
    expected = explain.explanations(model, image, torch.tensor(order))
    saved = load(tmp_path, "image/validation-3/explanations")
    assert saved.keys() == {
        "attention",
        "rollout",
        "gradient_rollout",
        "relevance",
        "LeGrad",
    }
    for method, values in expected.items():
        np.testing.assert_allclose(saved[method.replace(" ", "_")], values, atol=1e-5)

    counts = load(tmp_path, "run/confusion")["counts"]
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    entries = manifest(tmp_path)["figures"]
    assert counts.trace() / counts.sum() == pytest.approx(accuracy)
    assert entries["run/confusion"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy == pytest.approx(checkpoint.history[-1].validation_accuracy, abs=1e-9)
    saved = load(tmp_path, "data/attention-distance")["distance"]
    assert saved.shape == load(tmp_path, "data/attention-distance")["entropy"].shape == (2, 2)
    assert entries["data/attention-distance"]["mean px"] == pytest.approx(saved.mean())


def test_the_probe_does_not_depend_on_its_batches_but_on_the_seed(draw, tmp_path, monkeypatch):
    assert draw("model") == 0  # writes the checkpoint

    def probe(seed):
        options = catalogue.Options(seed=seed)
        return catalogue.Model(tmp_path / "run/last.pt", torch.device("cpu"), options).probe

    monkeypatch.setattr(catalogue, "PROBE_IMAGES", 20)
    whole = probe(0)
    monkeypatch.setattr(catalogue, "PROBE_BATCH", 7)
    for field, values in probe(0)._asdict().items():
        torch.testing.assert_close(values, getattr(whole, field), msg=field)
    assert not torch.equal(probe(1).labels, whole.labels)


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ("", (2, 2, 4, 4)),
        ("--layer 2", (1, 2, 4, 4)),
        ("--head 1", (2, 1, 4, 4)),
        ("--layer 1 --head max", (1, 1, 4, 4)),
    ],
)
def test_layers_and_heads_can_be_chosen(draw, tmp_path, monkeypatch, flags, shape):
    monkeypatch.setattr(
        vis, "OF_AN_IMAGE", {"attention-of-patch": catalogue.OF_AN_IMAGE["attention-of-patch"]}
    )
    assert draw("image --index 0 --save-data --query 2,4") == 0
    everything = load(tmp_path, "image/validation-0/attention-of-patch")["attention"]
    assert draw(f"image --index 0 --save-data --query 2,4 {flags}") == 0
    chosen = load(tmp_path, "image/validation-0/attention-of-patch")["attention"]
    assert chosen.shape == shape
    if "2" in flags:
        np.testing.assert_array_equal(chosen[0], everything[1])
    if "--head 1" in flags:
        np.testing.assert_array_equal(chosen[:, 0], everything[:, 0])
    if "max" in flags:
        np.testing.assert_array_equal(chosen[0, 0], everything[0].max(axis=0))


def test_augmentation_has_a_row_for_each_operation_of_the_recipe(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(
        vis,
        "OF_THE_MODEL",
        {"data": {"augmentation": catalogue.OF_THE_MODEL["data"]["augmentation"]}},
    )
    used = {"crop_padding": 2, "cutmix": 1.0, "mixup": 0.8}
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, used)
    assert draw("data --save-data --seed 3") == 0
    saved = {k: torch.from_numpy(v) for k, v in load(tmp_path, "data/augmentation").items()}
    operations = ["random_flip", "random_crop", "Mixup", "CutMix"]
    assert list(saved) == ["original", *operations, "whole_recipe"]

    def generator():
        return utils.generator_for(3)

    images = saved["original"]
    flipped = augment.random_flip(images, generator())
    assert torch.equal(saved["random_flip"], flipped) and not torch.equal(flipped, images)
    assert torch.equal(saved["random_crop"], augment.random_crop(images, 2, generator()))
    recipe, coins = TrainConfig(**used), torch.zeros(8, dtype=torch.bool)
    expected, _ = augment.augment(images, torch.eye(10)[:8], recipe, 3, coins, 0)
    assert torch.equal(saved["whole_recipe"], expected)

    write_checkpoint(tmp_path / "run/last.pt", SHAPES, {"flip": "off", "crop_padding": 0})
    assert draw("data") == 0
    assert manifest(tmp_path)["not_applicable"] == {
        "data/augmentation": "the recipe uses no augmentation"
    }


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
    # The query is the classifier, so no patch's attention is drawn.
    assert entries.keys() == {
        f"image/validation-0/{name}" for name in KINDS["image"] - {"attention-of-patch"}
    }


def test_without_held_out_images_the_test_images_are_shown(draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        vis, "OF_THE_MODEL", {"run": {"confusion": catalogue.OF_THE_MODEL["run"]["confusion"]}}
    )
    assert draw("run") == 0
    assert manifest(tmp_path)["split"] == "validation"
    assert draw("run --split test --save-data") == 0
    assert load(tmp_path, "run/confusion")["counts"].sum() == 60
    write_checkpoint(tmp_path / "run/last.pt", SHAPES, {"validation_images": 0})
    assert draw("run") == 0
    assert manifest(tmp_path)["split"] == "test"
    neither = dataclasses.replace(SHAPES, validation=None, test=None)
    monkeypatch.setattr(catalogue, "load_dataset", lambda *_, **__: neither)
    capsys.readouterr()
    assert draw("run") == 2
    assert capsys.readouterr().err == "vis.py: shapes has no validation images\n"


def test_a_perfect_model_has_no_mistakes(draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        catalogue,
        "predict",
        lambda model, split, preprocessing: 9.0 * torch.nn.functional.one_hot(split.labels, 10),
    )
    assert draw("run") == 0
    assert "run/mistakes" in manifest(tmp_path)["not_applicable"]
    assert "not applicable: run/mistakes: the model makes no mistakes" in capsys.readouterr().out
    assert manifest(tmp_path)["figures"]["run/confusion"]["accuracy"] == 1


def no_data(*_, **__):
    raise UserError("no CIFAR-10 in data")


def test_without_the_data_set_what_needs_none_is_drawn(draw, tmp_path, monkeypatch, capsys):
    assert draw("model") == 0
    monkeypatch.setattr(catalogue, "load_dataset", no_data)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert draw(f"--image {tmp_path / 'red.png'}") == 0
    written = manifest(tmp_path)
    assert written["figures"].keys() == {
        *(f"image/red.png/{name}" for name in KINDS["image"]),
        *(f"steps/red.png/{name}" for name in STEPS),
        "explorer",
        *(f"model/{name}" for name in KINDS["model"]),
    }
    assert written["not_applicable"].pop("run/curves") == "the checkpoint has no training history"
    assert set(written["not_applicable"].values()) == {"no CIFAR-10 in data"}
    assert draw("") == 0
    assert {"image", "steps", "explorer"} <= manifest(tmp_path)["not_applicable"].keys()
    capsys.readouterr()
    for flags in ("data", "image", "steps", "all --index 0"):
        assert draw(flags) == 2
        assert capsys.readouterr().err == "vis.py: no CIFAR-10 in data\n"


def test_image_files_need_no_data_set(draw, tmp_path, monkeypatch):
    assert draw("model") == 0
    monkeypatch.setattr(catalogue, "load_dataset", lambda *_, **__: pytest.fail("it was loaded"))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert draw(f"image --image {tmp_path / 'red.png'} --query cls") == 0


@pytest.mark.parametrize("removal", ["drop", "black"])
def test_faithfulness_has_a_table_of_all_maps(draw, readable, tmp_path, removal, capsys):
    assert draw(f"faithfulness --images 6 --save-data --removal {removal}") == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = {line.split(" | ")[0].removeprefix("| ") for line in table[1:]}
    assert names == {*("attention", "rollout", "gradient rollout", "relevance", "LeGrad")} | {
        "gradient x input",
        "random order",
    }
    areas = manifest(tmp_path)["figures"]["faithfulness/maps"]["areas"]
    saved = load(tmp_path, "faithfulness/maps")
    for name, values in areas.items():
        curves = saved[name.replace(" ", "_")]  # (4, images, shares)
        assert curves.shape == (4, 6, 8)
        np.testing.assert_allclose(curves[0, :, 0], curves[1, :, -1], rtol=1e-5)  # the whole image
        assert values["deletion"] == pytest.approx(explain.area(torch.tensor(curves[0])).mean())
        low, high = values["deletion_interval"]
        assert low <= values["deletion"] <= high
    assert load(tmp_path, "faithfulness/heads")["lost"].shape == (2, 2)


def test_images_are_normalized_as_the_checkpoint_states(draw, tmp_path):
    other = data.Preprocessing(size=(32, 32), mean=(0.9,) * 3, std=(0.1,) * 3)
    dataset = dataclasses.replace(SHAPES, preprocessing=other)
    write_checkpoint(tmp_path / "run/last.pt", dataset)
    assert draw("steps --index 0 --save-data") == 0
    patches = load(tmp_path, "steps/validation-0/1-image")["patches"]
    pixels = whole(SHAPES.validation).images[0] / 255
    assert patches.mean() == pytest.approx((pixels.mean().item() - 0.9) / 0.1, rel=1e-4)


def test_non_square_images_have_a_wide_grid(draw, readable, monkeypatch, tmp_path):
    dataset = cropped(SHAPES, slice(8, 24), slice(4, 28))
    monkeypatch.setattr(catalogue, "load_dataset", lambda *_, **__: dataset)
    write_checkpoint(tmp_path / "run/last.pt", dataset)
    assert draw("--index 1 --query 2,3 --save-data") == 0
    assert load(tmp_path, "image/validation-1/attention-of-patch")["attention"].shape[2:] == (2, 3)
    assert load(tmp_path, "data/attention-examples")["rollout"].shape == (50, 2, 3)
    assert len(manifest(tmp_path)["figures"]) == 3 + 11 + 1 + 2 + 7 + 3


def test_a_single_patch_and_a_single_channel_can_be_drawn(draw, readable, monkeypatch, tmp_path):
    dataset = cropped(SHAPES, slice(8, 16), slice(8, 16), channels=1)
    monkeypatch.setattr(catalogue, "load_dataset", lambda *_, **__: dataset)
    write_checkpoint(tmp_path / "run/last.pt", dataset, pooling="mean")
    assert draw("") == 0
    assert set(manifest(tmp_path)["not_applicable"]) == {"data/attention-distance", "run/curves"}


# ---------------------------------------------------------------------------- the ten steps


def test_steps_show_the_chosen_patch_layer_and_head(draw, tmp_path):
    """The figures' arrays against the model's own parts."""
    write_checkpoint(tmp_path / "run/last.pt", SHAPES)
    assert draw("steps --index 3 --query 2,4 --layer 2 --head 1 --save-data") == 0
    model, checkpoint = load_model(tmp_path / "run/last.pt")
    pixels, _ = SHAPES.validation.take(torch.tensor([3]))
    logits, attention, tokens = recorded(model, checkpoint, pixels)

    def saved(name):
        return {
            key: torch.from_numpy(value)
            for key, value in load(tmp_path, f"steps/validation-3/{name}").items()
        }

    attention = torch.stack([A[0] for A in attention])
    torch.testing.assert_close(saved("7-heads")["attention"], attention)
    torch.testing.assert_close(saved("6-attention")["scores"].softmax(dim=-1), attention[1])
    parts = saved("5-queries")
    block = model.blocks[1]
    mixed = (attention[1] @ parts["v"]).transpose(0, 1).flatten(1) @ block.attn.proj.weight.T
    z = tokens[1][0] + mixed + block.attn.proj.bias
    hidden = torch.nn.functional.gelu(saved("8-mlp")["hidden"])
    torch.testing.assert_close((z + block.mlp.fc2(hidden)).detach(), saved("9-blocks")["tokens"][2])
    torch.testing.assert_close(
        saved("3-embedding")["embedded"] + model.embed.pos_embed[0, 1:].detach(),
        saved("4-positions")["tokens"][0, 1:],
    )
    torch.testing.assert_close(saved("10-classifier")["lens"][-1], logits[0].softmax(0))


def test_a_scene_points_at_the_chosen_patch():
    """Where attention is an identity, all weight of a patch is on itself."""
    model = ViT(ViTConfig(patch_size=8, width=16, depth=2, heads=2)).eval()
    pixels, _ = SHAPES.test.take(torch.arange(1))
    image = SHAPES.preprocessing.normalize(pixels)[0]
    picture = pixels[0].permute(1, 2, 0).numpy()
    scene = steps.scene_of(model, image, picture, list(SHAPES.classes), patch=(1, 2))
    assert (scene.number, scene.token, scene.block) == (6, 7, 1)
    row = scene.of_patch(torch.eye(17))
    assert row.shape == (4, 4) and row[1, 2] == 1 and row.sum() == 1
    assert np.array_equal(scene.pieces()[1, 2], picture[8:16, 16:24])
    sharpest = [scene.of_patch(A).max() for A in scene.walk.attention[1]]
    assert scene.head == int(np.argmax(sharpest))


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("image --index 50", "--index 50 is out of range 0 to 49 of the validation images of"),
        ("image --index zero", "'zero' is not numbers such as 0,7"),
        ("image --layer 3", "--layer 3 is out of range 1 to 2"),
        ("image --layer first", "'first' is neither a number nor all"),
        ("image --head most", "'most' is neither a number nor all, mean, max, min"),
        ("image --query 5,1", "--query 5,1 is out of range 1,1 to 4,4"),
        ("image --query 5", "'5' is neither cls nor a patch such as 3,4"),
        ("image --target sta", "--target 'sta' is not a class; did you mean 'star'?"),
        ("image --target zebra", "--target 'zebra' is not a class; choose from disc, ring,"),
        ("image --image x.png --target label", "--target label needs images of a data set"),
        ("image --image nowhere.png", "cannot read nowhere.png as an image: No such file"),
        ("image --dir nowhere", "cannot read the folder nowhere: No such file or directory"),
        ("image --index 0 --dir nowhere", "not allowed with"),
        ("faces", "invalid choice: 'faces'"),
        ("model --dpi 5", "dpi must be in [20, 1200], not 5"),
        ("model --checkpoint nowhere.pt", "nowhere.pt"),
        ("model --chekpoint x", "did you mean --checkpoint?"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_of_one_line(draw, tmp_path, capsys, flags, message):
    try:
        status = draw(flags)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error, error
    assert error.startswith("vis.py: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named(draw, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert draw(f"model --out {tmp_path / 'file'}") == 2
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_newest_checkpoint_is_the_default(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vis, "ROOT", tmp_path)
    assert status_of(vis.main, ["model"]) == 2
    assert "src/trainer.py --recipe demo" in capsys.readouterr().err
    for age, name in enumerate(("b/last.pt", "a.pt", "c/last.pt")):
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
        os.utime(path, (age, age))
    assert vis.newest_checkpoint() == tmp_path / "checkpoints/c/last.pt"


def test_names_that_repeat_are_numbered():
    assert list(vis.unique(["a", "b", "a", "a"])) == ["a", "b", "a-2", "a-3"]


def test_it_runs_from_any_folder_without_a_display(draw, tmp_path):
    assert draw("model") == 0
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment.pop("MPLBACKEND", None)
    command = [sys.executable, str(ROOT / "visualization/vis.py"), "model", "--format", "svg"]
    result = subprocess.run(
        [*command, "--checkpoint", "run/last.pt", "--out", "here"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "here/model").iterdir()} == {
        "filters.svg",
        "positions.svg",
    }
