"""How a ViT works in ten steps, each drawn with the real values of one image in one model.

A step is drawn from a `Scene`; the decorator `step` turns it into a figure like all others.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from torch import Tensor

import explain
from base import GELU
from curves import shown
from explain import Walk
from model import Model, Subject
from style import (
    IN_CELL,
    MARK,
    SIMILARITY,
    SMALLEST,
    WEIGHTS,
    WIDEST,
    Picture,
    attention_bar,
    by,
    corner,
    in_color,
    new_figure,
    outline,
    show_picture,
    signed,
    tiles,
    to_picture,
)
from ViT import ViT, ViTConfig

CHANNELS = (("red", "tab:red"), ("green", "tab:green"), ("blue", "tab:blue"))
GRAY = (("values", "0.2"),)
MOST_TILES = 8  # heads or layers side by side
MOST_COLUMNS = 192  # of a matrix: each is then at least a pixel wide


class Scene(NamedTuple):
    """An image, what a model computes for it, and the patch, block and head that are shown."""

    vit: ViT
    picture: np.ndarray  # (H, W, 3) or (H, W) uint8
    walk: Walk  # on the CPU
    classes: list[str]
    patch: tuple[int, int]  # row and column, counted from 0
    block: int  # counted from 0, as is the head
    head: int

    @property
    def config(self) -> ViTConfig:
        return self.vit.config

    @property
    def number(self) -> int:
        """The chosen patch's row among the patches."""
        return self.patch[0] * self.config.grid[1] + self.patch[1]

    @property
    def token(self) -> int:
        """The chosen patch's row among the tokens."""
        return self.number + (self.config.pooling == "class")

    @property
    def where(self) -> str:
        return f"layer {self.block + 1}, head {self.head + 1}"

    @property
    def channels(self) -> tuple[tuple[str, str], ...]:
        """Name and color of each channel of the picture."""
        return CHANNELS if self.picture.ndim == 3 else GRAY

    def pieces(self) -> np.ndarray:
        """The picture cut up, in color: (g_h, g_w, P, P, 3)."""
        (g_h, g_w), P = self.config.grid, self.config.patch_size
        cut = in_color(self.picture).reshape(g_h, P, g_w, P, 3)
        return cut.swapaxes(1, 2)

    def best(self, count: int) -> np.ndarray:
        """The most probable classes, most probable first."""
        return np.argsort(-self.walk.lens[-1].numpy(), kind="stable")[:count]

    def of_patch(self, M: Tensor) -> np.ndarray:
        """The chosen patch's row of matrices (..., T, T), as maps (..., g_h, g_w)."""
        return explain.map_of(M, self.config, self.patch).numpy()


def scene_of(model: Model, subject: Subject) -> Scene:
    """Follows an image through a model.

    If the options name none, the patch and the block are the middle ones, and the head is that
    with the patch's largest attention weight.
    """
    options = model.options
    block = options.layer - 1 if isinstance(options.layer, int) else model.config.depth // 2
    walk = explain.walk(model.vit, model.normalize(subject.pixels[None])[0], block)
    walk = Walk(*(part.cpu() for part in walk))
    picture = to_picture(subject.pixels)
    scene = Scene(model.vit, picture, walk, model.classes, model.patch, block, head=0)
    if isinstance(options.head, int):
        return scene._replace(head=options.head - 1)
    highest = scene.of_patch(walk.attention[block]).max(axis=(1, 2))  # (h,)
    return scene._replace(head=int(highest.argmax()))


def step(*shown: str) -> Callable:
    """Turns a function that draws a `Scene` into one that draws a model and an image.

    Args:
        shown: the fields of the walk that it draws; they become the figure's arrays.
    """

    def figure_of(draw: Callable[[Scene], Figure]) -> Callable[[Model, Subject], Picture]:
        @wraps(draw)
        def drawn(model: Model, subject: Subject) -> Picture:
            scene = scene_of(model, subject)
            arrays = {name: getattr(scene.walk, name).numpy() for name in shown}
            return Picture(draw(scene), arrays)

        return drawn

    return figure_of


