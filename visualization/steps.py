"""How a ViT works in ten steps: what one image is at each of them, drawn from a model.

The README walks through these pictures. Each function takes a `Scene` and returns a Figure;
`STEPS` names them in order.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import explain
import figures
from base import GELU
from explain import Walk
from figures import ATTENTION, SIGNED, SMALLEST, greyed, in_colour, outline, show_picture, styled
from ViT import ViT, ViTConfig

WIDTH = 7.4  # inches, of every step
CHANNELS = (("red", "tab:red"), ("green", "tab:green"), ("blue", "tab:blue"))
GREY = (("values", "0.2"),)
MOST_TILES = 8  # heads or layers side by side


class Scene(NamedTuple):
    """An image on its way through a model, and the parts of it that the steps point at."""

    model: ViT
    picture: np.ndarray  # (H, W, 3) or (H, W) uint8
    walk: Walk  # on the CPU
    classes: list[str]
    patch: tuple[int, int]  # row and column, counted from 0
    block: int  # counted from 0, as is the head
    head: int

    @property
    def config(self) -> ViTConfig:
        return self.model.config

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

    def piece(self) -> np.ndarray:
        """The pixels of the chosen patch, (P, P, 3) or (P, P, 1)."""
        (row, column), P = self.patch, self.config.patch_size
        return np.atleast_3d(self.picture)[row * P :, column * P :][:P, :P]

    def pieces(self) -> np.ndarray:
        """The picture cut up, in colour: (g_h, g_w, P, P, 3)."""
        (g_h, g_w), P = self.config.grid, self.config.patch_size
        cut = in_colour(self.picture).reshape(g_h, P, g_w, P, 3)
        return cut.swapaxes(1, 2)

    def of_patch(self, M: Tensor) -> np.ndarray:
        """What the chosen patch has for every patch in matrices (..., T, T): (..., g_h, g_w)."""
        row = explain.patch_row(M, self.number, self.config.pooling)
        return row.unflatten(-1, self.config.grid).numpy()

    def of_classifier(self, M: Tensor) -> np.ndarray:
        """The same of the classifier."""
        row = explain.classifier_row(M, self.config.pooling)
        return row.unflatten(-1, self.config.grid).numpy()


def scene_of(
    model: ViT,
    image: Tensor,
    picture: np.ndarray,
    classes: list[str],
    *,
    patch: tuple[int, int] | None = None,
    block: int | None = None,
    head: int | None = None,
) -> Scene:
    """Follows an image; by default the middle patch, the middle block, and the head in which this
    patch takes the most from a single one.

    Args:
        image: (C, H, W), normalised, on the model's device.
        patch, block, head: counted from 0.
    """
    config = model.config
    patch = patch or (config.grid[0] // 2, config.grid[1] // 2)
    block = config.depth // 2 if block is None else block
    walk = explain.walk(model, image, block)
    walk = Walk(
        *([z.cpu() for z in part] if isinstance(part, list) else part.cpu() for part in walk)
    )
    scene = Scene(model, picture, walk, classes, patch, block, head or 0)
    if head is None:
        highest = scene.of_patch(walk.attention[block]).max(axis=(1, 2))  # (h,)
        scene = scene._replace(head=int(highest.argmax()))
    return scene


# ---------------------------------------------------------------------------- parts of the pictures


def _row(title: str, ratios: list[float], height: float, caption: str) -> tuple[Figure, list[Axes]]:
    """A figure of axes side by side."""
    figure = figures.new_figure(WIDTH, height + 0.25, title, caption)
    return figure, list(np.atleast_1d(figure.subplots(1, len(ratios), width_ratios=ratios)))


def _sign(axes: Axes, text: str, size: float = 11) -> None:
    """What happens between two axes: an arrow, a times, an equals; or words, in a place apart."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=size)


def _matrix(axes: Axes, values: np.ndarray, title: str, x: str, y: str = "") -> None:
    """Values of both signs, white at 0, a row a token."""
    most = float(np.quantile(np.abs(values), 0.98)) or 1.0
    scale = {"cmap": SIGNED, "vmin": -most, "vmax": most}
    axes.imshow(values, aspect="auto", interpolation_stage="data", **scale)
    axes.set(xlabel=x, ylabel=y, title=title, xticks=[], yticks=[])


def _mark_row(axes: Axes, row: int, columns: int) -> None:
    outline(axes, row - 0.5, -0.5, 1, columns)


def _mark_in_picture(axes: Axes, scene: Scene) -> None:
    P = scene.config.patch_size
    outline(axes, scene.patch[0] * P - 0.5, scene.patch[1] * P - 0.5, P, P)


def _mark_in_map(axes: Axes, scene: Scene) -> None:
    outline(axes, scene.patch[0] - 0.5, scene.patch[1] - 0.5)


