"""Weights to start from: checkpoints of this repository, of torchvision and of timm; and back.

torchvision's and timm's ViT are this model under other names: two tables translate them. What has
no place here (layer scale, registers, ...) is refused by name. No published file was downloaded to
test this; the tests compare logits with both libraries' models at random weights.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from checkpoint import (
    EXPORTED,
    Checkpoint,
    as_checkpoint,
    check_weights,
    find_checkpoint,
    load_checkpoint,
    read_torch,
    save_model,
)
from data import Preprocessing
from utils import UserError, first_line, read_file, write_torch
from ViT import MODELS, ViT, ViTConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Their name of a part of a weight's name, and ours.
TIMM = (
    ("patch_embed.", "embed."),
    ("cls_token", "embed.cls_token"),
    ("pos_embed", "embed.pos_embed"),
    ("fc_norm.", "norm."),  # of a model with mean pooling
)
TORCHVISION = (
    ("conv_proj.", "embed.proj."),
    ("class_token", "embed.cls_token"),
    ("encoder.pos_embedding", "embed.pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_2.", ".norm2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."),
)
OLDER_TORCHVISION = (("mlp.linear_1.", "mlp.0."), ("mlp.linear_2.", "mlp.3."))
REFUSED = {
    r"\.ls[12]\.|\.gamma_[12]$": "layer scale",
    r"reg_token": "register tokens",
    r"\.[qk]_norm\.": "a norm of queries and keys",
    r"dist_token|head_dist": "a distillation token",
    r"norm_pre": "a norm before the blocks",
    r"attn_pool": "attention pooling",
}
FREE = (  # fields of a model's config that its weights do not settle
    "image_size",
    "dropout",
    "attention_dropout",
    "drop_path",
    "attention",
    "checkpoint_activations",
)


@dataclass(frozen=True)
class Pretrained:
    """Weights in this model's names, and what they expect."""

    origin: str  # as the user named it
    config: ViTConfig
    weights: dict[str, Tensor]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # where they are known

    def adapted(self, wanted: ViTConfig, chosen: tuple[str, ...]) -> ViTConfig:
        """The config of these weights, with what they leave free from another.

        The fields of `wanted` that the user has `chosen` must not contradict the weights.
        """
        for name in chosen:
            asked, found = getattr(wanted, name), getattr(self.config, name)
            if name not in FREE and asked != found:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {asked} is not that of {self.origin}, {found}")
        free = [name for name in FREE if name != "image_size" or name in chosen]
        return replace(self.config, **{name: getattr(wanted, name) for name in free})

    def initialize(self, model: ViT, classes: tuple[str, ...]) -> str:
        """Gives a model these weights; returns what was done, in a line.

        Learned positions are interpolated to another grid (paper, 3.2). A head for other classes
        keeps its initial weights, which are zero.
        """
        weights, done = dict(self.weights), []
        config, old, new = model.config, self.config.grid, model.config.grid
        if old != new and config.positions == "learned":
            weights["embed.pos_embed"] = resize_positions(weights["embed.pos_embed"], old, new)
            done.append(f"positions interpolated from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
        if self.classes != tuple(classes):
            weights |= {f"head.{name}": weight for name, weight in model.head.state_dict().items()}
            done.append(f"a new head for {len(classes)} classes")
        model.load_state_dict(weights)
        return f"weights of {self.origin}: {', '.join(['loaded', *done])}"


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions (1, T, D) for another grid of patches, by bicubic interpolation as in timm.

    The position of a class token, the first, stays.
    """
    first = positions.shape[1] - old[0] * old[1]
    grid = positions[:, first:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, H/P, W/P)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :first], grid.flatten(2).mT], dim=1)


# ---------------------------------------------------------------------------- reading


def load_pretrained(origin: str, heads: int | None = None) -> Pretrained:
    """Weights by their origin.

    Args:
        origin: a checkpoint of this repository or a run's folder; a state dict of timm or
            torchvision (.pth, .bin, .safetensors); "timm:NAME"; or "torchvision:NAME[:WEIGHTS]".
        heads: attention heads, which a state dict does not tell; D / 64 where they are not given.

    Raises:
        UserError: they cannot be had, or are not of a model of this kind.
    """
    library, _, name = origin.partition(":")
    if library == "timm" and name:
        return _from_timm(origin, name)
    if library == "torchvision" and name:
        return _from_torchvision(origin, *name.split(":")[:2])
    path = find_checkpoint(origin)
    if path.suffix == ".safetensors":
        return from_state_dict(origin, _read_safetensors(path), heads)
    content = read_torch(path)
    if isinstance(content, dict) and "format" in content:  # a checkpoint of ours
        found = as_checkpoint(path, content)
        weights = {name: weight.float() for name, weight in found.weights.items()}
        return Pretrained(origin, found.model, weights, found.preprocessing, tuple(found.classes))
    for key in ("state_dict", "model"):  # where training scripts put it
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in content.items()
    ):
        raise UserError(f"{path} holds no state dict")
    return from_state_dict(origin, content, heads)


def from_state_dict(
    origin: str,
    weights: dict[str, Tensor],
    heads: int | None = None,
    preprocessing: Preprocessing | None = None,
    classes: tuple[str, ...] | None = None,
) -> Pretrained:
    """A state dict of timm's or torchvision's ViT, recognized by its names.

    Without a `preprocessing`, the weights are taken to expect what most of the library's do.
    """
    for pattern, what in REFUSED.items():
        if any(re.search(pattern, name) for name in weights):
            raise UserError(f"{origin} has {what}, which this model does not")
    of_timm = "patch_embed.proj.weight" in weights
    if not of_timm and "conv_proj.weight" not in weights:
        raise UserError(f"{origin} is no state dict of timm's or torchvision's ViT")
    pairs = TIMM if of_timm else (*OLDER_TORCHVISION, *TORCHVISION)
    ours = {_replaced(name, pairs): weight.float() for name, weight in weights.items()}
    try:
        config = _config_of(origin, ours, heads, "fc_norm.weight" in weights)
    except KeyError as error:
        raise UserError(f"{origin} has no weight for {error}") from error
    ours["embed.proj.weight"] = ours["embed.proj.weight"].flatten(1)  # (D, C, P, P) to (D, C P P)
    missing = config.tokens - ours["embed.pos_embed"].shape[1]  # timm can leave out the class's
    if missing < 0:
        raise UserError(f"{origin} is not of square images")
    ours["embed.pos_embed"] = F.pad(ours["embed.pos_embed"], (0, 0, missing, 0))
    if "head.weight" not in ours:
        ours |= {"head.weight": torch.zeros(1, config.width), "head.bias": torch.zeros(1)}
    try:
        check_weights(config, ours)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    if preprocessing is None:
        half = (0.5,) * config.channels
        usual = {"mean": half, "std": half, "crop": 0.9}
        if not of_timm:
            usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop": 224 / 256}
            usual["interpolation"] = "bilinear"
        preprocessing = Preprocessing(size=config.image_size, **usual)
    return Pretrained(origin, config, ours, preprocessing, classes)


def _config_of(
    origin: str, weights: dict[str, Tensor], heads: int | None, pools_mean: bool
) -> ViTConfig:
    """The config of weights in this model's names."""
    kernel, positions = weights["embed.proj.weight"], weights["embed.pos_embed"]
    D, channels, P, _ = kernel.shape
    has_class = "embed.cls_token" in weights
    if has_class and pools_mean:
        raise UserError(f"{origin} has a class token and mean pooling; this model has one of them")
    if not has_class and not pools_mean:
        raise UserError(f"{origin} pools tokens after the last norm; this model does so before it")
    tokens = positions.shape[1]
    side = math.isqrt(tokens - has_class)
    if side**2 != tokens - has_class:  # timm can have no position for the class token
        side = math.isqrt(tokens)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known = [m["heads"] for m in MODELS.values() if (m["width"], m["depth"]) == (D, depth)]
    return ViTConfig(
        image_size=side * P,
        patch_size=P,
        channels=channels,
        classes=len(weights.get("head.weight", [0])),
        width=D,
        depth=depth,
        heads=heads or (known[0] if known else max(1, D // 64)),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / D,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        pooling="class" if has_class else "mean",
    )


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from error
    content = read_file(path)
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} is not a file of safetensors, or is damaged") from error


def _from_timm(origin: str, name: str) -> Pretrained:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{origin} needs timm: pip install timm") from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the hub, or of a name that it does not know
        raise UserError(f"cannot load {origin}: {first_line(error)}") from error
    expected = model.pretrained_cfg
    preprocessing = Preprocessing(
        size=tuple(expected["input_size"][1:]),
        mean=tuple(expected["mean"]),
        std=tuple(expected["std"]),
        interpolation=expected["interpolation"],
        crop=float(expected["crop_pct"]),
    )
    blocks = getattr(model, "blocks", None)
    heads = blocks[0].attn.num_heads if blocks else None
    return from_state_dict(origin, model.state_dict(), heads, preprocessing)


def _from_torchvision(origin: str, name: str, weights: str = "DEFAULT") -> Pretrained:
    try:
        chosen = torchvision.models.get_model_weights(name)[weights]
        state = chosen.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # a name that it does not know, or a failed download
        raise UserError(f"cannot load {origin}: {first_line(error)}") from error
    steps = chosen.transforms()
    preprocessing = Preprocessing(
        size=(steps.crop_size[0],) * 2,
        mean=tuple(steps.mean),
        std=tuple(steps.std),
        interpolation=steps.interpolation.value,
        crop=steps.crop_size[0] / steps.resize_size[0],
    )
    return from_state_dict(origin, state, None, preprocessing, tuple(chosen.meta["categories"]))


# ---------------------------------------------------------------------------- writing


def state_dict_for(library: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint as timm's or torchvision's model loads them."""
    config = checkpoint.model
    if library == "torchvision":
        H, W = config.image_size
        for other, lacks in (
            ("mean pooling", config.pooling == "mean"),
            ("no biases of queries, keys and values", not config.qkv_bias),
            (f"{config.channels} channels", config.channels != 3),
            (f"images of {H}x{W}", H != W),
        ):
            if lacks:
                raise UserError(f"torchvision has no ViT with {other}; timm has")
    weights = dict(checkpoint.weights)
    shape = (config.width, config.channels, config.patch_size, config.patch_size)
    weights["embed.proj.weight"] = weights["embed.proj.weight"].reshape(shape)
    if "embed.pos_embed" not in weights:  # fixed ones, which are learned ones there
        weights["embed.pos_embed"] = ViT(config).embed.pos_embed
    pairs = TIMM if library == "timm" else TORCHVISION
    if config.pooling == "class":
        pairs = tuple(pair for pair in pairs if pair[0] != "fc_norm.")
    back = tuple((ours, theirs) for theirs, ours in reversed(pairs))
    return {_replaced(name, back): weight for name, weight in weights.items()}


def export(path: Path, library: str | None, overwrite: bool) -> None:
    """--export: writes model.pt beside a checkpoint, or a library's state dict, for sharing."""
    target = path.with_name(EXPORTED[library])
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it")
    checkpoint = load_checkpoint(path)
    try:
        if library:
            write_torch(target, state_dict_for(library, checkpoint))
        else:
            save_model(target, checkpoint)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    then = f"{library} loads it strictly" if library else "--evaluate checks it"
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB; {then}")