# ---------------------------------------------------------------------------- parts of the pictures


def _row(title: str, ratios: list[float], height: float, caption: str) -> tuple[Figure, list[Axes]]:
    """A figure of axes side by side."""
    figure = new_figure(WIDEST, height + 0.25, title, caption)
    return figure, list(figure.subplots(1, len(ratios), width_ratios=ratios))


def _sign(axes: Axes, text: str, size: float = 11) -> None:
    """Text in place of axes: an arrow, a sign or words."""
    axes.set_axis_off()
    style = {"ha": "center", "va": "center", "fontsize": size, "parse_math": True}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)


def _matrix(axes: Axes, values: np.ndarray, title: str, x: str, y: str = "") -> None:
    """Values (rows, columns) of both signs, white at 0, and the ends of their scale."""
    most = float(np.quantile(np.abs(values), 0.98)) or 1.0
    axes.imshow(values, aspect="auto", interpolation_stage="data", **signed(most))
    axes.set(xlabel=f"{x}, ±{most:.2g}", ylabel=y, xticks=[], yticks=[])
    axes.set_title(title, parse_math=True)


def _mark_row(axes: Axes, row: int) -> None:
    """Arrowheads at both ends of a row; a box around it would hide it."""
    style = {"transform": axes.get_yaxis_transform(), "clip_on": False, "color": MARK, "ms": 4}
    axes.plot(-0.02, row, marker=">", **style)
    axes.plot(1.02, row, marker="<", **style)
    axes.yaxis.labelpad = 9  # room for the one on the left


def _mark_in_picture(axes: Axes, scene: Scene) -> None:
    P = scene.config.patch_size
    outline(axes, scene.patch[0] * P - 0.5, scene.patch[1] * P - 0.5, P, P)


def _mark_in_map(axes: Axes, scene: Scene) -> None:
    outline(axes, scene.patch[0] - 0.5, scene.patch[1] - 0.5)


def _map(axes: Axes, values: np.ndarray, title: str, **style) -> None:
    """Values (g_h, g_w), one per patch."""
    axes.imshow(values, **style)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, parse_math=True)
    axes.spines[:].set_visible(False)


def _weights(axes: Axes, scene: Scene, values: np.ndarray, title: str) -> None:
    """Attention weights (g_h, g_w), one per patch, on the scale of all figures."""
    _map(axes, values * scene.config.tokens, title, **WEIGHTS)


def _exploded(axes: Axes, scene: Scene) -> None:
    """The picture as patches with gaps between them, the chosen one outlined."""
    pieces, P = scene.pieces(), scene.config.patch_size
    tiles(axes, pieces, [], [])
    axes.set_aspect("equal")
    y, x = corner(pieces, *scene.patch)
    outline(axes, y, x, P, P)


# ---------------------------------------------------------------------------- overview


class Canvas:
    """A figure whose parts are placed in inches from its lower left corner."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height))
        self.size = width, height
        self.whole = self.axes(0, 0, width, height)
        self.whole.set(xlim=(0, width), ylim=(0, height))
        self.whole.set_axis_off()

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        W, H = self.size
        return self.figure.add_axes((x / W, y / H, width / W, height / H))

    def text(self, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
        style = {"ha": "center", "va": "center", "fontsize": size, "parse_math": True} | options
        self.whole.text(x, y, text, **style)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last."""
        xs, ys = zip(*points, strict=True)
        self.whole.plot(xs[:-1], ys[:-1], color="0.35", linewidth=1, solid_capstyle="butt")
        style = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0}
        self.whole.annotate("", points[-1], points[-2], arrowprops=style)

    def box(
        self, x: float, y: float, width: float, height: float, text: str, fill="0.95", **options
    ) -> None:
        """A rounded box with text in it; the options are for the text."""
        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 0.8}
        style |= {"facecolor": fill, "edgecolor": "0.35"}
        self.whole.add_patch(FancyBboxPatch((x, y), width, height, **style))
        self.text(x + width / 2, y + height / 2, text, **options)


ROWS = 5  # patches whose tokens the overview shows, including the chosen one
CODE = {"family": "monospace", "size": SMALLEST}


