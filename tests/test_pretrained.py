"""Weights of other libraries: timm's and torchvision's own models, at random weights, decide."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save, save_file
from torch import nn

import small
import trainer
from checkpoint import load_checkpoint, load_model
from data import Preprocessing
from pretrained import FREE, from_state_dict, load_pretrained, resize_positions, state_dict_for
from utils import UserError, status_of
from ViT import ViT, ViTConfig

CLASSES = tuple("abcdefghij")


def randomized(model):
    """Random weights everywhere, so that none of them can be left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            scale, offset = (weight.shape[-1] ** -0.5, 0) if weight.ndim > 1 else (0.1, 1)
            weight.copy_(offset + scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def ours_of(start):
    """This repository's model with starting weights, for their own classes."""
    model = ViT(start.config)
    names = tuple(map(str, range(start.config.classes)))
    dataclasses.replace(start, classes=names).initialize(model, names)
    return model.eval()


def assert_same_logits(start, theirs):
    config = start.config
    images = torch.randn(2, config.channels, *config.image_size)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours_of(start)(images), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


MEAN = {"global_pool": "avg", "class_token": False}
TIMMS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_384": {"num_classes": 7},
    "vit_tiny_patch16_384": {"in_chans": 1, "num_classes": 5},
    "vit_small_patch16_224": MEAN | {"num_classes": 4},
}


@pytest.mark.parametrize("name", TIMMS)
def test_a_timm_model_gives_the_same_logits_in_both_directions(name):
    theirs = randomized(timm.create_model(name, **TIMMS[name]))
    start = from_state_dict(name, theirs.state_dict())
    assert start.config.heads == theirs.blocks[0].attn.num_heads
    assert_same_logits(start, theirs)
    back = state_dict_for("timm", checkpoint_of(start))
    assert back.keys() == theirs.state_dict().keys()
    again = timm.create_model(name, **TIMMS[name])
    again.load_state_dict(back, strict=True)
    assert all(map(torch.equal, again.parameters(), theirs.parameters()))


def checkpoint_of(start):
    """What `state_dict_for` reads of a checkpoint with starting weights."""
    return SimpleNamespace(model=start.config, weights=ours_of(start).state_dict())


@pytest.mark.parametrize(("name", "older"), [("vit_b_16", False), ("vit_b_32", True)])
def test_a_torchvision_model_gives_the_same_logits_in_both_directions(name, older):
    theirs = randomized(getattr(torchvision.models, name)())
    state = theirs.state_dict()
    if older:  # as the published files name the MLP
        for new, old in (("mlp.0.", "mlp.linear_1."), ("mlp.3.", "mlp.linear_2.")):
            state = {key.replace(new, old): weight for key, weight in state.items()}
    start = from_state_dict(name, state)
    assert start.preprocessing.interpolation == "bilinear"
    assert_same_logits(start, theirs)
    back = state_dict_for("torchvision", checkpoint_of(start))
    getattr(torchvision.models, name)().load_state_dict(back, strict=True)
    assert all(torch.equal(back[key], weight) for key, weight in theirs.state_dict().items())


def test_timms_model_without_a_position_for_its_class_token():
    options = {"no_embed_class": True, "img_size": 32, "patch_size": 8, "num_classes": 6}
    theirs = randomized(timm.create_model("vit_tiny_patch16_224", **options))
    assert_same_logits(from_state_dict("x", theirs.state_dict()), theirs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_values": 1e-5}, "layer scale"),
        ({"reg_tokens": 4}, "register tokens"),
        ({"qk_norm": True}, "norm of queries and keys"),
        ({"pre_norm": True}, "norm before the blocks"),
        ({"global_pool": "avg"}, "class token and mean pooling"),
        (MEAN | {"fc_norm": False}, "pools tokens after the last norm"),
        ({"img_size": (32, 48)}, "not of square images"),
        ({"depth": 0}, "no weight for"),
        (None, "is no state dict of timm's or torchvision's ViT"),
    ],
)
def test_what_has_no_place_here_is_refused_by_name(options, named):
    model = torchvision.models.resnet18()
    if options:
        model = timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, **options})
    with pytest.raises(UserError, match=f"x.*{named}"):
        from_state_dict("x", model.state_dict())


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize("new", [(7, 7), (21, 21), (10, 17)])
@pytest.mark.parametrize("first", [0, 1])
def test_positions_are_resized_as_timm_does(first, new):
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, first + 14 * 14, 24)
    expected = resample_abs_pos_embed(positions, list(new), num_prefix_tokens=first)
    found = resize_positions(positions, (14, 14), new)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :first], positions[:, :first])


def test_a_ramp_of_positions_stays_one():
    positions = torch.arange(8.0)[None, :, None].expand(1, 8, 4).repeat(1, 8, 1)  # by the column
    larger = resize_positions(positions, (8, 8), (8, 16)).unflatten(1, (8, 16))
    steps = larger[0, 4, 4:12, 0].diff()  # away from the border
    torch.testing.assert_close(steps, torch.full((7,), 0.5), rtol=0, atol=0.02)


# ---------------------------------------------------------------------------- files


@pytest.fixture
def tiny():
    options = {"img_size": 32, "patch_size": 8, "num_classes": 10, "depth": 2}
    return randomized(timm.create_model("vit_tiny_patch16_224", **options))


