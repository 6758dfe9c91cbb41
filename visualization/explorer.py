"""explorer.html with a model in it: the page that computes the model itself, in a browser."""

import base64
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from model import Model, Subject
from style import ATTENTION, NotApplicable, to_picture
from ViT import parameters_of

LARGEST_IN_PAGE = 10_000_000  # weights


@dataclass
class Page:
    """A self-contained HTML page, and numbers for the manifest."""

    html: str
    numbers: dict[str, Any]


def explorer(model: Model, subjects: list[Subject]) -> Page:
    """The model in one page: its weights in half precision, and some images."""
    config, preprocessing = model.config, model.checkpoint.preprocessing
    if (count := parameters_of(model.vit)) > LARGEST_IN_PAGE:
        raise NotApplicable(f"{count:,} weights are too many for a page, {LARGEST_IN_PAGE:,}")
    if config.channels not in (1, 3):
        raise NotApplicable(f"a page shows images of 1 or 3 channels, not {config.channels}")
    weights = model.vit.state_dict() | {"embed.pos_embed": model.vit.embed.pos_embed}
    halves = [weight.detach().cpu().half().numpy().astype("<f2") for weight in weights.values()]
    colors = matplotlib.colormaps.get_cmap(ATTENTION)(np.linspace(0, 1, 256))
    content = {
        "about": f"{model.run}: {config.depth} layers, {config.heads} heads, {count:,} weights. "
        "This page computes the model for each picture, in your browser.",
        "model": asdict(config),
        "grid": config.grid,
        **{name: getattr(preprocessing, name) for name in ("mean", "std", "interpolation", "crop")},
        "classes": model.classes,
        "layout": [(name, weight.shape) for name, weight in weights.items()],
        "weights": base64_of(b"".join(half.tobytes() for half in halves)),
        "colors": "".join(matplotlib.colors.to_hex(color)[1:] for color in colors),
        "images": [
            {"title": model.describe(each), "picture": png_of(to_picture(each.pixels))}
            for each in subjects
        ],
    }
    template = (Path(__file__).parent / "explorer.html").read_text()
    text = json.dumps(content).replace("</", "<\\/")  # a name must not end the script
    return Page(template.replace("@DATA@", text), {"images": [each.title for each in subjects]})


def base64_of(content: bytes | memoryview) -> str:
    return base64.b64encode(content).decode()


def png_of(picture: np.ndarray) -> str:
    """A picture as the address of an image."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "png")
    return "data:image/png;base64," + base64_of(png.getbuffer())