@step("tokens", "attention", "lens")
def overview(scene: Scene) -> Figure:
    """The paper's Fig. 1 with real values: from the image to its class, and the block inside."""
    canvas = Canvas(WIDEST, 4.2)
    show_picture(picture := canvas.axes(0.08, 2.65, 1, 1), scene.picture)
    _mark_in_picture(picture, scene)
    canvas.text(0.08, 3.95, f"image, {by(*scene.picture.shape)}", ha="left")
    canvas.arrow((1.1, 3.15), (1.26, 3.15))
    _exploded(canvas.axes(1.28, 2.62, 1.06, 1.06), scene)
    canvas.text(1.81, 3.95, f"{scene.config.patches} patches")
    _draw_tokens(canvas, scene)
    _draw_output(canvas, scene)
    _draw_block(canvas, scene)
    _draw_attention(canvas, scene)
    return canvas.figure


def _draw_tokens(canvas: Canvas, scene: Scene) -> None:
    """Some patches, what turns them into tokens, and the tokens before and after all blocks."""
    N, D = scene.config.patches, scene.config.width
    rows = sorted({*np.linspace(0, N - 1, ROWS).round().astype(int).tolist(), scene.number})
    while len(rows) > ROWS:  # drop the one nearest to the chosen patch
        rows.remove(min(rows, key=lambda row: abs(row - scene.number) or N))
    pieces = scene.pieces().reshape(N, *scene.pieces().shape[2:])
    first = int(scene.config.pooling == "class")  # the class token is not drawn
    before, after = (scene.walk.tokens[layer].numpy()[first:] for layer in (0, -1))
    canvas.arrow((2.36, 3.15), (2.52, 3.15))
    for place, row in enumerate(rows):
        y = 3.6 - 0.27 * place
        show_picture(axes := canvas.axes(2.78, y, 0.22, 0.22), pieces[row])
        canvas.text(2.75, y + 0.11, str(row + 1), SMALLEST, ha="right")
        for x, tokens in ((3.91, before), (5.15, after)):
            _strip(canvas.axes(x, y + 0.02, 0.42, 0.18), tokens[row : row + 1], tokens)
        for x in (3.02, 3.79, 4.34, 5.03, 5.58):
            canvas.arrow((x, y + 0.11), (x + 0.1, y + 0.11))
        if row == scene.number:
            P = scene.config.patch_size
            outline(axes, -0.5, -0.5, P, P)
    canvas.text(2.83, 3.95, "in a row")
    canvas.box(3.14, 2.47, 0.63, 1.38, "linear map\n$E$ and\npositions", size=SMALLEST)
    canvas.text(4.12, 3.95, f"tokens $z_0$, {D} numbers")
    canvas.box(4.46, 2.47, 0.56, 1.38, f"encoder\nblock\n\n$\\times$ {scene.config.depth}")
    canvas.text(5.36, 3.95, "tokens $z_L$")


def _strip(axes: Axes, values: np.ndarray, among: np.ndarray) -> None:
    """A token's numbers (1, D), on a scale shared by all tokens (N, D)."""
    most = float(np.quantile(np.abs(among), 0.95)) or 1.0
    axes.imshow(values, aspect="auto", **signed(most))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.5, color="0.5")


def _draw_output(canvas: Canvas, scene: Scene) -> None:
    """Pooling, the last norm and the head, and the three most probable classes."""
    pooled = {"class": "class\ntoken", "mean": "mean"}[scene.config.pooling]
    canvas.box(5.7, 2.47, 0.48, 1.38, f"{pooled},\nnorm,\nhead", size=SMALLEST)
    canvas.arrow((6.2, 3.15), (6.33, 3.15))
    probabilities, best = scene.walk.lens[-1].numpy(), scene.best(3)
    axes = canvas.axes(6.37, 2.6, 0.98, 1.1)
    axes.barh(range(len(best)), probabilities[best], 0.3, color="tab:blue")
    for place, k in enumerate(best):
        name = shown(scene.classes[k], 12)  # there is no room for more
        axes.text(0, place - 0.38, f"{name} {probabilities[k]:.1%}", fontsize=SMALLEST)
    axes.set(xlim=(0, 1), ylim=(2.5, -0.7))
    axes.set_axis_off()
    canvas.text(6.86, 3.95, "prediction")


