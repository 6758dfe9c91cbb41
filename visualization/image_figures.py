"""Figures of one image: its patches, attention to them, and the evidence for a class."""

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import explain
from curves import shown
from evidence import RANDOM, SHARES, fill_of, orders_of
from model import Model, Subject
from style import (
    QUERY_OF_CLASSIFIER,
    SMALLEST,
    WEIGHTS,
    WIDEST,
    NotApplicable,
    Picture,
    attention_bar,
    by,
    corner,
    in_color,
    new_figure,
    outline,
    overlay,
    show_picture,
    tiles,
    to_picture,
)
from ViT import patchify

RANDOM_ORDERS = 3  # to compare the deletion of a map with


def patches(model: Model, subject: Subject) -> Picture:
    """The image with its patch grid, and the N patches in the order of their tokens."""
    (g_h, g_w), P, N = model.config.grid, model.config.patch_size, model.config.patches
    class_token = model.config.pooling == "class"
    pixels = patchify(subject.pixels[None], P)[0].unflatten(-1, (-1, P, P))  # (N, C, P, P)
    across = g_w if g_w >= 8 else max(8, round((2.5 * N) ** 0.5))
    down = -(-N // across)
    left_width, cell = 2.2, min(0.55, (WIDEST - 2.7) / across)  # inches
    numbered = cell >= 0.28  # else only the first patch in a row has room for its number
    x_step = P + max(1, round(0.12 * P))  # pixels of the sheet
    y_step = x_step + round(0.15 / cell * x_step) * numbered
    caption = (
        f"{by(g_h, g_w)} patches of {by(P, P)} pixels, row by row; each is flattened and mapped to "
        f"one token. Numbers are token positions{'' if numbered else ', of the first in a row'}."
        + " cls is the learned class token, which shows no pixels."
        * class_token
    )
    height = max(left_width * g_h / g_w, cell / x_step * y_step * (down + class_token)) + 0.4
    size = left_width + 0.5 + cell * across, height
    figure = new_figure(*size, model.describe(subject), caption)
    left, right = figure.subplots(1, 2, width_ratios=(left_width, cell * across))
    show_picture(left, to_picture(subject.pixels))
    line = {"color": "white", "linewidth": min(0.6, 8 / max(g_h, g_w))}
    for row in range(1, g_h):
        left.axhline(row * P - 0.5, **line)
    for column in range(1, g_w):
        left.axvline(column * P - 0.5, **line)

    sheet = np.full((down * y_step, across * x_step, 3), 255, np.uint8)
    for number, patch in enumerate(pixels):
        y, x = (n * step for n, step in zip(divmod(number, across), (y_step, x_step), strict=True))
        sheet[y : y + P, x : x + P] = in_color(to_picture(patch))
        if numbered:
            right.text(x + P / 2, y + 1.05 * P, number + 1, ha="center", va="top", size=SMALLEST)
    top = -y_step if class_token else 0
    right.imshow(sheet, extent=(0, across * x_step, down * y_step, 0))
    right.set(xlim=(0, across * x_step), ylim=(down * y_step, top), xticks=[])
    rows = [] if numbered else range(0, down, -(-down // 24))
    right.set_yticks([row * y_step + P / 2 for row in rows], [row * across + 1 for row in rows])
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    if class_token:
        box = {"boxstyle": "square", "facecolor": "0.92", "edgecolor": "0.5", "linewidth": 0.6}
        right.text(0, top / 2, "cls", va="center", size=SMALLEST, bbox=box)
    return Picture(figure, {"patches": pixels.cpu().numpy()})


def attention_of_classifier(model: Model, subject: Subject) -> Picture:
    """What the classifier reads, in each layer and head."""
    return _attention(model, subject, QUERY_OF_CLASSIFIER[model.config.pooling])


def attention_of_patch(model: Model, subject: Subject) -> Picture:
    """What one patch reads, in each layer and head."""
    row, column = model.patch
    query = f"of the patch in row {row + 1}, column {column + 1} (outlined)"
    return _attention(model, subject, query, model.patch)


def _attention(
    model: Model, subject: Subject, query: str, patch: tuple[int, int] | None = None
) -> Picture:
    """Maps of the chosen layers (down) and heads (across), with the image at the left.

    Args:
        query: whose maps they are, for the caption.
        patch: row and column of the query patch, counted from 0; None for the classifier.
    """
    layer, head, (g_h, g_w) = model.options.layer, model.options.head, model.config.grid
    attention = model.record(subject.pixels[None]).attention
    maps = torch.cat([explain.map_of(A, model.config, patch) for A in attention])
    layers = [f"layer {number + 1}" for number in range(len(maps))]
    if layer != "all":
        maps, layers = maps[layer - 1 : layer], layers[layer - 1 : layer]
    heads = [str(head)]
    if head == "all":
        heads = [str(number + 1) for number in range(maps.shape[1])]
    else:
        maps = explain.over_heads(maps, head)[:, None]
    maps = maps.cpu().numpy()  # (layers, heads, g_h, g_w)

    caption = (
        f"Attention to each patch, {query}, by layer and head, after the softmax, times the number "
        "of tokens, so that 1 is uniform attention. Attention shows where values are read from, "
        "not what they contribute to the decision, and does not depend on a class."
    )
    cell = min(1.1, 5 / len(heads), 9 / len(layers))
    width = 2.4 + cell * len(heads) * g_w / max(g_h, g_w)
    height = max(2.4, 0.4 + cell * len(layers) * g_h / max(g_h, g_w))
    figure = new_figure(width, height + 0.3, model.describe(subject), caption)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, width - 2.1))
    show_subject(left, subject)
    tiles(right, model.config.tokens * maps, layers, heads, **WEIGHTS)
    right.set(xlabel="head")
    attention_bar(figure, right, shrink=min(1.0, 2.2 / height), pad=0.02)
    if patch:
        x0, y0, x1, y1 = subject.seen
        size = (y1 - y0) / g_h, (x1 - x0) / g_w
        outline(left, y0 + patch[0] * size[0] - 0.5, x0 + patch[1] * size[1] - 0.5, *size)
        for r, c in np.ndindex(maps.shape[:2]):
            y, x = corner(maps, r, c)
            outline(right, y + patch[0], x + patch[1])
    return Picture(figure, {"attention": maps}, {"highest weight": float(maps.max())})


def explanations(model: Model, subject: Subject) -> Picture:
    """Maps of several methods (columns) for two classes (rows) over the grayed image."""
    if not model.vit.head.weight.any():
        raise NotApplicable("the model's head is all zero: nothing speaks for any class")
    probabilities = model.probabilities_of(subject)
    targets = target_classes(model, subject, probabilities)
    found = [model.explain(subject, k) for k in targets]  # one by one, which takes less memory
    maps = {name: torch.cat([each[name] for each in found]).cpu().numpy() for name in found[0]}
    pairs = zip(targets, found, strict=True)
    deletion = [deletion_of(model, subject, k, each) for k, each in pairs]

    options = model.options
    start, layer = options.start_layer, str(options.layer).replace("all", f"{model.config.depth}")
    head = str(options.head).replace("all", "mean")
    over = f"{head} over heads" if head.isalpha() else f"head {head}"
    caption = (
        f"Attention: layer {layer}, {over}, {QUERY_OF_CLASSIFIER[model.config.pooling]}. "
        f"Rollout combines all layers{f' from {start} on' if start > 1 else ''}. Neither depends "
        "on the class, so their rows are equal. Relevance weights attention by the gradient of the "
        "class logit, LeGrad is that gradient alone: evidence for the class, not against it. Each "
        "map is divided by its own mean, so that two classes compare in shape, not in strength; it "
        "is smoothed between patches, and transparent at and below 1. Deletion: the mean "
        "probability of the row's class while patches are removed in the map's order; low is good. "
        "No map proves a cause."
    )
    H, W = subject.picture.shape[:2]
    height = len(targets) * (1.45 * min(H / W, 2.5) + 0.55) + 0.85
    figure = new_figure(WIDEST, height, model.describe(subject), caption)
    grid = figure.subplots(len(targets), len(maps) + 1, squeeze=False)
    gray = in_color(subject.picture) @ np.array([0.299, 0.587, 0.114])  # its luma
    for row, (k, areas) in enumerate(zip(targets, deletion, strict=True)):
        first = grid[row, 0]
        show_subject(first, subject)
        name, random = shown(model.classes[k], 18), areas.pop(RANDOM)
        first.set_title(f"{name}\n{probabilities[k]:.1%}\nrandom deletion {random:.2f}")
        for axes, (method, values) in zip(grid[row, 1:], maps.items(), strict=True):
            text = f"up to {values[row].max():.1f}\ndeletion {areas[method]:.2f}"
            if not values[row].any():
                text = "no positive\nevidence"
            show_subject(axes, subject, gray)
            axes.set_title(f"{method}\n{text}" if row == 0 else text)
            overlay(axes, values[row], subject.seen)
        for axes in grid[row]:
            axes.title.set_fontsize(SMALLEST)
    attention_bar(figure, grid, orientation="horizontal", pad=0.02, shrink=0.5, aspect=40)
    arrays = {method.replace(" ", "_"): values for method, values in maps.items()}
    numbers = {"targets": [model.classes[k] for k in targets], "deletion": deletion}
    return Picture(figure, arrays, numbers)


def show_subject(axes: Axes, subject: Subject, picture: np.ndarray | None = None) -> None:
    """The image, or its whole photo with what the model sees outlined; or `picture` instead."""
    show_picture(axes, subject.picture if picture is None else picture)
    if subject.crop:
        x0, y0, x1, y1 = subject.crop
        outline(axes, y0 - 0.5, x0 - 0.5, y1 - y0, x1 - x0)


def deletion_of(
    model: Model, subject: Subject, target: int, maps: dict[str, Tensor]
) -> dict[str, float]:
    """The deletion area of each map (1, g_h, g_w) of an image, and of random orders."""
    images, fill, areas = model.normalize(subject.pixels[None]), fill_of(model), {}
    generator = torch.Generator().manual_seed(model.options.seed)
    for name, several in orders_of(maps, RANDOM_ORDERS, generator).items():
        order = torch.cat(several).flip(1)  # (1 or more, N)
        batch = images.expand(len(order), -1, -1, -1)
        targets = torch.full((len(order),), target, device=model.device)
        kept, _ = explain.kept_probabilities(model.vit, batch, targets, order, SHARES, fill)
        areas[name] = explain.area(kept).mean().item()
    return areas


def target_classes(model: Model, subject: Subject, probabilities: Tensor) -> list[int]:
    """The class that --target names, and the most probable other one."""
    order = probabilities.argsort(descending=True).tolist()
    known, target = {"pred": order[0], "label": subject.label}, model.options.target
    first = known[target] if target in known else model.classes.index(target)
    return [first, *(k for k in order if k != first)][:2]