def _map(axes: Axes, values: np.ndarray, title: str, **style) -> None:
    """A value for each patch."""
    axes.imshow(values, **({"cmap": ATTENTION, "vmin": 0} | style))
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _over_picture(axes: Axes, scene: Scene, values: np.ndarray, title: str) -> None:
    """A value for each patch, over the greyed picture, with the chosen patch outlined."""
    H, W = scene.picture.shape[:2]
    share = values / max(float(values.max()), 1e-12)
    show_picture(axes, greyed(scene.picture), title)
    colour = colormaps[ATTENTION](share)
    colour[..., 3] = 0.15 + 0.7 * share  # little weight, clear view
    axes.imshow(colour, extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    _mark_in_picture(axes, scene)


def _exploded(axes: Axes, scene: Scene) -> None:
    """The picture as patches with gaps between them, the chosen one outlined."""
    pieces, P = scene.pieces(), scene.config.patch_size
    figures.tiles(axes, pieces, [], [])
    axes.set_aspect("equal")
    y, x = figures.corner(pieces, *scene.patch)
    outline(axes, y, x, P, P)


def _bars(axes: Axes, scene: Scene, title: str, most: int = 10) -> None:
    """The likeliest classes, as bars."""
    probabilities = scene.walk.lens[-1].numpy()
    order = np.argsort(-probabilities, kind="stable")[:most]
    axes.barh(range(len(order)), 100 * probabilities[order], color="tab:blue")
    axes.set_yticks(range(len(order)), [scene.classes[k] for k in order])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="probability (%)", title=title)


# ---------------------------------------------------------------------------- the whole way