def _draw_block(canvas: Canvas, scene: Scene) -> None:
    """The inside of a block, in the code's names, with Eqs. 2 and 3."""
    canvas.whole.add_patch(Rectangle((0.08, 0.12), 4.12, 2.05, facecolor="0.98", edgecolor="0.8"))
    canvas.whole.plot([4.46, 0.08], [2.47, 2.17], color="0.8", linewidth=0.8, linestyle=":")
    canvas.whole.plot([5.02, 4.2], [2.47, 2.17], color="0.8", linewidth=0.8, linestyle=":")
    canvas.text(0.2, 2.02, f"encoder block: {scene.config.heads} heads, MLP of width "
                f"{scene.config.hidden}", ha="left")  # fmt: skip
    y = 1.1
    canvas.text(0.3, y, "$z_{l-1}$", 9)
    canvas.text(4.03, y, "$z_l$", 9)
    boxes = (
        (0.64, "norm1", "0.95"),
        (1.22, "attn", "#fde8d0"),
        (2.38, "norm2", "0.95"),
        (2.96, "mlp", "#d9e8f6"),
    )
    for x, name, color in boxes:
        canvas.box(x, y - 0.26, 0.44, 0.52, name, color, **CODE)
    for plus, start in ((1.88, 0.54), (3.62, 2.14)):
        canvas.arrow((start, y), (start, y + 0.5), (plus, y + 0.5), (plus, y + 0.12))
        canvas.whole.add_patch(Circle((plus, y), 0.1, facecolor="white", edgecolor="0.35"))
        canvas.text(plus, y, "+", 9)
    ends = (0.45, 0.64, 1.08, 1.22, 1.66, 1.78, 1.98, 2.38, 2.82, 2.96, 3.4, 3.52, 3.72, 3.93)
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        canvas.arrow((start, y), (end, y))
    canvas.text(1.44, y - 0.42, "mixes tokens", SMALLEST, color="0.35")
    canvas.text(3.18, y - 0.42, "acts on each token", SMALLEST, color="0.35")
    canvas.text(1.12, 0.33, r"$z'_l = \mathrm{MSA}(\mathrm{LN}(z_{l-1})) + z_{l-1}$   (2)")
    canvas.text(3.16, 0.33, r"$z_l = \mathrm{MLP}(\mathrm{LN}(z'_l)) + z'_l$   (3)")


def _draw_attention(canvas: Canvas, scene: Scene) -> None:
    """Attention of the outlined patch in up to four layers, mean over heads, on one scale."""
    depth = scene.config.depth
    layers = sorted({round(layer) for layer in np.linspace(1, depth, min(depth, 4))})
    canvas.text(5.85, 2.02, "attention of the outlined patch, mean over heads")
    for place, layer in enumerate(layers):
        axes = canvas.axes(4.36 + 0.76 * place, 0.78, 0.7, 0.7)
        _weights(axes, scene, scene.of_patch(scene.walk.attention[layer - 1].mean(dim=0)), "")
        _mark_in_map(axes, scene)
        canvas.text(4.71 + 0.76 * place, 1.62, f"layer {layer}", SMALLEST)
    bar = canvas.axes(4.4, 0.5, 2.9, 0.1)
    attention_bar(canvas.figure, None, cax=bar, orientation="horizontal")


# ---------------------------------------------------------------------------- the ten steps


@step("patches")
def image(scene: Scene) -> Figure:
    P = scene.config.patch_size
    names = [name for name, _ in scene.channels]
    caption = f"Right: the outlined patch of {by(P, P)} pixels in the first channel."
    title = f"1. An image is {by(*scene.picture.shape)} numbers"
    figure, axes = _row(title, [1] * (len(names) + 2), 1.5, caption)
    show_picture(axes[0], scene.picture, "input")
    for channel, name in enumerate(names):
        show_picture(axes[1 + channel], in_color(scene.picture)[..., channel], name)
    for axis in axes[:-1]:
        _mark_in_picture(axis, scene)
    numbers = scene.pieces()[scene.patch][..., 0]
    show_picture(axes[-1], numbers, f"{names[0]}, {by(P, P)}")
    if P <= 8:
        for y, x in np.ndindex(P, P):
            color = "black" if numbers[y, x] > 120 else "white"
            axes[-1].text(x, y, numbers[y, x], color=color, **IN_CELL)
    return figure


