"""Weights to start from: checkpoints of this repository and weights of other libraries.

Other libraries' ViTs are this model under other names, which tables translate. What has no place
here (registers, rotary positions, ...) is refused by name; what only their code shows (another
activation, norms elsewhere) by comparing logits, where the model is at hand. No published file was
downloaded to test this; the tests compare logits with the libraries' models at random weights.
"""

import math
import re
import statistics
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from checkpoint import (
    as_checkpoint,
    check_numbers,
    check_weights,
)
from data import Preprocessing
from utils import ROOT, UserError, first_line, named_path, one_line
from ViT import MODELS, ViT, ViTConfig
from weight_files import STATE_DICT, read_json, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Their name of a part of a weight's name, and ours. The first two tables also lead back.
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
OTHERS = (  # of transformers, in its files and modules, and of Google's .npz
    (r"^embeddings\.patch_embeddings\.projection\.|^embedding/", "embed.proj."),
    (r"^embeddings\.cls_token|^cls$", "embed.cls_token"),
    (r"^embeddings\.(mask_token|position_ids)$", r"\1"),
    (r"^embeddings\.position_embeddings|^(\w+/posembed_input/)?pos_embedding", "embed.pos_embed"),
    (r"^encoder\.layer\.|^layers\.|^Transformer/encoderblock_", "blocks."),
    (r"\.layernorm_before\.|/LayerNorm_0/", ".norm1."),
    (r"\.layernorm_after\.|/LayerNorm_[12]/", ".norm2."),
    (r"\.attention(\.attention)?\.|/MultiHeadDotProductAttention_[01]/", ".attn."),
    (r"\.attn\.(output\.dense\.|o_proj\.|out/)", ".attn.proj."),
    (r"\.intermediate\.dense\.|/MlpBlock_[03]/Dense_0/", ".mlp.fc1."),
    (r"\.output\.dense\.|/MlpBlock_[03]/Dense_1/", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.|^Transformer/encoder_norm/", "norm."),
    (r"^classifier\.|^head/", "head."),
    (r"[/.](kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
LIBRARIES = {  # by the weight of the patches
    "patch_embed.proj.weight": TIMM,
    "conv_proj.weight": (*OLDER_TORCHVISION, *TORCHVISION),
    "embeddings.patch_embeddings.projection.weight": OTHERS,
    "embedding/kernel": OTHERS,
}
CONTAINERS = (  # where training scripts put a state dict; of several, timm too takes an average
    *("state_dict_ema", "model_ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "net", "module"),
)
REFUSED = {  # and why; other names that this model does not have are listed
    r"relative_position|rel_pos": "relative positions",
    r"rope\b|freqs|rotary|periods": "rotary positions",
    r"reg_token|register_token": "register tokens",
    r"\.[qk]_norm\.": "a norm of queries and keys",
    r"dist_token|head_dist|distillation_token": "a distillation token",
    r"norm_pre|pre_layer_?norm": "a norm before the blocks",
    r"\.(attns|ffns)\.": "parallel blocks",
    r"\.w12\.|\.weights_in\.|\.fc1_[gx]\.": "a gated MLP (SwiGLU)",
    r"attn_pool|MAPHead": "attention pooling",
    r"\.gamma_[12]$": "layer scale under the name of models with rotary positions, which a file "
    "does not show (DeiT III: name the model, timm:deit3_...)",
}
LARGEST_DIFFERENCE = 1e-4  # between logits, as a share of the largest; rounding makes 1e-6
HEAD = r"(heads?|classifier|fc|pre_logits|pooler)\."
NOT_NEEDED = r"(mask_token|position_ids)$|decoder"  # of pretraining, or numbers of positions
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
    notes: tuple[str, ...] = ()  # what was left out, and what was assumed

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
        return "; ".join([f"weights of {self.origin}: {', '.join(['loaded', *done])}", *self.notes])

    def for_channels(self, channels: int) -> "Pretrained":
        """The same for images of as many channels, as timm adapts them.

        The weights of all channels are added for one channel; otherwise they are repeated, and
        scaled so that the sum stays.
        """
        config, before = self.config, self.config.channels
        if channels == before:
            return self
        kernel = self.weights["embed.proj.weight"].unflatten(1, (before, -1))  # (D, C, P P)
        if channels == 1:
            kernel = kernel.sum(dim=1, keepdim=True)
        else:
            kernel = kernel.repeat(1, math.ceil(channels / before), 1)[:, :channels]
            kernel = kernel * before / channels
        stated = self.preprocessing
        mean, std = (_of_channels(each, channels) for each in (stated.mean, stated.std))
        return replace(
            self,
            config=replace(config, channels=channels),
            weights=self.weights | {"embed.proj.weight": kernel.flatten(1)},
            preprocessing=replace(stated, mean=mean, std=std),
            notes=(f"weights of {before} channels adapted to {channels}", *self.notes),
        )


def _of_channels(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number for each channel; their mean, where there are other channels."""
    return numbers if len(numbers) == channels else (statistics.fmean(numbers),) * channels


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions (1, T, D) for another grid of patches, by bicubic interpolation as in timm.

    The position of a class token, the first, stays.
    """
    first = positions.shape[1] - old[0] * old[1]
    grid = positions[:, first:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, H/P, W/P)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :first], grid.flatten(2).mT], dim=1)


# ---------------------------------------------------------------------------- reading


def load_pretrained(
    origin: str,
    heads: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop: float | None = None,
) -> Pretrained:
    """Weights by their origin.

    Args:
        origin: a checkpoint of this repository or a run's folder; a state dict of timm, torchvision
            or transformers (.pth, .bin, .safetensors), or a folder of it; Google's .npz;
            "timm:NAME"; or "torchvision:NAME[:WEIGHTS]".
        heads: attention heads. A config.json beside a file states them, a state dict does not: then
            they are those of the named sizes, else D / 64, and the notes say so.
        mean, std, crop: what the model expects of images (`Preprocessing`), likewise.

    Raises:
        UserError: they cannot be had, or are not of a model of this kind.
    """
    given = {"asked_heads": heads, "mean": mean, "std": std, "crop": crop}
    given = {name: value for name, value in given.items() if value is not None}
    library, _, name = origin.partition(":")
    if library == "timm" and name:
        return _from_timm(origin, name, given)
    if library == "torchvision" and name:
        return _from_torchvision(origin, given, *name.split(":")[:2])
    path = named_path(origin)
    path = path if path.exists() else named_path(ROOT / path)
    content = read_weights(path)
    if isinstance(content, dict) and "format" in content:  # a checkpoint of ours
        found = as_checkpoint(path, content)
        weights = {name: weight.float() for name, weight in found.weights.items()}
        expected = _expected(found.model.channels, vars(found.preprocessing) | given)
        return Pretrained(origin, found.model, weights, expected, tuple(found.classes))
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "architecture" in config and path.is_dir() and find_spec("timm"):  # to compare with
        return _from_timm(origin, f"local-dir:{path}", given)
    return from_state_dict(*_state_dict_in(origin, content), _stated_in(config, folder) | given)


def _state_dict_in(origin: str, content: Any) -> tuple[str, dict[str, Tensor]]:
    """The state dict in what a file holds; and the origin, with its place where there are more."""
    while inner := [
        name
        for name in CONTAINERS
        if isinstance(content, dict) and isinstance(content.get(name), dict)
    ]:
        origin += f" ({inner[0]} of {', '.join(inner)})" if len(inner) > 1 else ""
        content = content[inner[0]]
    if "_modules" in getattr(content, "__dict__", ()):
        raise UserError(f"{origin} is a whole pickled model; {STATE_DICT}")
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in content.items()
    ):
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{origin} holds no state dict, but: {held}"[:300])
    return origin, dict(content)


def from_state_dict(
    origin: str, weights: dict[str, Tensor], stated: dict[str, Any] | None = None
) -> Pretrained:
    """A state dict of another library's ViT, recognized by its names.

    What is not `stated` (heads, size, mean, std, interpolation, crop, classes; plain: that nothing
    but the names differs from this model) is assumed as most models of the library have it;
    `asked_heads` counts where neither it nor the weights state heads.

    Raises:
        UserError: they are not of a model of this kind.
    """
    try:
        return _translated(origin, weights, stated or {})
    except KeyError as error:
        raise UserError(f"{origin} has no weight for {error}") from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error)[:300]
        raise UserError(f"{origin} has weights of other shapes than a ViT: {reason}") from error


