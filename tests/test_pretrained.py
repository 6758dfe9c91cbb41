"""Weights of other libraries against timm's and torchvision's own models at random weights."""

import argparse
import dataclasses
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
from export import state_dict_for
from pretrained import FREE, _of_model, from_state_dict, load_pretrained, resize_positions
from utils import UserError, status_of, write_json
from ViT import ViT, ViTConfig

CLASSES = tuple("abcdefghij")


def randomized(model):
    """Random weights everywhere, so that a weight that is left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            scale, offset = (weight.shape[-1] ** -0.5, 0) if weight.ndim > 1 else (0.1, 1)
            weight.copy_(offset + scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def ours_of(start):
    """This repository's model with these starting weights, for their own classes."""
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
    assumed = f"assumed: heads {start.config.heads}, blocks pre-norm with GELU, mean 0.5"
    assert start.notes[0].startswith(assumed)
    assert start.config.heads == theirs.blocks[0].attn.num_heads
    assert_same_logits(start, theirs)
    back = state_dict_for("timm", checkpoint_of(start))
    assert back.keys() == theirs.state_dict().keys()
    again = timm.create_model(name, **TIMMS[name])
    again.load_state_dict(back, strict=True)
    assert all(map(torch.equal, again.parameters(), theirs.parameters()))


def checkpoint_of(start):
    """The part that `state_dict_for` reads of a checkpoint with these starting weights."""
    return SimpleNamespace(model=start.config, weights=ours_of(start).state_dict())


@pytest.mark.parametrize(("name", "older"), [("vit_b_16", False), ("vit_b_32", True)])
def test_a_torchvision_model_gives_the_same_logits_in_both_directions(name, older):
    theirs = randomized(getattr(torchvision.models, name)())
    state = theirs.state_dict()
    if older:  # the MLP's names in the published files
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
        ({"reg_tokens": 4}, "no place for its reg_token"),
        ({"qk_norm": True}, "no place for its blocks.*.attn.q_norm"),
        ({"global_pool": "avg"}, "either a class token or mean pooling"),
        (MEAN | {"fc_norm": False}, "either a class token or mean pooling"),
        ({"img_size": (32, 48)}, "images are not square"),
        ({"depth": 0}, "lacks a weight"),
        ("vit_small_patch16_rope_ape_224", "has rotary positions"),
        ("beit_base_patch16_224", "relative_position_bias_table"),
        ("vit_small_patch16_18x2_224", r"blocks.\*.attns.\*.norm"),
        ("resnet18", "one ViT of timm, torchvision, transformers or Google, not 0; it has conv1"),
    ],
)
def test_what_has_no_place_here_is_refused_by_name(options, named):
    name, options = (
        ("vit_tiny_patch16_224", options) if isinstance(options, dict) else (options, {})
    )
    sizes = {} if name == "resnet18" else {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, **(sizes | options))
    with pytest.raises(UserError, match=f"x.*{named}"):
        from_state_dict("x", model.state_dict())