@step("patches")
def patches(scene: Scene) -> Figure:
    (g_h, g_w), P = scene.config.grid, scene.config.patch_size
    piece, channels = scene.pieces()[scene.patch], scene.channels
    values = np.moveaxis(piece, 2, 0).reshape(3, -1)[: len(channels)]  # (C, P P)
    title = f"2. The image is cut into {by(g_h, g_w)} patches of {values.size} numbers each"
    caption = "Right: the outlined patch, flattened channel by channel."
    figure, axes = _row(title, [1, 0.12, 1.15, 0.12, 0.6, 0.12, 2], 1.5, caption)
    for axis in axes[1:6:2]:
        _sign(axis, "→")
    show_picture(axes[0], scene.picture)
    _exploded(axes[2], scene)
    show_picture(axes[4], piece)
    for channel, (_, color) in enumerate(channels):
        first = channel * P * P
        axes[6].bar(range(first, first + P * P), values[channel], 0.8, color=color)
    axes[6].set(ylim=(0, 255), xticks=[], yticks=[0, 255], xlabel=f"{values.size} numbers")
    return figure


@step("patches", "embedded")
def embedding(scene: Scene) -> Figure:
    x, z = scene.walk.patches.numpy(), scene.walk.embedded.numpy()
    E = scene.vit.embed.proj.weight.detach().cpu().numpy().T  # (C P P, D)
    (N, inputs), D = x.shape, z.shape[1]
    title = f"3. One linear map turns every patch into a token of {D} numbers"
    caption = (
        "Each row is a patch; arrowheads mark the same one on both sides. Blue is negative, white "
        "0, red positive; the darkest colors are at the values after ±, which 98% do not exceed. "
        "The bias is not shown."
    )
    ratios = [min(inputs / D, 3), 0.08, 0.9, 0.08, 1]  # beyond 3 the titles would not fit
    figure, axes = _row(title, ratios, 1.7, caption)
    _matrix(axes[0], x, "patches", f"{inputs} numbers", f"{N} patches")
    _sign(axes[1], r"$\times$")
    _matrix(axes[2], E, "E", f"{D}", f"{inputs}")
    _sign(axes[3], "=")
    _matrix(axes[4], z, "tokens before positions", f"{D} numbers", f"{N} tokens")
    _mark_row(axes[0], scene.number)
    _mark_row(axes[4], scene.number)
    return figure


@step("embedded", "tokens")
def positions(scene: Scene) -> Figure:
    added = scene.vit.embed.pos_embed[0].detach().cpu()
    similarity = explain.position_similarity(added, scene.config.grid)
    T, D = added.shape
    z = scene.walk.tokens[0].numpy()
    title = "4. A position embedding is added to each token"
    caption = (
        "The darkest colors are at the values after ±. Right: cosine similarity between the "
        "position embeddings of the outlined patch and of every patch, blue at -1, white at 0, red "
        f"at 1; here from {similarity[scene.patch].min():.2f} to 1."
    )
    figure, axes = _row(title, [1, 0.08, 1, 0.08, 1, 0.1, 0.8], 1.5, caption)
    tokens = z - added.numpy()  # with the class token, where there is one
    _matrix(axes[0], tokens, "tokens", f"{D} numbers", f"{T} tokens")
    _sign(axes[1], "+")
    _matrix(axes[2], added.numpy(), "positions $E_{pos}$", f"{D} numbers")
    _sign(axes[3], "=")
    _matrix(axes[4], z, "$z_0$", f"{D} numbers")
    axes[5].set_axis_off()
    _map(axes[6], similarity[scene.patch].numpy(), "cosine similarity", **SIMILARITY)
    _mark_in_map(axes[6], scene)
    for axis in (axes[0], axes[2], axes[4]):
        _mark_row(axis, scene.token)
    return figure


