"""The figures of visualization/vis.py: functions from arrays to a matplotlib Figure.

Maps over patches are (g_h, g_w) arrays, pictures uint8 (H, W, 3) or (H, W), both numpy. Patch maps
and small pictures are drawn with nearest-neighbor interpolation; only overlays are smoothed, and
their captions say so.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

import curves
from checkpoint import EpochRecord
from recipes import TrainConfig

ATTENTION = "inferno"  # color map of weights, which start at 0
SIGNED = "RdBu_r"  # color map of values of both signs; 0 is white
# Of attention weights times T, so that 1 is uniform attention: one scale for all figures of them.
RELATIVE = PowerNorm(0.5, 0, 10, clip=True)
MARK = "#00c2ff"  # the chosen patch: visible on dark, on light and on inferno
SMALLEST = 7  # points

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
    "pdf.fonttype": 42,  # text stays text in PDF and SVG
    "svg.fonttype": "none",
    "svg.hashsalt": "vit",  # the same figure gives the same file
}
styled = matplotlib.rc_context(STYLE)


@styled
def save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure in the format of the path's extension; the same figure, the same file."""
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    curves.write_figure(path, figure, dpi=dpi, metadata=undated.get(path.suffix))


# ---------------------------------------------------------------------------- parts of figures


def new_figure(width: float, height: float, title: str, caption: str = "") -> Figure:
    """A figure of a size in inches, with a title above and a caption below.

    The height is for a title of one line; what more lines and the caption need is added.
    """
    head = textwrap.wrap(title, round(width * 14))  # characters of 9 pt to the inch
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