@styled
def overview(scene: Scene) -> Figure:
    """From the image to its class in one row; the attention is the outlined patch's."""
    attention, depth = scene.walk.attention, scene.config.depth
    layers = sorted({0, depth // 2, depth - 1})
    figure = figures.new_figure(WIDTH + 1.6, 1.75, "")
    ratios = [1, 0.16, 1.15, 0.16, *[1] * len(layers), 0.16, 0.85]
    axes = list(figure.subplots(1, len(ratios), width_ratios=ratios))
    show_picture(axes[0], scene.picture, "an image")
    _sign(axes[1], "→")
    _exploded(axes[2], scene)
    axes[2].set_title(f"{scene.config.patches} patches")
    _sign(axes[3], "→")
    for axis, layer in zip(axes[4:], layers, strict=False):
        values = scene.of_patch(attention[layer].mean(dim=0))
        _over_picture(axis, scene, values, f"attention,\nlayer {layer + 1}")
    _mark_in_picture(axes[0], scene)
    _sign(axes[-2], "→")
    _bars(axes[-1], scene, "a class", most=3)
    axes[-1].set(xticks=[0, 100], xlabel="%")
    return figure


# ---------------------------------------------------------------------------- the ten steps


@styled
def image(scene: Scene) -> Figure:
    P = scene.config.patch_size
    planes = np.atleast_3d(scene.picture)
    names = CHANNELS if planes.shape[2] == 3 else GREY
    caption = "Right: the numbers of the outlined square, in the first of the channels."
    title = f"1. An image is {' x '.join(map(str, scene.picture.shape))} numbers"
    figure, axes = _row(title, [1] * (len(names) + 2), 1.5, caption)
    show_picture(axes[0], scene.picture, "the image")
    for channel, (name, _) in enumerate(names):
        show_picture(axes[1 + channel], planes[..., channel], name)
    for axis in axes[:-1]:
        _mark_in_picture(axis, scene)
    numbers = scene.piece()[..., 0]
    show_picture(axes[-1], numbers, f"{names[0][0]}, {P} x {P}")
    if P <= 8:
        for y, x in np.ndindex(P, P):
            color = "black" if numbers[y, x] > 120 else "white"
            axes[-1].text(
                x, y, numbers[y, x], ha="center", va="center", color=color, fontsize=SMALLEST
            )
    return figure


@styled
def patches(scene: Scene) -> Figure:
    (g_h, g_w), P = scene.config.grid, scene.config.patch_size
    piece = scene.piece()
    values = np.moveaxis(piece, 2, 0).reshape(piece.shape[2], -1)  # (C, P P)
    title = f"2. The image is cut into {g_h} x {g_w} patches, each a row of {values.size} numbers"
    caption = "Right: the outlined patch, flattened, channel after channel."
    figure, axes = _row(title, [1, 0.12, 1.15, 0.12, 0.6, 0.12, 2], 1.5, caption)
    show_picture(axes[0], scene.picture)
    _sign(axes[1], "→")
    _exploded(axes[2], scene)
    _sign(axes[3], "→")
    show_picture(axes[4], piece if len(values) == 3 else piece[..., 0])
    _sign(axes[5], "→")
    for channel, (_, color) in enumerate(CHANNELS if len(values) == 3 else GREY):
        first = channel * P * P
        axes[6].bar(range(first, first + P * P), values[channel], 0.8, color=color)
    axes[6].set(ylim=(0, 255), xticks=[], yticks=[0, 255], xlabel=f"{values.size} numbers")
    return figure


@styled
def embedding(scene: Scene) -> Figure:
    x, z = scene.walk.patches.numpy(), scene.walk.embedded.numpy()
    E = scene.model.embed.projection.weight.detach().cpu().numpy().T  # (C P P, D)
    (N, inputs), D = x.shape, z.shape[1]
    title = f"3. One matrix turns every patch into a token of {D} numbers"
    caption = (
        "A row is a patch, the outlined one the same throughout. Blue below 0, red above. The bias "
        "that is added too is not drawn."
    )
    ratios = [inputs / D, 0.08, 0.9, 0.08, 1]
    figure, axes = _row(title, ratios, 1.7, caption)
    _matrix(axes[0], x, "patches", f"{inputs} numbers", f"{N} patches")
    _sign(axes[1], r"$\times$")
    _matrix(axes[2], E, "E", f"{D}", f"{inputs}")
    _sign(axes[3], "=")
    _matrix(axes[4], z, "tokens, before positions", f"{D} numbers", f"{N} tokens")
    _mark_row(axes[0], scene.number, inputs)
    _mark_row(axes[4], scene.number, D)
    return figure


@styled
def positions(scene: Scene) -> Figure:
    added = scene.model.embed.positions[0].detach().cpu()
    similarity = explain.position_similarity(added, scene.config.grid)
    T, D = added.shape
    z = scene.walk.tokens[0].numpy()
    title = "4. Each token is told where it came from: a position is added"
    caption = (
        "Right: how alike the positions of the outlined patch and of every other are, from the "
        "least, black, to 1: near ones are alike."
    )
    figure, axes = _row(title, [1, 0.08, 1, 0.25, 0.62], 1.7, caption)
    _matrix(axes[0], added.numpy(), "positions $E_{pos}$", f"{D} numbers", f"{T} tokens")
    _sign(axes[1], "→")
    _matrix(axes[2], z, "tokens with positions, $z_0$", f"{D} numbers")
    axes[3].set_axis_off()
    alike = similarity[scene.patch].numpy()
    _map(axes[4], alike, "cosine similarity", vmin=alike.min(), vmax=alike.max())
    _mark_in_map(axes[4], scene)
    for axis in (axes[0], axes[2]):
        _mark_row(axis, scene.token, D)
    return figure


@styled
def queries(scene: Scene) -> Figure:
    walk = scene.walk
    parts = [each[scene.head].numpy() for each in (walk.q, walk.k, walk.v)]
    T, D_h = parts[0].shape
    title = f"5. Queries, keys and values: {scene.where}"
    caption = (
        f"Three matrices turn each token into a query, a key and a value of {D_h} numbers. The "
        "outlined query is about to meet every key."
    )
    figure, axes = _row(title, [1, 1, 1], 1.7, caption)
    names = ("queries q: what I look for", "keys k: what I am", "values v: what I tell")
    for axis, values, name in zip(axes, parts, names, strict=True):
        _matrix(axis, values, name, f"{D_h} numbers", f"{T} tokens" if axis is axes[0] else "")
    _mark_row(axes[0], scene.token, D_h)
    return figure


@styled
def attention(scene: Scene) -> Figure:
    scores = scene.of_patch(scene.walk.scores[scene.head])
    scores = scores - scores.mean()  # of which a softmax knows nothing
    A = scene.walk.attention[scene.block][scene.head]
    title = "6. Query times key, through a softmax, is attention"
    caption = (
        f"{scene.where.capitalize()}. The outlined patch asks. Red keys fit its query better than "
        "the average key, blue ones worse; a softmax turns that into weights that sum to 1. "
        "Right: the rows of all tokens, this one outlined."
    )
    figure, axes = _row(title, [1, 0.12, 1, 0.25, 1, 0.12, 1], 1.5, caption)
    show_picture(axes[0], scene.picture, "who asks")
    _mark_in_picture(axes[0], scene)
    _sign(axes[1], "→")
    most = float(np.abs(scores).max()) or 1.0
    _map(axes[2], scores, r"$q \cdot k / \sqrt{D_h}$", cmap=SIGNED, vmin=-most, vmax=most)
    _sign(axes[3], "softmax\n→", SMALLEST)
    _map(axes[4], scene.of_patch(A), "its row of A")
    axes[5].set_axis_off()
    highest = float(A.quantile(0.995))
    axes[6].imshow(A.numpy(), cmap=ATTENTION, vmin=0, vmax=highest, interpolation_stage="data")
    axes[6].set(title="A", xlabel="key of token", ylabel="query of token", xticks=[], yticks=[])
    _mark_row(axes[6], scene.token, len(A))
    for axis in (axes[2], axes[4]):
        _mark_in_map(axis, scene)
    return figure


@styled
def heads(scene: Scene) -> Figure:
    maps = scene.of_patch(scene.walk.attention[scene.block])[:MOST_TILES]
    title = f"7. Several heads look at once: layer {scene.block + 1}"
    caption = (
        "Attention of the outlined patch in each head, each on a scale of its own. What the heads "
        "bring back is put side by side and mixed by one more matrix."
    )
    figure, axes = _row(title, [1] * (len(maps) + 1), 1.25, caption)
    show_picture(axes[0], scene.picture, "who asks")
    _mark_in_picture(axes[0], scene)
    for head, (axis, values) in enumerate(zip(axes[1:], maps, strict=True), start=1):
        _map(axis, values, f"head {head}")
        _mark_in_map(axis, scene)
    return figure


@styled
def mlp(scene: Scene) -> Figure:
    hidden = scene.walk.hidden
    after = GELU()(hidden).numpy()
    T, width = after.shape
    title = f"8. An MLP for each token: {scene.config.width} numbers, {width}, a GELU, and back"
    caption = (
        "Left: GELU, and in grey how often each input occurs among the tokens of this image. "
        "Right: what is left after it; most numbers are near 0, a few speak."
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
    axes[0].set(xlabel="into GELU", ylabel="out of it", title="GELU")
    _matrix(axes[1], after, "after the GELU", f"{width} numbers", f"{T} tokens")
    _mark_row(axes[1], scene.token, width)
    return figure


@styled
def blocks(scene: Scene) -> Figure:
    depth, grid = scene.config.depth, scene.config.grid
    layers = sorted({round(each) for each in np.linspace(0, depth, min(depth + 1, MOST_TILES))})
    title = f"9. Attention and MLP again, {depth} times, each adding to the tokens"
    caption = (
        "Above: the tokens after each layer, coloured by their first three principal components, "
        "each layer by its own: alike colours are alike tokens. Below: attention of the classifier "
        "in that layer, mean over heads, each map on its own scale."
    )
    figure = figures.new_figure(WIDTH, 2.35, title, caption)
    axes = figure.subplots(2, len(layers) + 1)
    show_picture(axes[0, 0], scene.picture, "the image")
    _sign(axes[1, 0], "attention of\nthe classifier", SMALLEST)
    for column, layer in enumerate(layers, start=1):
        above, below = axes[:, column]
        tokens = scene.walk.tokens[layer][-scene.config.patches :]
        if min(tokens.shape) >= 3:
            colours = explain.tokens_as_colours(tokens[None])[0].unflatten(0, grid)
            _map(above, colours.numpy(), f"layer {layer}" if layer else "$z_0$")
        if layer:
            _map(below, scene.of_classifier(scene.walk.attention[layer - 1].mean(dim=0)), "")
        else:
            below.set_axis_off()
    return figure


@styled
def classifier(scene: Scene) -> Figure:
    lens = scene.walk.lens.numpy()
    what = {"class": "class token's", "mean": "mean of the patches'"}[scene.config.pooling]
    title = "10. One matrix reads the class off"
    caption = (
        f"The head sees the {what} {scene.config.width} numbers after the last layer. Middle: the "
        "same head on the tokens of earlier layers, for which it was not trained; 0 is the "
        "embedding."
    )
    figure, axes = _row(title, [0.8, 1.7, 1.2], 1.9, caption)
    show_picture(axes[0], scene.picture, "the image")
    for k in np.argsort(-lens[-1], kind="stable")[:3]:
        axes[1].plot(range(len(lens)), 100 * lens[:, k], marker=".", label=scene.classes[k])
    axes[1].set(xlabel="layer", ylabel="probability (%)", ylim=(0, 102), xticks=range(len(lens)))
    axes[1].legend(loc="upper left")
    _bars(axes[2], scene, "the answer")
    return figure


class Step(NamedTuple):
    draw: Callable[[Scene], Figure]
    shows: tuple[str, ...]  # of the walk


STEPS = {
    "overview": Step(overview, ("attention", "lens")),
    "1-image": Step(image, ("patches",)),
    "2-patches": Step(patches, ("patches",)),
    "3-embedding": Step(embedding, ("patches", "embedded")),
    "4-positions": Step(positions, ("embedded", "tokens")),
    "5-queries": Step(queries, ("q", "k", "v")),
    "6-attention": Step(attention, ("scores", "attention")),
    "7-heads": Step(heads, ("attention",)),
    "8-mlp": Step(mlp, ("hidden",)),
    "9-blocks": Step(blocks, ("tokens", "attention")),
    "10-classifier": Step(classifier, ("lens",)),
}