@step("q", "k", "v")
def queries(scene: Scene) -> Figure:
    walk = scene.walk
    parts = [each[scene.head].numpy() for each in (walk.q, walk.k, walk.v)]
    T, D_h = parts[0].shape
    title = f"5. Queries, keys and values: {scene.where}"
    caption = (
        f"Three linear maps turn each token into a query, a key and a value of {D_h} numbers. Step "
        "6 compares the marked query with all keys. The darkest colors are at the values after ±."
    )
    figure, axes = _row(title, [1, 1, 1], 1.7, caption)
    for axis, values, name in zip(axes, parts, ("queries q", "keys k", "values v"), strict=True):
        _matrix(axis, values, name, f"{D_h} numbers", f"{T} tokens" if axis is axes[0] else "")
    _mark_row(axes[0], scene.token)
    return figure


@step("scores", "attention")
def attention(scene: Scene) -> Figure:
    scores = scene.of_patch(scene.walk.scores[scene.head])
    scores = scores - scores.mean()  # softmax is invariant to a shift
    A = scene.walk.attention[scene.block][scene.head]
    title = f"6. A softmax turns query-key products into attention weights: {scene.where}"
    caption = (
        "Products of the outlined patch's query with every key, relative to their mean: red above, "
        "blue below. The softmax turns them into weights that sum to 1, here relative to uniform "
        "attention. Right: those of all query tokens; arrowheads mark the row of this one."
    )
    figure, axes = _row(title, [1, 0.12, 1, 0.25, 1, 0.12, 1], 1.5, caption)
    show_picture(axes[0], scene.picture, "query patch")
    _mark_in_picture(axes[0], scene)
    _sign(axes[1], "→")
    most = float(np.abs(scores).max()) or 1.0
    _map(axes[2], scores, r"$q \cdot k / \sqrt{D_h}$", **signed(most))
    _sign(axes[3], "softmax\n→", SMALLEST)
    _weights(axes[4], scene, scene.of_patch(A), "its attention")
    axes[5].set_axis_off()
    attention_bar(figure, axes, pad=0.02)
    axes[6].imshow(len(A) * A.numpy(), interpolation_stage="data", **WEIGHTS)
    axes[6].set(title="A", xlabel="key token", ylabel="query token", xticks=[], yticks=[])
    _mark_row(axes[6], scene.token)
    for axis in (axes[2], axes[4]):
        _mark_in_map(axis, scene)
    return figure


@step("attention")
def heads(scene: Scene) -> Figure:
    all_heads = scene.of_patch(scene.walk.attention[scene.block])
    maps = all_heads[:MOST_TILES]
    title = f"7. Several heads attend in parallel: layer {scene.block + 1}"
    which = "each head" if len(maps) == len(all_heads) else f"{len(maps)} of {len(all_heads)} heads"
    caption = (
        f"Attention of the outlined patch in {which}. The outputs of the heads are concatenated "
        "and mixed by a linear map."
    )
    figure, axes = _row(title, [1] * (len(maps) + 1), 1.25, caption)
    attention_bar(figure, axes, pad=0.02)
    show_picture(axes[0], scene.picture, "query patch")
    _mark_in_picture(axes[0], scene)
    for head, (axis, values) in enumerate(zip(axes[1:], maps, strict=True), start=1):
        _weights(axis, scene, values, f"head {head}")
        _mark_in_map(axis, scene)
    return figure