def _translated(origin: str, weights: dict[str, Tensor], stated: dict[str, Any]) -> Pretrained:
    stated = {name: value for name, value in stated.items() if value}
    library, ours = _renamed(weights)  # by the name of the weight of its patches
    if library == "embedding/kernel":
        stated |= {"heads": ours["blocks.0.attn.query.weight"].shape[1]}
        ours = {name: _transposed(name, weight) for name, weight in ours.items()}
    if "asked_heads" in stated:
        stated.setdefault("heads", stated["asked_heads"])
    left_out = [name for name in ours if re.match(NOT_NEEDED, name)]
    left_out += _parts_of_another_head(ours)
    ours = {name: weight for name, weight in ours.items() if name not in left_out}
    check_numbers(ours)
    ours = {name: weight.float() for name, weight in ours.items()}
    _join_queries_keys_values(ours)
    _fold_layer_scale(ours)
    config = _config_of(ours, stated, any("fc_norm." in name for name in weights))
    kernel, positions = ours["embed.proj.weight"], ours["embed.pos_embed"]
    missing = config.tokens - positions.shape[1]  # timm can leave out the class's
    ours["embed.proj.weight"] = kernel.flatten(1)  # (D, C, P, P) to (D, C P P)
    ours["embed.pos_embed"] = F.pad(positions, (0, 0, missing, 0))
    classes = stated.get("classes") if "head.weight" in ours else None
    ours.setdefault("head.weight", torch.zeros(1, config.width))
    ours.setdefault("head.bias", torch.zeros(config.classes))
    check_weights(config, ours)
    usual = {"size": config.image_size, "mean": (0.5,), "std": (0.5,), "crop": 0.9}
    if library == "conv_proj.weight":
        usual = usual | {"crop": 224 / 256, "interpolation": "bilinear"}
        usual["mean"] = _of_channels(IMAGENET_MEAN, config.channels)
        usual["std"] = _of_channels(IMAGENET_STD, config.channels)
    expected = _expected(config.channels, usual | stated | {"size": config.image_size})
    left_out = dict.fromkeys(name.partition(".")[0] for name in left_out)
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    if assumed := _assumed(config, expected, stated):
        notes.append(f"assumed: {assumed} (--heads, --mean, --std, --crop)")
    if classes and len(classes) != config.classes:
        raise UserError(f"it has {config.classes} classes, but {len(classes)} names of classes")
    return Pretrained(origin, config, ours, expected, classes, tuple(notes))