@pytest.mark.parametrize("kind", ["a.pth", "a.bin", "a.safetensors", "wrapped.pth", "old.pth"])
def test_files_of_weights_are_read(kind, tiny, tmp_path):
    path, state = tmp_path / kind, tiny.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        content = {"model": state, "epoch": 3} if kind == "wrapped.pth" else state
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pth")
    assert_same_logits(load_pretrained(str(path)), tiny)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.pth", "is not a file of weights, or is damaged"),
        ("list.pth", "holds no state dict"),
        ("missing.pth", "No such file"),
        ("a.safetensors", "is not a file of safetensors, or is damaged"),
        ("cut.safetensors", "is not a file of safetensors, or is damaged"),
        ("missing.safetensors", "No such file"),
        ("timm:nonsense", "cannot load"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name, said, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{nonsense")
    (tmp_path / "cut.safetensors").write_bytes(save({"a": torch.ones(9)})[:-1])
    (tmp_path / "a.pth").write_bytes(b"nonsense")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=said) as caught:
        load_pretrained(name if ":" in name else str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("origin", ["a.safetensors", "timm:vit_tiny_patch16_224"])
def test_a_package_that_is_missing_is_asked_for(origin, monkeypatch):
    package = "timm" if ":" in origin else "safetensors"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{origin} needs {package}: pip install {package}$"):
        load_pretrained(origin)


# ---------------------------------------------------------------------------- a run


def test_a_run_with_a_frozen_backbone(tiny, tmp_path, monkeypatch, capsys):
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr("datasets.load_dataset", small.load_small)
    common = f"--recipe finetune --init-from {tmp_path}/weights.safetensors --dataset shapes"
    flags = f"{common} --epochs 1 --warmup-epochs 0 --output-dir {tmp_path} --no-test"
    flags += " --device cpu --name"
    assert trainer.main([*flags.split(), "frozen", "--freeze"]) == 0
    out = capsys.readouterr().out
    assert "loaded, a new head for 10 classes" in out
    saved = load_checkpoint(tmp_path / "frozen/last.pt")
    half = (0.5,) * 3
    assert saved.preprocessing == Preprocessing(size=(32, 32), mean=half, std=half, crop=0.9)
    start = load_pretrained(f"{tmp_path}/weights.safetensors")
    for name, weight in saved.weights.items():
        moved = not torch.equal(weight, start.weights[name])
        assert moved == name.startswith(("head.", "norm.")), name


@pytest.mark.parametrize("flags", ["--width 96", "--depth 3", "--patch-size 16", "--pooling mean"])
def test_a_flag_that_contradicts_the_weights_is_refused(flags, tiny, tmp_path, monkeypatch, capsys):
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("datasets.load_dataset", small.load_small)
    command = f"--recipe finetune --init-from {tmp_path}/weights.pth --dataset shapes {flags}"
    command += f" --output-dir {tmp_path} --device cpu"
    assert status_of(trainer.main, command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flags} is not that of {tmp_path}/weights.pth, " in line


def test_the_same_classes_keep_their_head_and_positions_go_to_a_larger_grid(tiny):
    start = dataclasses.replace(from_state_dict("x", tiny.state_dict()), classes=CLASSES)
    config = start.adapted(ViTConfig(image_size=(48, 64)), ("image_size",))
    model = ViT(config)
    line = start.initialize(model, CLASSES)
    assert line == "weights of x: loaded, positions interpolated from 4x4 to 6x8"
    assert torch.equal(model.head.weight, tiny.head.weight)
    assert model.embed.pos_embed.shape == (1, 1 + 6 * 8, 192)
    model = ViT(config)
    start.initialize(model, CLASSES[::-1])
    assert not model.head.weight.any()


def test_free_fields_are_the_user_s_and_the_others_those_of_the_weights(tiny):
    start = from_state_dict("x", tiny.state_dict())
    wanted = ViTConfig(dropout=0.1, drop_path=0.2, attention="plain", width=64, heads=4)
    config = start.adapted(wanted, ())
    assert (config.width, config.image_size) == (192, (32, 32))
    assert all(getattr(config, name) == getattr(wanted, name) for name in FREE[1:])


def test_a_state_dict_without_a_head_gets_a_new_one():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    assert isinstance(theirs.head, nn.Identity)
    start = from_state_dict("x", theirs.state_dict())
    model = ViT(dataclasses.replace(start.config, classes=2))
    line = start.initialize(model, ("cat", "dog"))
    assert line.endswith("a new head for 2 classes")


def test_an_exported_state_dict_is_what_the_library_loads(tmp_path, capsys):
    shipped = (small.ROOT / "checkpoints/vit_cifar10.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(shipped)
    assert load_pretrained(str(tmp_path)).classes[0] == "airplane"  # a run's folder will do
    export = ["--export", str(tmp_path), "--library"]
    assert status_of(trainer.main, [*export, "timm"]) == 0
    ours, checkpoint = load_model(tmp_path / "last.pt")
    config = checkpoint.model
    sizes = {"patch_size": config.patch_size, "embed_dim": config.width, "depth": config.depth}
    sizes |= {"img_size": 32, "num_heads": config.heads, "num_classes": 10}
    theirs = timm.models.VisionTransformer(**sizes, **MEAN).eval()
    theirs.load_state_dict(torch.load(tmp_path / "model_timm.pth"), strict=True)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-4)
    capsys.readouterr()
    assert status_of(trainer.main, [*export, "torchvision"]) == 2
    assert "torchvision has no ViT with mean pooling" in capsys.readouterr().err


LACKS = {"no biases": {"qkv_bias": False}, "1 channels": {"channels": 1}}
LACKS["images of 32x48"] = {"image_size": (32, 48)}


@pytest.mark.parametrize(("lacks", "options"), LACKS.items())
def test_what_torchvision_has_not_is_not_exported_for_it(options, lacks):
    config = ViTConfig(width=16, depth=1, heads=1, **options)
    with pytest.raises(UserError, match=lacks):
        state_dict_for("torchvision", SimpleNamespace(model=config))