@step("hidden")
def mlp(scene: Scene) -> Figure:
    hidden = scene.walk.hidden
    after = GELU()(hidden).numpy()
    T, width = after.shape
    title = f"8. An MLP acts on each token: {scene.config.width} numbers to {width}, GELU, and back"
    active = np.sort(np.argsort(-np.abs(after).mean(axis=0))[:MOST_COLUMNS])
    caption = (
        "Left: GELU, and in gray the histogram of its inputs for this image. Right: its outputs, "
        f"most of them near 0; the {len(active)} columns with the largest mean magnitude, the "
        "darkest colors at the values after ±."
    )
    figure, axes = _row(title, [1, 2.6], 1.7, caption)
    x = np.linspace(-4, 4, 200)
    counts, edges = np.histogram(hidden.numpy(), bins=60, range=(-4, 4))
    twin = axes[0].twinx()
    twin.bar(edges[:-1], counts, np.diff(edges), align="edge", color="0.85")
    twin.set(yticks=[], ylim=(0, 1.6 * counts.max()))
    twin.spines[:].set_visible(False)
    axes[0].set_zorder(twin.get_zorder() + 1)
    axes[0].patch.set_visible(False)
    axes[0].plot(x, GELU()(hidden.new_tensor(x)).numpy(), color="tab:blue")
    axes[0].axhline(0, color="0.5", linewidth=0.5)
    axes[0].set(xlabel="input", ylabel="output", title="GELU")
    x_label = f"{len(active)} of {width} numbers"
    _matrix(axes[1], after[:, active], "after the GELU", x_label, f"{T} tokens")
    _mark_row(axes[1], scene.token)
    return figure


@step("tokens", "attention")
def blocks(scene: Scene) -> Figure:
    depth, grid = scene.config.depth, scene.config.grid
    layers = sorted({round(each) for each in np.linspace(0, depth, min(depth + 1, MOST_TILES))})
    title = f"9. Attention and MLP repeat in {depth} blocks, each adding to the tokens"
    caption = (
        "Above: the tokens after each layer, colored by their first three principal components in "
        "that layer. Similar colors mean similar tokens; the hue itself is arbitrary. Below: "
        "attention of the classifier, mean over heads."
    )
    figure = new_figure(WIDEST, 2.35, title, caption)
    axes = figure.subplots(2, len(layers) + 1)
    attention_bar(figure, axes[1, :], pad=0.02)
    show_picture(axes[0, 0], scene.picture, "input")
    _sign(axes[1, 0], "attention of\nthe classifier", SMALLEST)
    for column, layer in enumerate(layers, start=1):
        above, below = axes[:, column]
        tokens = scene.walk.tokens[layer][-scene.config.patches :]
        if min(tokens.shape) >= 3:
            colors = explain.tokens_as_colors(tokens[None])[0].unflatten(0, grid)
            _map(above, colors.numpy(), f"layer {layer}" if layer else "$z_0$")
        if layer:
            A = scene.walk.attention[layer - 1].mean(dim=0)
            _weights(below, scene, explain.map_of(A, scene.config).numpy(), "")
        else:
            below.set_axis_off()
    return figure


@step("lens")
def classifier(scene: Scene) -> Figure:
    lens = scene.walk.lens.numpy()
    what = {"class": "class token", "mean": "mean of the patch tokens"}[scene.config.pooling]
    title = "10. A linear head classifies"
    caption = (
        f"The input of the head is the {what} after the last layer, normalized. Middle: the same "
        "head applied to the tokens of earlier layers, for which it is not trained; layer 0 is the "
        "embedding."
    )
    figure, axes = _row(title, [0.8, 1.7, 1.2], 1.9, caption)
    show_picture(axes[0], scene.picture, "input")
    layers, best = range(len(lens)), scene.best(10)
    axes[1].plot(layers, 100 * lens, color="0.8", linewidth=0.8)  # all classes
    axes[1].plot([], [], color="0.8", linewidth=0.8, label="other classes")
    for k in best[:3]:
        axes[1].plot(layers, 100 * lens[:, k], marker=".", label=shown(scene.classes[k]))
    axes[1].set(xlabel="layer", ylabel="probability (%)", ylim=(0, 102), xticks=layers)
    axes[1].legend(loc="upper left")
    axes[2].barh(range(len(best)), 100 * lens[-1, best], color="tab:blue")
    axes[2].set_yticks(range(len(best)), [shown(scene.classes[k]) for k in best])
    axes[2].invert_yaxis()
    axes[2].set(xlim=(0, 100), xlabel="probability (%)", title="prediction")
    return figure