def in_color(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) as (H, W, 3)."""
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)


def grayed(picture: np.ndarray) -> np.ndarray:
    """The luma of a picture (H, W, 3) or (H, W): (H, W)."""
    return picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])


def show_picture(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title)
    axes.set_axis_off()


def outline(axes: Axes, y: float, x: float, height: float = 1, width: float = 1) -> None:
    """A box with its upper left corner at (y, x)."""
    box = Rectangle(
        (x, y), width, height, fill=False, color=MARK, linewidth=1.2, clip_on=False, zorder=3
    )
    axes.add_patch(box)


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


def attention_bar(figure: Figure, axes: Any, **options: Any) -> None:
    """The color bar of `RELATIVE`."""
    bar = figure.colorbar(ScalarMappable(RELATIVE, ATTENTION), ax=axes, extend="max", **options)
    bar.set_ticks([0, 1, 3, 10])
    bar.set_label("weight relative to uniform")


# ---------------------------------------------------------------------------- one image


@styled
def patches(
    picture: np.ndarray,
    patches: Sequence[np.ndarray],
    grid: tuple[int, int],
    *,
    class_token: bool,
    title: str,
) -> Figure:
    """The picture with its patch grid, and the N patches in the order of their tokens."""
    (g_h, g_w), P, N = grid, len(patches[0]), len(patches)
    across = g_w if g_w >= 8 else max(8, round((2.5 * N) ** 0.5))
    down = -(-(N + class_token) // across)
    caption = (
        f"{by(g_h, g_w)} patches of {by(P, P)} pixels, row by row; each is flattened and mapped to "
        "one token. The numbers are token positions"
        + ("; cls is the learned class token, which shows no pixels." * class_token or ".")
    )
    cell, left_width = max(0.36, 4 / across), 2.2  # inches
    width = left_width + 0.3 + cell * across
    height = max(left_width, 1.5 / 1.15 * cell * down) + 0.4
    figure = new_figure(width, height, title, caption)
    left, right = figure.subplots(1, 2, width_ratios=(left_width, cell * across))
    show_picture(left, picture)
    for row in range(1, g_h):
        left.axhline(row * P - 0.5, color="white", linewidth=0.6)
    for column in range(1, g_w):
        left.axvline(column * P - 0.5, color="white", linewidth=0.6)

    for token in range(N + class_token):
        row, column = divmod(token, across)
        x, y = 1.15 * column, 1.5 * row
        if class_token and token == 0:
            box = Rectangle((x, y), 1, 1, facecolor="0.92", edgecolor="0.5", linewidth=0.6)
            right.add_patch(box)
            right.text(x + 0.5, y + 0.5, "cls", ha="center", va="center", fontsize=SMALLEST)
        else:
            pixels = patches[token - class_token]
            right.imshow(pixels, extent=(x, x + 1, y + 1, y), cmap="gray", vmin=0, vmax=255)
        number = token if class_token else token + 1
        right.text(x + 0.5, y + 1.05, number, ha="center", va="top", fontsize=SMALLEST)
    right.set(xlim=(-0.1, 1.15 * across), ylim=(1.5 * down, -0.1), aspect="equal")
    right.set_axis_off()
    return figure


@styled
def attention_maps(
    picture: np.ndarray,
    maps: np.ndarray,
    *,
    layers: Sequence[str],
    heads: Sequence[str],
    tokens: int,
    title: str,
    caption: str,
    query: tuple[int, int] | None = None,
) -> Figure:
    """Attention of one query: rows are layers, columns heads, the picture at the left.

    Args:
        maps: (layers, heads, g_h, g_w) attention weights.
        tokens: T, as uniform attention is 1 / T.
        query: row and column of the query patch, counted from 0, to outline it.
    """
    g_h, g_w = maps.shape[2:]
    cell = float(np.clip(7 / len(heads), 0.45, 1.1))
    width = 2.6 + cell * len(heads) * g_w / max(g_h, g_w)
    height = max(2.4, 0.4 + cell * len(layers) * g_h / max(g_h, g_w))
    figure = new_figure(width, height + 0.3, title, caption)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, width - 2.3))
    show_picture(left, picture)
    tiles(right, tokens * maps, layers, heads, cmap=ATTENTION, norm=RELATIVE)
    right.set(xlabel="head")
    attention_bar(figure, right, shrink=min(1.0, 2.2 / height), pad=0.02)
    if query:
        P_h, P_w = picture.shape[0] // g_h, picture.shape[1] // g_w
        outline(left, query[0] * P_h - 0.5, query[1] * P_w - 0.5, P_h, P_w)
        for r, c in np.ndindex(maps.shape[:2]):
            y, x = corner(maps, r, c)
            outline(right, y + query[0], x + query[1])
    return figure


@styled
def explanations(
    picture: np.ndarray,
    maps: dict[str, np.ndarray],
    *,
    classes: Sequence[str],
    title: str,
    caption: str,
) -> Figure:
    """Maps of several methods (columns) for several classes (rows) over the grayed picture.

    Each method has its own scale, from uniform, where it is transparent, to its maximum.

    Args:
        maps: for each method (classes, g_h, g_w), relative to uniform.
        classes: what to write beside each row.
    """
    width, rows = 1.32 * (len(maps) + 1) + 0.9, len(classes)
    height = 1.32 * rows * picture.shape[0] / picture.shape[1] + 0.8
    figure = new_figure(width, height, title, caption)
    grid = figure.subplots(rows, len(maps) + 1, squeeze=False)
    gray = grayed(picture)
    H, W = gray.shape
    for row, name in enumerate(classes):
        show_picture(grid[row, 0], picture)
        grid[row, 0].text(
            -0.08, 0.5, name, rotation=90, ha="right", va="center", transform=grid[row, 0].transAxes
        )
        for axes, (method, values) in zip(grid[row, 1:], maps.items(), strict=True):
            highest = max(float(values.max()), 1 + 1e-6)  # of all classes
            head = f"{method}\nup to {highest:.1f}"
            show_picture(axes, gray, head if row == 0 else "")
            share = ((values[row] - 1) / (highest - 1)).clip(0, 1)  # 0 at uniform and below
            axes.imshow(
                share,
                cmap=ATTENTION,
                vmin=0,
                vmax=1,
                alpha=0.9 * share**0.5,
                interpolation="bicubic",
                extent=(-0.5, W - 0.5, H - 0.5, -0.5),
            )
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), ATTENTION), ax=grid, pad=0.02)
    bar.set_ticks([0, 1], labels=["1", "max"])
    bar.set_label("weight relative to uniform")
    return figure


@styled
def head_worth(lost: np.ndarray, pruned: np.ndarray, *, title: str, caption: str) -> Figure:
    """Points of accuracy lost without each head (L, h); accuracy without 0, 1, ... of them (%)."""
    figure = new_figure(7.4, 2.8, title, caption)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    most = max(float(np.abs(lost).max()), 1e-3)
    image = left.imshow(lost, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(lost):
        color = "white" if abs(value) > 0.6 * most else "black"
        style = {"ha": "center", "va": "center", "color": color, "fontsize": SMALLEST}
        left.text(column, row, f"{value:.1f}", **style)
    layers, heads = lost.shape
    left.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    left.set_xticklabels(range(1, heads + 1))
    left.set_yticklabels(range(1, layers + 1))
    figure.colorbar(image, ax=left, label="accuracy lost (points)")
    right.plot(range(len(pruned)), pruned, marker=".")
    right.set(xlabel="heads removed, least useful first", ylabel="accuracy (%)")
    right.set_ylim(bottom=0)
    return figure


@styled
def perturbation(
    curves: dict[str, np.ndarray],
    intervals: dict[str, tuple[float, float]],
    *,
    title: str,
    caption: str,
) -> Figure:
    """Deletion and insertion curves of several maps.

    Args:
        curves: for each map (2, n): the probability as patches go, and as they come.
        intervals: of each map's area under the deletion curve, for the legend.
    """
    figure = new_figure(7.4, 3.2, title, caption)
    axes = figure.subplots(1, 2, sharey=True)
    ordered = sorted(curves, key=lambda name: sum(intervals[name]))
    for name in ordered:
        n = curves[name].shape[1]
        low, high = intervals[name]
        style = {"marker": ".", "label": f"{name}: {low:.2f} to {high:.2f}"}
        if name.startswith("random"):
            style |= {"color": "0.6", "linestyle": "--"}
        axes[0].plot(np.arange(n) / n, curves[name][0], **style)
        axes[1].plot(
            np.arange(1, n + 1) / n,
            curves[name][1],
            color=axes[0].lines[-1].get_color(),
            marker=".",
            linestyle=axes[0].lines[-1].get_linestyle(),
        )
    axes[0].set(xlabel="patches removed, most important first", ylabel="probability of the class")
    axes[1].set(xlabel="patches present, most important first", ylim=(0, 1))
    for each in axes:
        each.xaxis.set_major_formatter(PercentFormatter(1))
        each.set_xlim(0, 1)
    legend = {"title": "area on the left, 95% interval", "title_fontsize": SMALLEST}
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="lower right", **legend)
    return figure


# ---------------------------------------------------------------------------- the model's weights


@styled
def filters(components: np.ndarray, singular_values: np.ndarray, *, title: str) -> Figure:
    """Principal components of the patch embedding (the paper's Fig. 7, left) and their variance.

    Args:
        components: (k, C, P, P) with C 3 (drawn in color) or any other (the mean over channels).
        singular_values: all of them, largest first.
    """
    share = singular_values**2 / max((singular_values**2).sum(), 1e-300)
    k, columns = len(components), 7
    rows = -(-k // columns)
    caption = (
        f"The first {k} principal components of the patch embedding's filters: the pixel patterns "
        "that tokens distinguish. Gray is 0; each has a scale of its own. Signs are "
        f"arbitrary. Together they explain {share[:k].sum():.1%} of the variance."
    )
    figure = new_figure(7.2, 0.6 * rows + 1.0, title, caption)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 2.4))
    if components.shape[1] == 3:
        colored = np.moveaxis(components, 1, -1)  # (k, P, P, 3)
    else:
        colored = np.repeat(components.mean(axis=1)[..., None], 3, axis=-1)
    sheet = np.ones((rows * columns, *colored.shape[1:]))  # the rest stays white
    sheet[:k] = 0.5 + 0.5 * colored / np.abs(colored).max(axis=(1, 2, 3), keepdims=True)
    tiles(left, sheet.reshape(rows, columns, *colored.shape[1:]), [], [])
    right.plot(range(1, len(share) + 1), 100 * share.cumsum(), color="0.2")
    right.axvline(k, color=MARK, linewidth=1, label="shown on the left")
    right.legend(loc="lower right")
    right.set(xlabel="component", ylabel="cumulative variance (%)", ylim=(0, 102))
    return figure


def similarity_scale(similarity: np.ndarray) -> dict[str, Any]:
    """How to draw cosines: from 0 where none is negative, else with white at 0."""
    if similarity.min() >= 0:
        return {"cmap": "viridis", "vmin": 0, "vmax": 1}
    return {"cmap": SIGNED, "vmin": -1, "vmax": 1}


@styled
def position_similarity(similarity: np.ndarray, *, title: str, caption: str) -> Figure:
    """Cosine similarity of position embeddings, one tile per patch (the paper's Fig. 7, center).

    Args:
        similarity: (g_h, g_w, g_h, g_w).
    """
    g_h, g_w = similarity.shape[:2]
    width = 5.4 * min(1, g_w / g_h) + 0.9
    height = 5.2 * min(1, g_h / g_w) + 0.7
    figure = new_figure(width, height, title, caption)
    axes = figure.subplots()
    image = tiles(
        axes,
        similarity,
        [str(row + 1) for row in range(g_h)],
        [str(column + 1) for column in range(g_w)],
        **similarity_scale(similarity),
    )
    axes.set(xlabel="patch column", ylabel="patch row")
    figure.colorbar(image, ax=axes, label="cosine similarity", pad=0.02)
    return figure


# ---------------------------------------------------------------------------- many images


@styled
def by_layer_and_head(
    panels: Sequence[tuple[np.ndarray, str, float]], *, title: str, caption: str
) -> Figure:
    """One dot per head and layer, and the mean over heads as a line (the paper's Fig. 7, right).

    Args:
        panels: values (L, h), already averaged over images; their label; their value for uniform
            attention, which a dashed line marks.
    """
    figure = new_figure(7.4, 2.7, title, caption)
    for axes, (values, label, uniform) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        layers = np.arange(1, len(values) + 1)
        for head in range(values.shape[1]):
            name = "one head" if head == 0 else None
            axes.plot(layers, values[:, head], "o", color="tab:blue", alpha=0.6, ms=4, label=name)
        axes.plot(layers, values.mean(axis=1), color="0.2", linewidth=1, label="mean over heads")
        axes.axhline(uniform, color="tab:orange", linestyle="--", lw=1, label="uniform")
        axes.set(xlabel="layer", ylabel=label, xticks=layers, xlim=(0.5, len(values) + 0.5))
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return figure


@styled
def token_norms(patches: np.ndarray, class_token: np.ndarray | None, *, title: str) -> Figure:
    """Norms of the tokens after each layer.

    Args:
        patches: (L + 1, n N), of all patch tokens of all n images.
        class_token: (L + 1, n), or None.
    """
    caption = (
        "Median over all patch tokens of all images; the shaded band holds the middle 90%, the "
        "dotted lines are the 99% quantile and the maximum. Layer 0 is the embedding. A few tokens "
        "of far larger norm would be the artifacts of Darcet et al. (arXiv 2309.16588)."
    )
    figure = new_figure(4.6, 3.2, title, caption)
    axes = figure.subplots()
    layers = range(len(patches))
    for values, name, color in ((patches, "patch", "tab:blue"), (class_token, "class", "0.2")):
        if values is not None:
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95), axis=1)
            axes.fill_between(layers, low, high, alpha=0.2, color=color, linewidth=0)
            axes.plot(layers, middle, marker=".", color=color, label=f"{name} tokens")
            for quantile in (0.99, 1):
                high = np.quantile(values, quantile, axis=1)
                axes.plot(layers, high, linestyle=":", linewidth=0.8, color=color)
    axes.set(xlabel="layer", ylabel="token norm |z|", xticks=layers)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return figure


@styled
def sheet(
    rows: dict[str, Sequence[np.ndarray]],
    *,
    names: Sequence[str],
    title: str,
    caption: str,
    wrong: Sequence[bool] = (),
    weights: bool = False,
) -> Figure:
    """Rows of pictures, with the label of each row at its left.

    Args:
        rows: for each label n pictures, or RGB arrays (h, w, 3) from 0 to 1.
        names: n, for the columns.
        wrong: n, whether a name is a wrong prediction, which is written in red.
        weights: whether to add the color bar of `RELATIVE`.
    """
    H, W = next(iter(rows.values()))[0].shape[:2]
    cell, margin = 0.85, 1.1  # inches
    size = cell * len(names) + margin, 0.97 * cell * len(rows) * H / W + 0.6
    figure = new_figure(*size, title, caption)
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for line, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(in_color(picture))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation="horizontal", ha="right", va="center")
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name)
    for axes in grid[0][list(wrong)] if len(wrong) else ():
        axes.title.set_color("tab:red")
    if weights:
        attention_bar(figure, grid, pad=0.02, shrink=0.9)
    return figure


@styled
def layer_similarity(cka: np.ndarray, *, title: str, caption: str) -> Figure:
    """Linear CKA (L + 1, L + 1) between the representations after every two layers."""
    figure = new_figure(4.2, 3.6, title, caption)
    axes = figure.subplots()
    image = axes.imshow(cka, cmap="magma", vmin=0, vmax=1, origin="lower")
    ticks = range(0, len(cka), max(1, len(cka) // 12))
    axes.set(xlabel="layer", ylabel="layer", xticks=ticks, yticks=ticks)
    figure.colorbar(image, ax=axes, label="linear CKA", pad=0.02)
    return figure


@styled
def class_scatter(
    points: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    shares: np.ndarray,
    *,
    title: str,
    caption: str,
) -> Figure:
    """Images as points in the plane of the first two principal components, colored by class.

    Args:
        points: (n, 2).
        labels: (n,) true classes.
        shares: (2,), of the variance, of both axes.
    """
    figure = new_figure(5.2, 3.6, title, caption)
    axes = figure.subplots()
    markers, present = "os^vDP*Xph", np.unique(labels)
    for label in present:
        at = points[labels == label]
        # Beyond ten classes a color comes again, with another marker.
        axes.plot(
            at[:, 0], at[:, 1], markers[(label + label // 10) % len(markers)], ms=4, alpha=0.8,
            mew=0, color=matplotlib.colormaps["tab10"](label % 10), label=classes[label],
        )  # fmt: skip
    for set_label, axis in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
        set_label(f"principal component {axis + 1} ({shares[axis]:.0%} of the variance)")
    if len(present) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---------------------------------------------------------------------------- the run


@styled
def training_curves(history: list[EpochRecord], training: TrainConfig, *, title: str) -> Figure:
    """Loss, accuracy and learning rate against the epoch, as the trainer draws them."""
    figure = new_figure(10, 3.2, title)
    curves.draw_curves(figure, history, training)
    return figure


@styled
def confusion_matrix(counts: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """The predicted classes (columns) of each true class (rows), in percent of the row.

    Args:
        counts: (K, K).
    """
    K = len(counts)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    caption = "Rows sum to 100%. The diagonal is the accuracy of each class."
    side = float(np.clip(0.42 * K, 3, 12))
    figure = new_figure(side + 1.6, side + 1, title, caption)
    axes = figure.subplots()
    norm = PowerNorm(0.4, 0, 100)  # or the mistakes would all be black
    image = axes.imshow(share, cmap="magma", norm=norm)
    if K <= 20:
        for row, column in np.ndindex(K, K):
            value = share[row, column]
            axes.text(
                column, row, f"{value:.0f}" if round(value) else "·", ha="center", va="center",
                fontsize=SMALLEST, color="black" if norm(value) > 0.6 else "white",
            )  # fmt: skip
        axes.set_xticks(range(K), classes, rotation=45, ha="right")
        axes.set_yticks(range(K), classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8, pad=0.02)
    return figure


@styled
def contact_sheet(
    pictures: Sequence[np.ndarray], names: Sequence[str], *, title: str, caption: str
) -> Figure:
    """Pictures in rows of six, each with two lines of text above it."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    width = max(1.15 * columns, 4)
    figure = new_figure(width, 1.5 * rows + 0.4, title, caption)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, name in zip(grid.flat, pictures, names, strict=False):
        show_picture(axes, picture, name)
        axes.title.set_fontsize(SMALLEST)
    return figure


def wilson_interval(share: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95% intervals of shares of n images (Wilson, 1927)."""
    z2 = 1.96**2
    n = np.maximum(counts, 1)
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return center - half, center + half


@styled
def reliability(
    accuracy: np.ndarray, confidence: np.ndarray, counts: np.ndarray, *, error: float, title: str
) -> Figure:
    """Accuracy against confidence, and the number of images, of each bin (bins,).

    Args:
        error: the expected calibration error.
    """
    bins = len(counts)
    edges = np.linspace(0, 1, bins + 1)
    caption = (
        f"ECE {error:.2%}: the mean distance of the {bins} bins' dots from the diagonal, weighted "
        "by the images in each bin. Below the diagonal the model is overconfident. Bars: 95% "
        "Wilson intervals."
    )
    low, high = wilson_interval(accuracy, counts)
    filled = counts > 0
    figure = new_figure(3.8, 4.4, title, caption)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    x, y = confidence[filled], accuracy[filled]
    bars = np.stack([y - low[filled], high[filled] - y]).clip(min=0)
    above.errorbar(x, y, bars, fmt="o", ms=4, color="tab:blue", elinewidth=1, label="one bin")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left")
    below.bar(edges[:-1], counts, 1 / bins, align="edge", color="0.6")
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    for axis in (above.xaxis, above.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure
