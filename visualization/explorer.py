"""Puts a model into explorer.html: a page that computes the model itself, in a browser."""

import base64
import copy
import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from evaluation import predict
from model import Model, Subject
from style import ATTENTION, RELATIVE, TICKS, NotApplicable, to_picture
from ViT import parameters_of

LARGEST_IN_PAGE = 10_000_000  # weights
ROUNDING_IMAGES = 1500  # on which the effect of --int8 is measured


@dataclass
class Page:
    """A self-contained HTML page, and numbers for the manifest."""

    html: str
    numbers: dict[str, Any]


def explorer(model: Model, subjects: list[Subject]) -> Page:
    """The model in one page: its weights, in half precision or 8 bits, and some images."""
    config, preprocessing = model.config, model.checkpoint.preprocessing
    if (count := parameters_of(model.vit)) > LARGEST_IN_PAGE:
        raise NotApplicable(f"{count:,} weights are too many for a page, {LARGEST_IN_PAGE:,}")
    if config.channels not in (1, 3):
        raise NotApplicable(f"a page shows images of 1 or 3 channels, not {config.channels}")
    weights = model.vit.state_dict() | {"embed.pos_embed": model.vit.embed.pos_embed}
    weights = {name: weight.detach().cpu() for name, weight in weights.items()}
    int8 = {name for name, w in weights.items() if model.options.int8 and w.ndim == 2}
    packed = {name: pack(weight, name in int8) for name, weight in weights.items()}
    pictures = [to_picture(each.pixels).tobytes() for each in subjects]
    content = b"".join([stored for stored, _ in packed.values()] + pictures)
    precision, numbers = precision_of(model, {name: read for name, (_, read) in packed.items()})
    colors = ATTENTION(np.linspace(0, 1, 256))
    shown = {
        "about": f"{model.run}: {config.depth} layers, {config.heads} heads, {count:,} weights. "
        f"This page computes the model for each picture, in your browser. {precision}",
        "model": asdict(config),
        "grid": config.grid,
        **{name: getattr(preprocessing, name) for name in ("mean", "std", "interpolation", "crop")},
        "classes": model.classes,
        "layout": [(name, weight.shape, name in int8) for name, weight in weights.items()],
        "packed": base64.b64encode(gzip.compress(content, mtime=0)).decode(),
        "colors": "".join(matplotlib.colors.to_hex(color)[1:] for color in colors),
        "most": RELATIVE.vmax,
        "ticks": list(TICKS.values()),
        "titles": [model.describe(each) for each in subjects],
    }
    template = (Path(__file__).parent / "explorer.html").read_text()
    # A name must not end the script; nor must <!--<script> keep it from ending.
    text = json.dumps(shown).replace("<", "\\u003c")
    numbers |= {"images": [each.title for each in subjects]}
    return Page(template.replace("@DATA@", text), numbers)


def pack(weight: Tensor, int8: bool) -> tuple[bytes, Tensor]:
    """A weight as the page stores it, and as the page reads it back.

    With 8 bits, the rows are stored as integers from -127 to 127. The factors of all rows come
    first, in half precision, like all other weights.
    """
    if not int8:
        half = weight.half()
        return half.numpy().astype("<f2").tobytes(), half.float()
    factors = weight.abs().amax(dim=1, keepdim=True) / 127  # (m, 1)
    stored, factors = pack(factors.clamp(min=2**-24), int8=False)  # half's smallest above 0
    whole = (weight / factors).round().clamp(-127, 127).to(torch.int8)
    return stored + whole.numpy().tobytes(), whole * factors


def precision_of(model: Model, read: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """What the page says about its precision, and the numbers in that sentence.

    Args:
        read: the weights as the page reads them.
    """
    ours = model.vit.state_dict()
    if not model.options.int8:
        exact = all(torch.equal(weight.cpu(), read[name]) for name, weight in ours.items())
        how = "as they are in" if exact else "to which it rounds those of"
        return f"The weights are in half precision, {how} the checkpoint.", {}
    text = "The weights are rounded to 8 bits"
    if model.why_no_data:
        return f"{text}; what that changes was not measured: {model.why_no_data}.", {}
    rounded = copy.deepcopy(model.vit)
    rounded.load_state_dict({name: read[name] for name in ours})
    rows = model.sample(model.split, ROUNDING_IMAGES)
    exact, coarse = (
        predict(vit, model.split, model.checkpoint.preprocessing, rows).softmax(dim=1)
        for vit in (model.vit, rounded)
    )
    numbers = {
        "images_measured": len(rows),
        "largest_difference": (exact - coarse).abs().max().item(),
        "predictions_changed": int((exact.argmax(dim=1) != coarse.argmax(dim=1)).sum()),
    }
    return (
        f"{text}: on {len(rows):,} {model.of_split}, probabilities change by at most "
        f"{numbers['largest_difference']:.3f}, and {numbers['predictions_changed']} predictions.",
        numbers,
    )
