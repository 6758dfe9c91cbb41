"""Exports trained models: model.pt, state dicts for timm and torchvision, ONNX."""

import json
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import EXPORTED, TIMM_CONFIG, Checkpoint, load_checkpoint, load_model, save_model
from utils import UserError, write_json, write_torch, write_whole
from ViT import ViT
from weight_files import read_json

NAMES = {  # ours, and theirs
    "timm": (
        ("embed.cls_token", "cls_token"),
        ("embed.pos_embed", "pos_embed"),
        ("embed.proj.", "patch_embed.proj."),
    ),
    "torchvision": (
        ("embed.cls_token", "class_token"),
        ("embed.pos_embed", "encoder.pos_embedding"),
        ("embed.proj.", "conv_proj."),
        ("blocks.", "encoder.layers.encoder_layer_"),
        (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."),
        (".attn.qkv.", ".self_attention.in_proj_"),
        (".attn.proj.", ".self_attention.out_proj."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.3."),
        ("norm.", "encoder.ln."),
        ("head.", "heads.head."),
    ),
}


def state_dict_for(library: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint as timm's or torchvision's model loads them."""
    config = checkpoint.model
    H, W = config.image_size
    plain = config.pooling == "class" and config.qkv_bias and config.channels == 3 and H == W
    if library == "torchvision" and not plain:
        raise UserError(
            "torchvision's ViTs have a class token, biases of queries, keys and values, 3 channels "
            "and square images; this model does not, and --library timm takes it"
        )
    weights = dict(checkpoint.weights)
    shape = (config.width, config.channels, config.patch_size, config.patch_size)
    weights["embed.proj.weight"] = weights["embed.proj.weight"].reshape(shape)
    if "embed.pos_embed" not in weights:  # fixed here, learned there
        weights["embed.pos_embed"] = ViT(config).embed.pos_embed
    pairs = NAMES[library] + ((("norm.", "fc_norm."),) if config.pooling == "mean" else ())
    for ours, theirs in pairs:
        weights = {name.replace(ours, theirs): weight for name, weight in weights.items()}
    return weights


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of timm's config.json; `load_pretrained` reads it beside any weights."""
    config, expected = checkpoint.model, checkpoint.preprocessing
    exact = math.nextafter(config.hidden / config.width, math.inf)  # timm rounds the width down
    return {
        "architecture": "vit_base_patch16_224",  # the arguments turn it into this model
        "num_classes": config.classes,
        "label_names": list(checkpoint.classes),
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.channels,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio if config.mlp_ratio.is_integer() else exact,
            "qkv_bias": config.qkv_bias,
            "class_token": config.pooling == "class",
            "global_pool": "token" if config.pooling == "class" else "avg",
        },
        "pretrained_cfg": {
            "input_size": (config.channels, *config.image_size),
            "mean": expected.mean,
            "std": expected.std,
            "interpolation": expected.interpolation,
            "crop_pct": expected.crop,
            "classifier": "head",
        },
    }


def onnx_bytes(path: Path) -> bytes:
    """A checkpoint's model as ONNX: normalized images (B, C, H, W) to logits (B, K).

    Raises:
        UserError: a package is missing, or onnxruntime gives other logits.
    """
    packages = ("onnx", "onnxscript", "onnxruntime")
    if not all(map(find_spec, packages)):
        raise UserError(f"--library onnx needs more: pip install {' '.join(packages)}")
    import onnxruntime

    model = load_model(path)[0]
    images = torch.randn(3, model.config.channels, *model.config.image_size)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            model,
            (images[:2],),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}},
            verbose=False,
        )
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    difference = (torch.from_numpy(logits) - model(images)).abs().max().item()
    if not difference <= 1e-4:
        raise UserError(f"onnxruntime's logits differ by {difference:.1g} from this model's")
    return content


def export(path: Path, library: str | None, overwrite: bool) -> None:
    """--export: writes model.pt beside a checkpoint, or the model for a library, for sharing."""
    target, states = path.with_name(EXPORTED[library]), path.with_name(TIMM_CONFIG)
    checkpoint, then = load_checkpoint(path), "--evaluate checks it"
    config = timm_config(checkpoint)
    if not overwrite:
        ours = json.loads(json.dumps(config))
        of_others = library in NAMES and states.exists() and read_json(states) != ours
        if of_others or target.exists():
            raise UserError(f"{states if of_others else target} exists; --overwrite replaces it")
    try:
        if library == "onnx":
            write_whole(target, onnx_bytes(path))
            mean, std = checkpoint.preprocessing.mean, checkpoint.preprocessing.std
            then = f"it takes any number of images, of mean {mean} and std {std}"
        elif library:
            write_torch(target, state_dict_for(library, checkpoint))
            write_json(states, config)
            then = f"{library} loads it strictly; {TIMM_CONFIG} beside it states what it does not"
        else:
            save_model(target, checkpoint)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB; {then}")
    if library == "timm":
        arguments = config["model_args"] | {"num_classes": config["num_classes"]}
        listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        print(
            f"timm.create_model({config['architecture']!r}, {listed}, checkpoint_path='{target}')"
        )
