"""Figures of one image: its patches, attention to them, and what speaks for a class."""

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

import explain
from model import Model, Subject
from style import (
    ATTENTION,
    QUERY_OF_CLASSIFIER,
    RELATIVE,
    SMALLEST,
    Picture,
    attention_bar,
    by,
    corner,
    new_figure,
    outline,
    show_picture,
    tiles,
    to_picture,
)
from ViT import patchify


def patches(model: Model, subject: Subject) -> Picture:
    """The image with its patch grid, and the N patches in the order of their tokens."""
    (g_h, g_w), P, N = model.config.grid, model.config.patch_size, model.config.patches
    class_token = model.config.pooling == "class"
    pixels = patchify(subject.pixels[None], P)[0].unflatten(-1, (-1, P, P))  # (N, C, P, P)
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
    figure = new_figure(width, height, model.describe(subject), caption)
    left, right = figure.subplots(1, 2, width_ratios=(left_width, cell * across))
    show_picture(left, to_picture(subject.pixels))
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
            patch = to_picture(pixels[token - class_token])
            right.imshow(patch, extent=(x, x + 1, y + 1, y), cmap="gray", vmin=0, vmax=255)
        number = token if class_token else token + 1
        right.text(x + 0.5, y + 1.05, number, ha="center", va="top", fontsize=SMALLEST)
    right.set(xlim=(-0.1, 1.15 * across), ylim=(1.5 * down, -0.1), aspect="equal")
    right.set_axis_off()
    return Picture(figure, {"patches": pixels.cpu().numpy()})


def attention_of_classifier(model: Model, subject: Subject) -> Picture:
    """What the classifier reads, in each layer and head."""
    pooling = model.config.pooling
    attention = model.record(subject.pixels[None]).attention
    rows = torch.stack([explain.classifier_row(A[0], pooling) for A in attention])
    return _attention(model, subject, rows, QUERY_OF_CLASSIFIER[pooling])


def attention_of_patch(model: Model, subject: Subject) -> Picture:
    """What one patch reads, in each layer and head."""
    g_h, g_w = model.config.grid
    row, column = model.options.query or (g_h // 2 + 1, g_w // 2 + 1)  # counted from 1
    patch = (row - 1) * g_w + column - 1
    attention = model.record(subject.pixels[None]).attention
    rows = torch.stack([explain.patch_row(A[0], patch, model.config.pooling) for A in attention])
    query = f"of the patch in row {row}, column {column} (outlined)"
    return _attention(model, subject, rows, query, (row - 1, column - 1))


def _attention(
    model: Model,
    subject: Subject,
    rows: Tensor,
    query: str,
    outlined: tuple[int, int] | None = None,
) -> Picture:
    """Maps of the chosen layers (down) and heads (across), with the image at the left.

    Args:
        rows: (L, h, N), attention weights of one query.
        query: whose they are, for the caption.
        outlined: row and column of the query patch, counted from 0.
    """
    layer, head = model.options.layer, model.options.head
    layers = [f"layer {number + 1}" for number in range(len(rows))]
    if layer != "all":
        rows, layers = rows[layer - 1 : layer], layers[layer - 1 : layer]
    if isinstance(head, int):
        rows, heads = rows[:, head - 1 : head], [str(head)]
    elif head == "all":
        heads = [str(number + 1) for number in range(rows.shape[1])]
    else:
        reduce = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[head]
        rows, heads = reduce(rows, dim=1, keepdim=True), [head]
    maps = rows.unflatten(-1, model.config.grid).cpu().numpy()  # (layers, heads, g_h, g_w)

    caption = (
        f"Attention to each patch, {query}, by layer and head, after the softmax, times the number "
        "of tokens, so that 1 is uniform attention. Attention shows where values are read from, "
        "not what they contribute to the decision, and does not depend on a class."
    )
    g_h, g_w = model.config.grid
    cell = float(np.clip(7 / len(heads), 0.45, 1.1))
    width = 2.6 + cell * len(heads) * g_w / max(g_h, g_w)
    height = max(2.4, 0.4 + cell * len(layers) * g_h / max(g_h, g_w))
    figure = new_figure(width, height + 0.3, model.describe(subject), caption)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, width - 2.3))
    show_picture(left, to_picture(subject.pixels))
    tiles(right, model.config.tokens * maps, layers, heads, cmap=ATTENTION, norm=RELATIVE)
    right.set(xlabel="head")
    attention_bar(figure, right, shrink=min(1.0, 2.2 / height), pad=0.02)
    if outlined:
        P = model.config.patch_size
        outline(left, outlined[0] * P - 0.5, outlined[1] * P - 0.5, P, P)
        for r, c in np.ndindex(maps.shape[:2]):
            y, x = corner(maps, r, c)
            outline(right, y + outlined[0], x + outlined[1])
    return Picture(figure, {"attention": maps}, {"highest weight": float(maps.max())})


def explanations(model: Model, subject: Subject) -> Picture:
    """Maps of several methods (columns) for two classes (rows) over the grayed image.

    Each method has its own scale, from uniform, where it is transparent, to its maximum.
    """
    probabilities = model.probabilities_of(subject)
    targets = target_classes(model, subject, probabilities)
    images = model.normalize(subject.pixels.expand(len(targets), *subject.pixels.shape))
    maps = explain.explanations(model.vit, images, torch.tensor(targets, device=model.device))
    maps = {method: values.cpu().numpy() for method, values in maps.items()}

    caption = (
        f"Attention: last layer, mean over heads, {QUERY_OF_CLASSIFIER[model.config.pooling]}. "
        "Rollout combines all layers. Neither depends on the class, so their rows are equal. "
        "Gradient rollout and relevance weight attention by the gradient of the class logit, "
        "LeGrad is that gradient alone: evidence for the class, not against it. Each map is "
        "smoothed, has a scale of its own and is transparent where it is at or below uniform. None "
        "of the five proves a cause; vis.py faithfulness tests them."
    )
    picture = to_picture(subject.pixels)
    gray = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])  # its luma
    H, W = gray.shape
    size = 1.32 * (len(maps) + 1) + 0.9, 1.32 * len(targets) * H / W + 0.8
    figure = new_figure(*size, model.describe(subject), caption)
    grid = figure.subplots(len(targets), len(maps) + 1, squeeze=False)
    for row, k in enumerate(targets):
        first = grid[row, 0]
        show_picture(first, picture)
        style = {"rotation": 90, "ha": "right", "va": "center", "transform": first.transAxes}
        first.text(-0.08, 0.5, f"{model.classes[k]} {probabilities[k]:.1%}", **style)
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
    arrays = {method.replace(" ", "_"): values for method, values in maps.items()}
    return Picture(figure, arrays, {"targets": [model.classes[k] for k in targets]})


def target_classes(model: Model, subject: Subject, probabilities: Tensor) -> list[int]:
    """The class that --target names, and the most probable other one."""
    order = probabilities.argsort(descending=True).tolist()
    target = model.options.target
    if target == "pred":
        first = order[0]
    else:
        first = subject.label if target == "label" else model.classes.index(target)
    return [first, *(k for k in order if k != first)][:2]
