"""Weights to start from: checkpoints of this repository and weights of other libraries.

Other libraries' ViTs are this model under other names, which a table translates. Weights that
have no place here (registers, rotary positions, ...) are refused by name. What only their code
shows (another activation, norms elsewhere) is found by comparing logits, if it can be run.
"""

import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from checkpoint import as_checkpoint, check_weights
from data import Preprocessing
from utils import ROOT, UserError, first_line, named_path, one_line
from ViT import MODELS, ViT, ViTConfig
from weight_files import STATE_DICT, read_json, read_weights

# Their names and ours: for timm, torchvision, transformers (files and modules), Google's .npz.
PATCHES = r"(patch_embed\.proj|conv_proj|(embeddings\.)?patch_embeddings\.projection|embedding)[./]"
NAMES = (
    (r"^embeddings\.", ""),
    (rf"^{PATCHES}", "embed.proj."),
    (r"^(cls_token|class_token|cls)$", "embed.cls_token"),
    (
        r"^(encoder\.|\w+/posembed_input/)?(pos_embed|pos_embedding|position_embeddings)$",
        "embed.pos_embed",
    ),
    (r"^(encoder\.layers?\.(encoder_layer_)?|layers\.|Transformer/encoderblock_)", "blocks."),
    (r"(\.ln_1\.|\.layernorm_before\.|/LayerNorm_0/)", ".norm1."),
    (r"(\.ln_2\.|\.layernorm_after\.|/LayerNorm_[12]/)", ".norm2."),
    (r"(\.(self_)?attention(\.attention)?\.|/MultiHeadDotProductAttention_[01]/)", ".attn."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.(out_proj\.|output\.dense\.|o_proj\.|out/)", ".attn.proj."),
    (r"(\.mlp\.(0|linear_1)\.|\.intermediate\.dense\.|/MlpBlock_[03]/Dense_0/)", ".mlp.fc1."),
    (r"(\.mlp\.(3|linear_2)\.|\.output\.dense\.|/MlpBlock_[03]/Dense_1/)", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^(fc_norm\.|encoder\.ln\.|layernorm\.|Transformer/encoder_norm/)", "norm."),
    (r"^(heads\.head\.|classifier\.|head/)", "head."),
    (r"[/.](kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
CONTAINERS = (  # where training scripts put a state dict; like timm, an average is preferred
    *("state_dict_ema", "model_ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "net", "module"),
)
# What most models expect of images, used if nothing states it.
USUAL = {"mean": (0.5,), "std": (0.5,), "crop": 0.9, "interpolation": "bicubic"}
LARGEST_DIFFERENCE = 1e-4  # between logits, as a share of the largest; rounding gives 1e-6
HEAD = r"(heads?|classifier|fc|pre_logits|pooler)\."
NOT_NEEDED = r"(mask_token|position_ids)$|decoder"  # for pretraining, or position indices
FREE = (  # config fields that a model's weights do not determine
    "image_size",
    "dropout",
    "attention_dropout",
    "drop_path",
    "attention",
    "checkpoint_activations",
)


@dataclass(frozen=True)
class Pretrained:
    """Weights under this model's names, and what they expect of images."""

    origin: str  # as the user named it
    config: ViTConfig
    weights: dict[str, Tensor]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # if known
    notes: tuple[str, ...] = ()  # what was left out, and what was assumed

    def adapted(self, wanted: ViTConfig, chosen: dict[str, Any]) -> ViTConfig:
        """The config of these weights, with the fields that they leave free from `wanted`.

        The fields that the user has `chosen` must not contradict the weights.
        """
        for name, asked in chosen.items():
            if name not in FREE and asked != (found := getattr(self.config, name)):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {asked} is not that of {self.origin}, {found}")
        free = {name: getattr(wanted, name) for name in FREE if name != "image_size"}
        free |= {name: asked for name, asked in chosen.items() if name in FREE}
        return replace(self.config, **free)

    def initialize(self, model: ViT, classes: tuple[str, ...]) -> str:
        """Loads these weights into a model; returns a line that says what was done.

        Learned positions are interpolated to the model's grid (paper, 3.2). A head for other
        classes keeps its initial weights, which are zero.
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
        """These weights adapted to another number of channels, as timm does it.

        For one channel, the weights of all channels are summed; otherwise they are repeated,
        and scaled to keep the sum.
        """
        before = self.config.channels
        if channels == before:
            return self
        kernel = self.weights["embed.proj.weight"].unflatten(1, (before, -1))  # (D, C, P P)
        if channels == 1:
            kernel = kernel.sum(dim=1)
        else:
            repeated = kernel.repeat(1, math.ceil(channels / before), 1)[:, :channels]
            kernel = repeated.flatten(1) * before / channels
        stated = self.preprocessing
        mean, std = ((statistics.fmean(each),) * channels for each in (stated.mean, stated.std))
        return replace(
            self,
            config=replace(self.config, channels=channels),
            weights=self.weights | {"embed.proj.weight": kernel},
            preprocessing=replace(stated, mean=mean, std=std),
            notes=(f"weights of {before} channels adapted to {channels}", *self.notes),
        )


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions (1, T, D) for another grid of patches, by bicubic interpolation as in timm.

    The position of the class token, which comes first, stays.
    """
    first = positions.shape[1] - old[0] * old[1]
    grid = positions[:, first:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, H/P, W/P)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :first], grid.flatten(2).mT], dim=1)


# ---------------------------------------------------------------------------- reading


def load_pretrained(
    origin: str | Path,
    heads: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop: float | None = None,
) -> Pretrained:
    """Loads weights from their origin.

    Args:
        origin: a checkpoint of this repository or a run's folder; a state dict of timm, torchvision
            or transformers (.pth, .bin, .safetensors), or its folder; Google's .npz;
            "timm:NAME"; or "torchvision:NAME[:WEIGHTS]".
        heads: attention heads, if no config.json beside the file states them; by default those
            of the named sizes, else D / 64, and the notes say so.
        mean, std, crop: what the model expects of images, whatever is stated or assumed.

    Raises:
        UserError: the weights cannot be loaded, or are not those of such a ViT.
    """
    given = {"mean": mean, "std": std, "crop": crop}
    given = {name: value for name, value in given.items() if value is not None}
    library, _, name = (origin := str(origin)).partition(":")
    if library in ("timm", "torchvision") and name:
        return _from_library(origin, library, name, given)
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
    stated = _stated_in(config, folder) | given
    stated["heads"] = stated.get("heads") or heads
    return from_state_dict(*_state_dict_in(origin, content), stated)


def _state_dict_in(origin: str, content: Any) -> tuple[str, dict[str, Tensor]]:
    """The origin, with the key if the file has several state dicts, and the state dict."""
    if not isinstance(content, dict):
        raise UserError(f"{origin} holds no state dict, but: {type(content).__name__}")
    if inner := [name for name in CONTAINERS if isinstance(content.get(name), dict)]:
        origin += f" ({inner[0]} of {', '.join(inner)})" if len(inner) > 1 else ""
        return _state_dict_in(origin, content[inner[0]])
    if "_modules" in getattr(content, "__dict__", ()):
        raise UserError(f"{origin} is a whole pickled model; {STATE_DICT}")
    if not all(isinstance(weight, Tensor) for weight in content.values()):
        raise UserError(f"{origin} holds no state dict, but: {', '.join(map(str, content)):.200}")
    return origin, dict(content)


def from_state_dict(
    origin: str, weights: dict[str, Tensor], stated: dict[str, Any] | None = None
) -> Pretrained:
    """A state dict of another library's ViT, recognized by its names.

    What is not `stated` (heads, size, mean, std, crop, interpolation, classes, blocks: that they
    compute what ours do) is assumed to be as in most models of the library.

    Raises:
        UserError: the weights are not those of such a ViT.
    """
    stated = {name: value for name, value in (stated or {}).items() if value}
    try:
        return _translated(origin, weights, stated)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{origin} lacks a weight of a ViT, or its shape: {reason}") from error


def _translated(origin: str, weights: dict[str, Tensor], stated: dict[str, Any]) -> Pretrained:
    patches, ours = _renamed(weights)
    if patches == "embedding/":  # Google's
        stated = stated | {"heads": ours["blocks.0.attn.query.weight"].shape[1]}
        D = len(ours["norm.weight"])
        ours = {name: _transposed(weight, ".attn." in name, D) for name, weight in ours.items()}
    left_out = _left_out(ours)
    for name, weight in list(ours.items()):
        if name in left_out:
            del ours[name]
        elif weight.is_floating_point():
            ours[name] = weight.float()
    _join_queries_keys_values(ours)
    _fold_layer_scale(ours)
    config = _config_of(ours, stated, any("fc_norm." in name for name in weights))
    kernel, positions = ours["embed.proj.weight"], ours["embed.pos_embed"]
    missing = config.tokens - positions.shape[1]  # timm may lack the class token's
    ours["embed.proj.weight"] = kernel.flatten(1)  # (D, C, P, P) to (D, C P P)
    ours["embed.pos_embed"] = F.pad(positions, (0, 0, missing, 0))
    classes = stated.get("classes") if "head.weight" in ours else None
    ours.setdefault("head.weight", torch.zeros(1, config.width))
    ours.setdefault("head.bias", torch.zeros(config.classes))
    check_weights(config, ours)
    if classes and len(classes) != config.classes:
        raise UserError(f"it has {config.classes} classes, but {len(classes)} names of classes")
    usual = {"heads": config.heads, "blocks": "pre-norm with GELU", **USUAL}
    if patches == "conv_proj.":
        theirs = _stated_by_torchvision(torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1)
        usual |= {name: theirs[name] for name in USUAL}
    expected = _expected(config.channels, usual | stated | {"size": config.image_size})
    parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in left_out))
    notes = [f"left out: {parts}"] if parts else []
    assumed = [f"{name} {str(usual[name]).strip('(,)')}" for name in usual if name not in stated]
    if assumed:
        notes.append(f"assumed: {', '.join(assumed)} (--heads, --mean, --std, --crop)")
    return Pretrained(origin, config, ours, expected, classes, tuple(notes))