def _renamed(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The names of a library, and weights with ours where there is one, without their prefix."""
    for pattern, what in REFUSED.items():
        if any(re.search(pattern, name) for name in weights):
            raise UserError(f"it has {what}, which this model does not")
    found = [
        (name.removesuffix(patches), patches)
        for name in weights
        for patches in LIBRARIES
        if re.search(rf"(^|[./]){patches}$", name)
    ]
    if not found:
        names = ", ".join(weights) or "no weights"
        raise UserError(
            f"it is no ViT of timm, torchvision, transformers or Google, but has {names}"[:300]
        )
    if len(found) > 1:
        prefixes = ", ".join(repr(prefix) for prefix, _ in found)
        raise UserError(f"it holds several models, {prefixes}; save the weights of one of them")
    ((prefix, library),) = found
    pairs = LIBRARIES[library]
    ours = {renamed(name.removeprefix(prefix), pairs): each for name, each in weights.items()}
    if len(ours) < len(weights):
        raise UserError("it has several weights of one name, or two last norms")
    return library, ours


def renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = re.sub(old, new, name) if pairs is OTHERS else name.replace(old, new)
    return name


def _parts_of_another_head(weights: dict[str, Tensor]) -> list[str]:
    """The weights of a head, unless it is one linear layer on the pooled token."""
    head = [name for name in weights if re.match(HEAD, name)]
    plain = {"head.weight"} <= set(head) <= {"head.weight", "head.bias"}
    if plain and weights["head.weight"].shape[1:] == weights["norm.weight"].shape:
        return []
    return head


def _transposed(name: str, weight: Tensor) -> Tensor:
    """A weight as torch has it: flax has inputs first, and heads in a dimension of their own."""
    if weight.ndim == 4:
        return weight.permute(3, 2, 0, 1)  # (P, P, C, D) to (D, C, P, P)
    if ".attn." in name and name.endswith("bias"):
        return weight.flatten()  # (h, D_h) to (D,)
    if ".attn." in name:
        weight = weight.flatten(0, 1) if ".proj." in name else weight.flatten(1)
    return weight.mT if weight.ndim == 2 else weight


def _join_queries_keys_values(weights: dict[str, Tensor]) -> None:
    for three in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        for name in [name for name in weights if f".attn.{three[0]}." in name]:
            parts = [weights.pop(name.replace(three[0], each)) for each in three]
            weights[name.replace(three[0], "qkv")] = torch.cat(parts)


def _fold_layer_scale(weights: dict[str, Tensor]) -> None:
    """Layer scale multiplies what a branch's last linear layer gives: so do that layer's rows."""
    for name in [name for name in weights if re.search(r"\.ls[12]\.gamma$", name)]:
        block, which, _ = name.rsplit(".", 2)
        layer = f"{block}.attn.proj" if which == "ls1" else f"{block}.mlp.fc2"
        gamma = weights.pop(name)  # (D,)
        weights[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
        weights[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]


def _config_of(weights: dict[str, Tensor], stated: dict[str, Any], pools_mean: bool) -> ViTConfig:
    """The config of weights in this model's names."""
    kernel = weights["embed.proj.weight"]
    if kernel.ndim != 4:
        raise UserError(f"its patches go through {tuple(kernel.shape)}, not (D, C, P, P)")
    D, channels, P, _ = kernel.shape
    has_class = "embed.cls_token" in weights
    if has_class and pools_mean:
        raise UserError("it has a class token and mean pooling; this model has one of them")
    if not has_class and not pools_mean:
        raise UserError("it pools tokens after the last norm; this model does so before it")
    tokens, hidden = weights["embed.pos_embed"].shape[1], len(weights["blocks.0.mlp.fc1.weight"])
    if weights["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden:
        raise UserError("it has a gated MLP (SwiGLU), which this model does not")
    H, W = stated.get("size") or (0, 0)
    grids = [(H // P, W // P), *((math.isqrt(n),) * 2 for n in (tokens - has_class, tokens))]
    # timm can have no position for the class token.
    fitting = [grid for grid in grids if math.prod(grid) in (tokens - has_class, tokens)]
    if not fitting:
        raise UserError(
            "it is not of square images, and no config.json beside it states their size"
        )
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known = [m["heads"] for m in MODELS.values() if (m["width"], m["depth"]) == (D, depth)]
    return ViTConfig(
        image_size=(fitting[0][0] * P, fitting[0][1] * P),
        patch_size=P,
        channels=channels,
        classes=len(weights.get("head.weight", [0])),
        width=D,
        depth=depth,
        heads=stated.get("heads") or (known[0] if known else max(1, D // 64)),
        mlp_ratio=hidden / D,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        pooling="class" if has_class else "mean",
    )


def _expected(channels: int, stated: dict[str, Any]) -> Preprocessing:
    fields = {name: stated[name] for name in Preprocessing.fields() if name in stated}
    for name in ("mean", "std"):
        if len(fields[name]) not in (1, channels):
            raise UserError(f"{name} {fields[name]} must be one number, or {channels}")
        fields[name] = _of_channels(fields[name], channels)
    return Preprocessing(**fields)


def _assumed(config: ViTConfig, expected: Preprocessing, stated: dict[str, Any]) -> str:
    """What neither weights nor a config state, and how to state it."""
    mean, std = (
        ",".join(f"{x:g}" for x in dict.fromkeys(each)) for each in (expected.mean, expected.std)
    )
    values = {
        "heads": f"{config.heads} heads",
        "mean": f"mean {mean}",
        "std": f"std {std}",
        "crop": f"crop {expected.crop:g}",
        "interpolation": f"{expected.interpolation} resizing",
        "plain": "GELU, norms first",
    }
    assumed = ", ".join(value for name, value in values.items() if name not in stated)
    return assumed.replace("mean 0.5, std 0.5", "mean and std 0.5")


# ---------------------------------------------------------------------------- what libraries state


def _stated_in(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the config.json beside weights states of them, if it is timm's or transformers'."""
    try:
        if "architecture" in config:
            return _stated_by_timm(config)
        return _stated_by_transformers(config, folder) if "model_type" in config else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {one_line(error)[:300]}") from error


def _stated_by_timm(config: dict[str, Any]) -> dict[str, Any]:
    """What timm's config.json, or its `pretrained_cfg` alone, states."""
    expected = config.get("pretrained_cfg", config)
    names = config.get("label_names") or expected.get("label_names") or ()
    stated = {
        "heads": (config.get("model_args") or {}).get("num_heads"),
        "size": tuple(expected.get("input_size") or ())[1:],
        "mean": tuple(expected.get("mean") or ()),
        "std": tuple(expected.get("std") or ()),
        "crop": expected.get("crop_pct"),
        "interpolation": expected.get("interpolation"),
        "classes": tuple(names.values() if isinstance(names, dict) else names),
    }
    if stated["interpolation"] not in ("bicubic", "bilinear"):  # "random": of training
        del stated["interpolation"]
    return stated


def _stated_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    if (activation := config.get("hidden_act")) != "gelu":
        raise UserError(f"its hidden_act {activation!r} is not this model's, 'gelu'")
    stated: dict[str, Any] = {"heads": config.get("num_attention_heads"), "plain": True}
    size = config.get("image_size", ())
    stated["size"] = (size, size) if isinstance(size, int) else tuple(size)
    names = tuple((config.get("id2label") or {}).values())
    if not any(name.startswith("LABEL_") for name in names):  # which are none
        stated["classes"] = names or None
    if not (folder / "preprocessor_config.json").is_file():
        return stated
    images = read_json(folder / "preprocessor_config.json")
    stated |= {"mean": tuple(images["image_mean"]), "std": tuple(images["image_std"])}
    stated["interpolation"] = "bilinear" if images.get("resample") == 2 else "bicubic"
    stated["crop"] = 1.0
    if images.get("do_center_crop"):
        stated["crop"] = images["crop_size"]["height"] / images["size"]["shortest_edge"]
    return stated


def _from_timm(origin: str, name: str, given: dict[str, Any]) -> Pretrained:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{origin} needs timm: pip install timm") from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the hub, or of a name that it does not know
        raise UserError(f"cannot load {origin}: {first_line(error)}") from error
    return _of_model(origin, model, _stated_by_timm(dict(model.pretrained_cfg)) | given)


def _from_torchvision(
    origin: str, given: dict[str, Any], name: str, weights: str = "DEFAULT"
) -> Pretrained:
    try:
        chosen = torchvision.models.get_model_weights(name)[weights]
        model = torchvision.models.get_model(name, weights=chosen)
    except Exception as error:  # a name that it does not know, or a failed download
        raise UserError(f"cannot load {origin}: {first_line(error)}") from error
    steps = chosen.transforms()
    stated = {
        "size": (steps.crop_size[0],) * 2,
        "mean": tuple(steps.mean),
        "std": tuple(steps.std),
        "interpolation": steps.interpolation.value,
        "crop": steps.crop_size[0] / steps.resize_size[0],
        "classes": tuple(chosen.meta["categories"]),
    }
    return _of_model(origin, model, stated | given)


@torch.no_grad()
def _of_model(origin: str, theirs: nn.Module, stated: dict[str, Any]) -> Pretrained:
    """The weights of a library's model, refused if it gives other logits for a random picture."""
    heads = [module.num_heads for module in theirs.modules() if hasattr(module, "num_heads")]
    stated = stated | {"heads": heads[0] if heads else None, "plain": True}
    found = from_state_dict(origin, theirs.state_dict(), stated)
    with torch.device("meta"):
        ours = ViT(found.config)
    ours.load_state_dict(found.weights, assign=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, found.config.channels, *found.config.image_size, generator=generator)
    if not found.weights["head.weight"].any():  # a new head would hide what the rest computes
        ours.head = theirs.head = theirs.heads = nn.Identity()
    expected, logits = theirs.eval()(image), ours.eval()(image)
    difference = math.inf
    if expected.shape == logits.shape:
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{origin} computes something else with its weights than this model does: "
            f"the logits differ by {difference:.1g} of the largest"
        )
    return found
