"""What the figures share: their look and scales, and the parts that they are made of.

Maps over patches are (g_h, g_w) arrays, pictures uint8 (H, W, 3) or (H, W), both numpy. Patch maps
and small pictures are drawn with nearest-neighbor interpolation; only overlays are smoothed, and
their captions say so. Text is drawn literally, even a "$", unless math is asked for.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from curves import PLAIN, write_figure

# The colors of attention weights times T, so that 1 is uniform attention: one scale for all
# figures, from an eighth to eight times uniform, with white in the middle.
COLORS = "#1b0c42", "#5b3fa0", "#b9aee0", "#f7f7f7", "#ffa62b", "#f0501a", "#a01414"
ATTENTION = LinearSegmentedColormap.from_list("attention", COLORS)
RELATIVE = LogNorm(1 / 8, 8, clip=True)
WEIGHTS = {"cmap": ATTENTION, "norm": RELATIVE}
TICKS = {1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1", 2: "2", 4: "4", 8: "8"}
MARK = "#00c2ff"  # the chosen patch: visible on dark, on light and on each color of attention
SMALLEST = 7  # points
WIDEST = 7.4  # inches, of a figure: text of 7 points is then readable in a page of 830 pixels
IN_CELL = {"ha": "center", "va": "center", "fontsize": SMALLEST}  # a number in the cell of a map

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "legend.fontsize": SMALLEST,
    "legend.frameon": False,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
    "text.parse_math": False,  # in a class or file name, "$" is a letter
    "pdf.fonttype": 42,  # text stays text in PDF and SVG
    "svg.fonttype": "none",
    "svg.hashsalt": "vit",  # the same figure gives the same file
}
styled = matplotlib.rc_context(PLAIN | STYLE)  # decorates what draws or saves

QUERY_OF_CLASSIFIER = {  # in captions, by the model's pooling
    "class": "of the class token",
    "mean": "averaged over all query patches (mean pooling)",
}


class NotApplicable(Exception):
    """This figure is impossible for the model or its data; the message says why."""


@dataclass
class Picture:
    """A figure, the arrays it shows, and numbers for the manifest."""

    figure: Figure
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any] = field(default_factory=dict)


@styled
def save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure in the format of the path's extension, with the same bytes every time."""
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    write_figure(path, figure, dpi=dpi, metadata=undated.get(path.suffix))


def new_figure(width: float, height: float, title: str, caption: str = "") -> Figure:
    """A figure of a size in inches, with a title above and a caption below.

    The height assumes a title of one line; more is added for further lines and the caption.
    """
    head = textwrap.wrap(title, round(width * 14))  # characters of 9 pt per inch
    lines = textwrap.wrap(caption, round(width * 18))  # of 7 pt
    more = 0.15 * max(0, len(head) - 1) + 0.14 * len(lines)
    figure = Figure(figsize=(width, height + more), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    figure.suptitle("\n".join(head))
    if caption:
        style = {"ha": "left", "fontsize": SMALLEST, "color": "0.3"}
        figure.supxlabel("\n".join(lines), x=0.01, **style)
    return figure


def by(*lengths: int) -> str:
    """Lengths as a size, such as 4 x 4 with a multiplication sign."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, lengths))


# ---------------------------------------------------------------------------- pictures


def to_picture(pixels: Tensor) -> np.ndarray:
    """(C, H, W) uint8 to (H, W, 3), or, unless there are 3 channels, to their mean (H, W)."""
    if len(pixels) == 3:
        return pixels.permute(1, 2, 0).cpu().numpy()
    return pixels.float().mean(dim=0).round().byte().cpu().numpy()


def in_color(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) as (H, W, 3)."""
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)


def show_picture(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title)
    axes.set_axis_off()


# ---------------------------------------------------------------------------- maps


def signed(most: float) -> dict[str, Any]:
    """How to draw values of both signs, up to `most`: red above 0, blue below, 0 white."""
    return {"cmap": "RdBu_r", "vmin": -most, "vmax": most}


SIMILARITY = signed(1)  # the scale of cosines in all figures


def attention_bar(figure: Figure, axes: Any, **options: Any) -> None:
    """The color bar of `RELATIVE`."""
    bar = figure.colorbar(ScalarMappable(RELATIVE, ATTENTION), ax=axes, extend="both", **options)
    bar.set_ticks(list(TICKS), labels=list(TICKS.values()))
    bar.minorticks_off()
    bar.set_label("weight relative to uniform")


def overlay(axes: Axes, values: np.ndarray, box: tuple[float, float, float, float]) -> None:
    """A map of weights relative to uniform over a picture, in the colors of `RELATIVE`.

    Smooth between the patches' centers, where it has their values, and transparent at and below
    uniform.

    Args:
        box: x and y of the upper left and of the lower right corner, in the picture's pixels.
    """
    share = (2 * np.asarray(RELATIVE(values)) - 1).clip(0, 1)  # 0 at uniform, 1 at eight times
    x0, y0, x1, y1 = np.subtract(box, 0.5)  # imshow has the center of the first pixel at 0
    # matplotlib's "bicubic" is a B-spline, which dims a lone peak to 44%.
    smooth = {"interpolation": "hermite", "interpolation_stage": "data"}
    axes.autoscale(False)  # the picture may be larger
    axes.imshow(values, alpha=0.9 * share**0.4, extent=(x0, x1, y1, y0), **WEIGHTS, **smooth)


def outline(axes: Axes, y: float, x: float, height: float = 1, width: float = 1) -> None:
    """A box with its upper left corner at (y, x)."""
    style = {"fill": False, "color": MARK, "linewidth": 1.2, "clip_on": False, "zorder": 3}
    axes.add_patch(Rectangle((x, y), width, height, **style))


GAP = 0.12  # between the tiles of a sheet, in tiles


def tiles(
    axes: Axes, maps: np.ndarray, rows: Sequence[str], columns: Sequence[str], **style
) -> matplotlib.image.AxesImage:
    """Maps (R, C, h, w) as a sheet of R x C tiles with labels for rows and columns.

    A cell is 1 wide and high, so that `corner` gives the places of single cells.
    """
    h, w = maps.shape[2:4]
    for r, c in np.ndindex(maps.shape[:2]):
        y, x = corner(maps, r, c)
        image = axes.imshow(maps[r, c], extent=(x, x + w, y + h, y), **style)
    y, x = corner(maps, maps.shape[0], maps.shape[1])
    axes.set(xlim=(0, x - GAP * w), ylim=(y - GAP * h, 0))
    axes.set_yticks([corner(maps, r, 0)[0] + h / 2 for r in range(len(rows))], rows)
    axes.set_xticks([corner(maps, 0, c)[1] + w / 2 for c in range(len(columns))], columns)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return image


def corner(maps: np.ndarray, row: int, column: int) -> tuple[float, float]:
    """y and x of the upper left corner of a tile."""
    h, w = maps.shape[2:4]
    return row * h * (1 + GAP), column * w * (1 + GAP)