def test_what_only_the_code_of_a_model_shows_is_refused_by_its_logits(monkeypatch):
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "pretrained": False}
    create = timm.create_model
    for name, options, right in (
        ("vit_tiny_patch16_224", {}, True),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "no_embed_class": True}, True),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, False),
        ("vit_base_patch16_rpn_224", {"embed_dim": 64, "num_heads": 4}, False),
    ):
        theirs = randomized(create(name, **sizes, **options))
        theirs.pretrained_cfg["input_size"] = (3, 32, 32)
        monkeypatch.setattr(timm, "create_model", lambda *_, model=theirs, **__: model)
        if right:
            start = load_pretrained(f"timm:{name}", mean=(0.3,))
            assert not start.notes and start.preprocessing.mean == (0.3,) * 3
            assert_same_logits(start, theirs)
        else:
            with pytest.raises(UserError, match=f"timm:{name} computes something else"):
                load_pretrained(f"timm:{name}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_table_of_docs_names_the_models_of_timm_that_load():
    """With two blocks each: a model that computes something else does so in every block."""
    page = (small.ROOT / "docs/finetuning.md").read_text()
    (listed,) = re.findall(r"^\| timm \| (.*) \|$", page, re.M)
    loaded = []
    for name in timm.list_models(module="vision_transformer") + timm.list_models(module="deit"):
        with torch.device("meta"):  # takes no memory for models that are refused by name
            state = timm.create_model(name, depth=2).state_dict()
        try:
            with pytest.raises(UserError, match=r"not finite numbers .*meta\)$"):
                from_state_dict(name, state)
            _of_model(name, randomized(timm.create_model(name, depth=2)), {})
            loaded.append(name)
        except (AssertionError, UserError) as error:
            print(name, error)
    assert sorted(loaded) == sorted(re.findall(r"`(\w+)`", listed))


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


# ---------------------------------------------------------------------------- files


@pytest.fixture
def tiny():
    options = {"img_size": 32, "patch_size": 8, "num_classes": 10, "depth": 2}
    return randomized(timm.create_model("vit_tiny_patch16_224", **options))


WRAPPED = {  # around a state dict: what training scripts save
    "a.pth": lambda state: state,
    "a.bin": lambda state: state,
    "old.pth": lambda state: {"model": state, "args": argparse.Namespace(lr=1, steps=[1])},
    "ddp.pth": lambda state: {f"module.{name}": weight for name, weight in state.items()},
    "lightning.ckpt": lambda state: {
        "state_dict": {f"model.{name}": weight for name, weight in state.items()},
        "hyper_parameters": argparse.Namespace(accuracy=np.float64(0.5), path=Path("x")),
    },
    "ema.pth": lambda state: {"model": {}, "model_ema": {"module": state}, "loss": np.ones(2)},
    "pretrained.pth": lambda state: state | {"mask_token": torch.ones(1), "decoder_pos_embed": ONE},
}
ONE = torch.ones(1)


@pytest.mark.parametrize("kind", [*WRAPPED, "a.safetensors"])
def test_files_of_weights_are_read(kind, tiny, tmp_path):
    path, state = tmp_path / kind, tiny.state_dict()
    if kind == "a.safetensors":
        save_file(state, path)
    else:
        torch.save(WRAPPED[kind](state), path, _use_new_zipfile_serialization=kind != "old.pth")
    assert_same_logits(load_pretrained(str(path)), tiny)


def test_google_s_files_are_read_as_timm_reads_them(tmp_path):
    D, h, random = 48, 3, np.random.default_rng(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 2, "num_classes": 5}
    kernels = {"embedding": (8, 8, 3, D), "head": (D, 5)}
    norms = ["Transformer/encoder_norm"]
    for block in ("Transformer/encoderblock_0", "Transformer/encoderblock_1"):
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"]
        attention = f"{block}/MultiHeadDotProductAttention_1"
        kernels |= {f"{attention}/{name}": (D, h, D // h) for name in ("query", "key", "value")}
        kernels |= {f"{attention}/out": (h, D // h, D)}
        kernels |= {f"{block}/MlpBlock_3/Dense_0": (D, 4 * D)}
        kernels |= {f"{block}/MlpBlock_3/Dense_1": (4 * D, D)}
    shapes = {"cls": (1, 1, D), "Transformer/posembed_input/pos_embedding": (1, 17, D)}
    shapes |= {f"{norm}/{name}": (D,) for norm in norms for name in ("scale", "bias")}
    for name, shape in kernels.items():
        bias = shape[1:] if name.endswith(("query", "key", "value")) else shape[-1:]
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": bias}
    path = tmp_path / "a.npz"
    np.savez(path, **{n: random.normal(0, 0.3, s).astype("f") for n, s in shapes.items()})
    theirs = timm.models.VisionTransformer(**sizes, num_heads=h).eval()
    theirs.load_pretrained(str(path))
    start = load_pretrained(str(path), heads=4)  # `adapted` would refuse: the file states it
    assert start.config.heads == h
    assert_same_logits(start, theirs)


@pytest.mark.parametrize("kind", ["folder", "model.safetensors", "names of modules"])
@pytest.mark.parametrize("name", ["ViT", "ViTMSN"])
def test_transformers_models_give_the_same_logits(name, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    labels = {0: "cat", 1: "dog", 2: "cow"}
    config = getattr(transformers, f"{name}Config")(**sizes, patch_size=8, id2label=labels)
    theirs = randomized(getattr(transformers, f"{name}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    if kind == "names of modules":
        torch.save(theirs.state_dict(), tmp_path / kind)
    start = load_pretrained(str(tmp_path if kind == "folder" else tmp_path / kind))
    assert start.config.heads == 4 and start.classes == ("cat", "dog", "cow")
    assert_same_logits(start, lambda images: theirs(images).logits)
    by_text = {"2": "cow", "0": "cat", "1": "dog"}  # as JSON may sort "10" before "2"
    write_json(tmp_path / "config.json", config.to_dict() | {"id2label": by_text})
    assert load_pretrained(tmp_path).classes == start.classes
    write_json(tmp_path / "config.json", config.to_dict() | {"hidden_act": "quick_gelu"})
    with pytest.raises(UserError, match="hidden_act 'quick_gelu'"):
        load_pretrained(str(tmp_path))


class Whole(nn.Module):
    """A model that torch.save pickles whole."""


BYTES = {
    "empty.pth": (b"", "is empty"),
    "nonsense.pth": (b"nonsense", "is not a file of weights"),
    "page.pth": (b"\n<!DOCTYPE html>", "is a web page"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
    "cut.pth": (b"PK\x03\x04", "is damaged or cut off"),
    "a.safetensors": (b"nonsense", "is not a whole file of weights"),
    "cut.safetensors": (save({"a": torch.ones(9)})[:-1], "is not a whole file of weights"),
}
SAVED = {
    "list.pth": ([1, 2], "holds no state dict, but: list"),
    "whole.pth": (Whole(), "is a whole pickled model; where it was made"),
    "inside.pth": ({"model": Whole(), "epoch": 1}, "is a whole pickled model"),
    "optimizer.pth": ({"optimizer": {}, "epoch": 1}, "but: optimizer, epoch"),
    "two.pth": (
        {"a.patch_embed.proj.weight": ONE, "b.patch_embed.proj.weight": ONE},
        "must hold one ViT .* not 2; it has a.patch_embed.proj.weight, b.patch",
    ),
}


@pytest.mark.parametrize("name", [*BYTES, *SAVED, "b.npz", "no.pth", "timm:nonsense"])
def test_what_is_no_file_of_weights_is_refused(name, tmp_path):
    said = {"no.pth": "No such file", "timm:nonsense": "cannot load", "b.npz": "it has w, v"}
    path = tmp_path / name
    if name in BYTES:
        content, said[name] = BYTES[name]
        path.write_bytes(content)
    elif name in SAVED:
        content, said[name] = SAVED[name]
        torch.save(content, path)
    elif name == "b.npz":
        np.savez(path, w=np.ones(2), v=np.ones(2))
    with pytest.raises(UserError, match=said[name]) as caught:
        load_pretrained(name if ":" in name else str(path))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("norm.weight", lambda w: w.to_sparse(), "norm.weight has values.*sparse"),
        ("norm.weight", lambda w: w.to(torch.complex64), "norm.weight has values.*complex64"),
        ("norm.weight", lambda w: w.to(torch.int8), "norm.weight.*floating point"),
        ("norm.bias", lambda w: w * math.nan, "norm.bias has values that are not finite"),
        ("norm.bias", lambda w: w.to("meta"), "norm.bias has values.*meta"),
        ("norm.bias", lambda w: w[:-1], "size mismatch for norm.bias"),
        ("pos_embed", lambda w: w[0, 0, 0], "lacks a weight of a ViT, or its shape"),
        (
            "patch_embed.proj.weight",
            lambda w: w.flatten(1),
            "lacks a weight of a ViT, or its shape",
        ),
        ("blocks.0.mlp.fc2.weight", lambda w: w[:, ::2], "gated MLP"),
        ("blocks.1.norm1.bias", None, 'Missing key.*"blocks.1.norm1.bias"'),
        ("y" * 999, lambda _: ONE, "no place for its yyy"),
    ],
)
def test_every_tensor_is_checked(name, change, said, tiny):
    state = tiny.state_dict()
    weight = state.pop(name, None)
    with pytest.raises(UserError, match=said) as caught:
        from_state_dict("x", state | ({name: change(weight)} if change else {}))
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize(
    "other",
    [
        *"head.1.weight heads.0.weight pre_logits.fc.weight pooler.dense.bias head.weight".split(),
        *("no bias", ""),
    ],
)
def test_another_head_is_left_out_with_a_note(other, tiny):
    state = {name: weight for name, weight in tiny.state_dict().items() if name != "head.bias"}
    if other == "no bias":  # the same as a bias of zeros
        assert torch.equal(from_state_dict("x", state).weights["head.weight"], state["head.weight"])
        return
    if not other:
        del state["head.weight"]
        assert not from_state_dict("x", state).weights["head.weight"].any()
        return
    start = from_state_dict("x", state | {other: torch.ones(1, 192)}, {"classes": CLASSES})
    assert start.notes[0].startswith("left out: head") and start.classes is None
    assert start.weights["head.weight"].shape == (1, 192)


@pytest.mark.parametrize(("before", "channels"), [(3, 1), (3, 5), (1, 3), (4, 3)])
def test_channels_are_adapted_as_timm_does(before, channels):
    from timm.models import adapt_input_conv

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=before)
    adapted = from_state_dict("x", theirs.state_dict()).for_channels(channels)
    kernel = theirs.patch_embed.proj.weight.detach()
    expected = adapt_input_conv(channels, kernel, before)
    found = adapted.weights["embed.proj.weight"].reshape(expected.shape)
    torch.testing.assert_close(found, expected)
    assert adapted.config.channels == adapted.preprocessing.channels == channels


@pytest.mark.parametrize("package", ["safetensors", "timm"])
def test_a_package_that_is_missing_is_asked_for(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    save_file({"a": ONE}, tmp_path / "a.safetensors")
    origin = "timm:vit_tiny_patch16_224" if package == "timm" else f"{tmp_path}/a.safetensors"
    with pytest.raises(UserError, match=f"{origin} needs {package}: pip install {package}$"):
        load_pretrained(origin)


# ---------------------------------------------------------------------------- a run


def test_a_run_with_a_frozen_backbone(tiny, tmp_path, monkeypatch, capsys):
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr("datasets.load_dataset", small.load_small)
    common = f"--recipe finetune --init-from {tmp_path}/weights.safetensors --dataset shapes"
    flags = f"{common} --epochs 1 --warmup-epochs 0 --output-dir {tmp_path} --no-test"
    flags += " --std 0.3,0.2,0.1 --crop 0.8 --device cpu --name"
    assert trainer.main([*flags.split(), "frozen", "--freeze"]) == 0
    out = capsys.readouterr().out
    assert "a new head for 10 classes; assumed: heads 3, blocks pre-norm with GELU, mean" in out
    saved = load_checkpoint(tmp_path / "frozen/last.pt")
    stated = {"mean": (0.5,) * 3, "std": (0.3, 0.2, 0.1), "crop": 0.8}
    assert saved.preprocessing == Preprocessing(size=(32, 32), **stated)
    start = load_pretrained(f"{tmp_path}/weights.safetensors")
    for name, weight in saved.weights.items():
        moved = not torch.equal(weight, start.weights[name])
        assert moved == name.startswith(("head.", "norm.")), name


@pytest.mark.parametrize(
    "flags", ["--heads 5", "--width 96", "--depth 3", "--patch-size 16", "--pooling mean"]
)
def test_a_flag_that_contradicts_the_weights_is_refused(flags, tiny, tmp_path, monkeypatch, capsys):
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    write_json(tmp_path / "config.json", {"architecture": "x", "model_args": {"num_heads": 3}})
    monkeypatch.setattr("datasets.load_dataset", small.load_small)
    command = f"--recipe finetune --init-from {tmp_path}/weights.pth --dataset shapes {flags}"
    command += f" --output-dir {tmp_path} --device cpu"
    assert status_of(trainer.main, command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flags} is not that of {tmp_path}/weights.pth, " in line


def test_the_same_classes_keep_their_head_and_positions_go_to_a_larger_grid(tiny):
    start = dataclasses.replace(from_state_dict("x", tiny.state_dict()), classes=CLASSES)
    config = start.adapted(ViTConfig(), {"image_size": (48, 64)})
    model = ViT(config)
    line = start.initialize(model, CLASSES)
    assert line.startswith("weights of x: loaded, positions interpolated from 4x4 to 6x8; assumed")
    assert torch.equal(model.head.weight, tiny.head.weight)
    assert model.embed.pos_embed.shape == (1, 1 + 6 * 8, 192)
    model = ViT(config)
    start.initialize(model, CLASSES[::-1])
    assert not model.head.weight.any()


def test_free_fields_are_the_user_s_and_the_others_those_of_the_weights(tiny):
    start = from_state_dict("x", tiny.state_dict())
    wanted = ViTConfig(dropout=0.1, drop_path=0.2, attention="plain", width=64, heads=4)
    config = start.adapted(wanted, {})
    assert (config.width, config.image_size) == (192, (32, 32))
    assert all(getattr(config, name) == getattr(wanted, name) for name in FREE[1:])


def test_an_exported_state_dict_is_what_the_library_loads(tmp_path, capsys):
    shipped = (small.ROOT / "checkpoints/vit_cifar10.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(shipped)
    assert load_pretrained(str(tmp_path)).classes[0] == "airplane"  # a run's folder will do
    export = ["--export", str(tmp_path), "--library"]
    write_json(tmp_path / "config.json", {"a user's": 1})
    assert status_of(trainer.main, [*export, "timm"]) == 2
    assert "config.json exists; --overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert status_of(trainer.main, [*export, "timm"]) == 0
    ours, checkpoint = load_model(tmp_path / "last.pt")
    printed = capsys.readouterr().out
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    (line,) = (line for line in printed.splitlines() if line.startswith("timm.create_model("))
    assert_same_logits(load_pretrained(f"{tmp_path}/model_timm.pth"), eval(line).eval())
    start = load_pretrained(f"{tmp_path}/model_timm.pth")
    assert start.classes == tuple(checkpoint.classes)
    assert (start.config.heads, start.preprocessing) == (8, checkpoint.preprocessing)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-4)


def test_onnx_runtime_computes_the_same_for_any_number_of_images(tmp_path, monkeypatch, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "last.pt").write_bytes((small.ROOT / "checkpoints/vit_cifar10.pt").read_bytes())
    export = ["--export", str(tmp_path), "--library", "onnx"]
    assert status_of(trainer.main, export) == 0
    session, images = runtime.InferenceSession(tmp_path / "model.onnx"), torch.randn(3, 3, 32, 32)
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = load_model(tmp_path / "last.pt")[0](images)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert status_of(trainer.main, [*export, "--overwrite"]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"qkv_bias": False}, {"channels": 1}, {"image_size": (32, 48)}, {"pooling": "mean"}]
)
def test_what_torchvision_has_not_is_not_exported_for_it(options):
    config = ViTConfig(width=16, depth=1, heads=1, **options)
    with pytest.raises(UserError, match="torchvision's ViTs have a class token"):
        state_dict_for("torchvision", SimpleNamespace(model=config))