def _renamed(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Their name of the patch embedding, and the weights, under our names where they exist."""
    names = [re.fullmatch(rf"(.*?[./])??({PATCHES})(weight|kernel)", name) for name in weights]
    found = [match.groups("") for match in names if match]
    if len(found) != 1:
        raise UserError(
            f"it must hold one ViT of timm, torchvision, transformers or Google, not {len(found)}; "
            f"it has {', '.join(weights):.200}"
        )
    prefix, patches, *_ = found[0]
    ours = {}
    for name, weight in weights.items():
        name = name.removeprefix(prefix)
        for theirs, our in NAMES:
            name = re.sub(theirs, our, name)
        if name in ours:
            raise UserError(f"it has several weights that are {name} here")
        ours[name] = weight
    return patches, ours


def _left_out(weights: dict[str, Tensor]) -> list[str]:
    """Leftovers of pretraining, and a head that is not one linear layer on the pooled token.

    A head of one logit, whose softmax is always 1, was trained for a sigmoid or a number.
    """
    head = [name for name in weights if re.match(HEAD, name)]
    if {"head.weight"} <= set(head) <= {"head.weight", "head.bias"}:
        logits, *inputs = weights["head.weight"].shape
        if logits > 1 and inputs == [*weights["norm.weight"].shape]:
            head = []
    return [*head, *(name for name in weights if re.match(NOT_NEEDED, name))]


def _transposed(weight: Tensor, of_attention: bool, D: int) -> Tensor:
    """A weight in torch's layout: flax has inputs first, and heads in their own dimension."""
    if weight.ndim == 4:
        return weight.permute(3, 2, 0, 1)  # (P, P, C, D) to (D, C, P, P)
    if of_attention:
        weight = weight.reshape(D, -1).squeeze(1)  # (D, h, D_h), (h, D_h, D) or (h, D_h)
    return weight.mT if weight.ndim == 2 else weight


def _join_queries_keys_values(weights: dict[str, Tensor]) -> None:
    for three in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        for name in [name for name in weights if f".attn.{three[0]}." in name]:
            parts = [weights.pop(name.replace(three[0], each)) for each in three]
            weights[name.replace(three[0], "qkv")] = torch.cat(parts)


def _fold_layer_scale(weights: dict[str, Tensor]) -> None:
    """Folds layer scale, which multiplies a branch's output, into its last linear layer."""
    for name in [name for name in weights if re.search(r"\.ls[12]\.gamma$", name)]:
        block, which, _ = name.rsplit(".", 2)
        layer = f"{block}.attn.proj" if which == "ls1" else f"{block}.mlp.fc2"
        gamma = weights.pop(name)  # (D,)
        weights[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
        weights[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]


def _config_of(weights: dict[str, Tensor], stated: dict[str, Any], pools_mean: bool) -> ViTConfig:
    """The config of weights under this model's names."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    with torch.device("meta"):
        known = ViT(ViTConfig(depth=max(1, depth))).state_dict()
    unknown = dict.fromkeys(re.sub(r"\d+", "*", name) for name in weights if name not in known)
    if set(unknown) == {"blocks.*.gamma_*"}:
        raise UserError("it is DeiT III (name it, timm:deit3_...), or has rotary positions")
    if unknown:
        raise UserError(f"this model has no place for its {', '.join(unknown):.200}")
    D, channels, P, _ = weights["embed.proj.weight"].shape
    has_class = "embed.cls_token" in weights
    if has_class == pools_mean:
        raise UserError(
            "it must have either a class token or mean pooling before a last norm (fc_norm)"
        )
    tokens, hidden = weights["embed.pos_embed"].shape[1], len(weights["blocks.0.mlp.fc1.weight"])
    if weights["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden:
        raise UserError("it has a gated MLP (SwiGLU), which this model does not")
    H, W = stated.get("size") or (0, 0)
    patches = (tokens - has_class, tokens)  # timm may have no position for the class token
    grids = [(H // P, W // P), *((math.isqrt(n), math.isqrt(n)) for n in patches)]
    grid = next((each for each in grids if math.prod(each) in patches), None)
    if not grid:
        raise UserError("its images are not square, and no config.json beside it states their size")
    usual = [m["heads"] for m in MODELS.values() if (m["width"], m["depth"]) == (D, depth)]
    return ViTConfig(
        image_size=(grid[0] * P, grid[1] * P),
        patch_size=P,
        channels=channels,
        classes=len(weights.get("head.weight", [0])),
        width=D,
        depth=depth,
        heads=stated.get("heads") or (usual[0] if usual else max(1, D // 64)),
        mlp_ratio=hidden / D,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        pooling="class" if has_class else "mean",
    )


def _expected(channels: int, stated: dict[str, Any]) -> Preprocessing:
    fields = {name: stated[name] for name in Preprocessing.fields() if name in stated}
    for name in ("mean", "std"):
        if len(fields[name]) not in (1, 3, channels):
            raise UserError(f"{name} {fields[name]} must be one number, or {channels}")
        if len(fields[name]) != channels:
            fields[name] = (statistics.fmean(fields[name]),) * channels
    return Preprocessing(**fields)


# ---------------------------------------------------------------------------- what libraries state


def _stated_in(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the config.json beside weights says of them, if it is timm's or transformers'."""
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
    if stated["interpolation"] not in ("bicubic", "bilinear"):  # "random": for training
        del stated["interpolation"]
    return stated


def _stated_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    if (activation := config.get("hidden_act")) != "gelu":
        raise UserError(f"its hidden_act {activation!r} is not this model's, 'gelu'")
    size, names = config.get("image_size", ()), config.get("id2label") or {}
    stated = {
        "heads": config.get("num_attention_heads"),
        "blocks": True,
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "classes": tuple(names[number] for number in sorted(names, key=int)),  # "10" after "2"
    }
    if not (folder / "preprocessor_config.json").is_file():
        return stated
    images = read_json(folder / "preprocessor_config.json")
    stated |= {"mean": tuple(images["image_mean"]), "std": tuple(images["image_std"]), "crop": 1.0}
    stated["interpolation"] = "bilinear" if images.get("resample") == 2 else "bicubic"
    if images.get("do_center_crop"):
        stated["crop"] = images["crop_size"]["height"] / images["size"]["shortest_edge"]
    return stated


def _stated_by_torchvision(weights: torchvision.models.WeightsEnum) -> dict[str, Any]:
    steps = weights.transforms()
    return {
        "size": (steps.crop_size[0],) * 2,
        "mean": tuple(steps.mean),
        "std": tuple(steps.std),
        "interpolation": steps.interpolation.value,
        "crop": steps.crop_size[0] / steps.resize_size[0],
        "classes": tuple(weights.meta["categories"]),
    }


def _from_library(origin: str, library: str, name: str, given: dict[str, Any]) -> Pretrained:
    try:
        if library == "timm":
            import timm

            model = timm.create_model(name, pretrained=True)
            stated = _stated_by_timm(dict(model.pretrained_cfg))
        else:
            name, _, chosen = name.partition(":")
            weights = torchvision.models.get_model_weights(name)[chosen or "DEFAULT"]
            model = torchvision.models.get_model(name, weights=weights)
            stated = _stated_by_torchvision(weights)
    except ImportError as error:
        raise UserError(f"{origin} needs timm: pip install timm") from error
    except Exception as error:  # an unknown name, or a failed download
        raise UserError(f"cannot load {origin}: {first_line(error)}") from error
    return _of_model(origin, model, stated | given)


@torch.no_grad()
def _of_model(origin: str, theirs: nn.Module, stated: dict[str, Any]) -> Pretrained:
    """A library model's weights, refused if it gives a random image other logits than ours."""
    heads = [module.num_heads for module in theirs.modules() if hasattr(module, "num_heads")]
    stated = stated | {"heads": heads[0] if heads else None, "blocks": True}
    found = from_state_dict(origin, theirs.state_dict(), stated)
    with torch.device("meta"):
        ours = ViT(found.config)
    ours.load_state_dict(found.weights, assign=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, found.config.channels, *found.config.image_size, generator=generator)
    if not found.weights["head.weight"].any():  # a new head would hide what the rest computes
        ours.head = theirs.head = theirs.heads = nn.Identity()
    expected, logits = theirs.eval()(image), ours.eval()(image)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{origin} computes something else with its weights than this model does: "
            f"the logits differ by {difference:.1g} of the largest"
        )
    return found
