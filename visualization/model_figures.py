"""Figures of a model's weights, and of what it does with many images of its data set."""

from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import explain
from augment import OPERATIONS, Augmentation
from curves import shown
from model import Model
from style import (
    ATTENTION,
    MARK,
    QUERY_OF_CLASSIFIER,
    RELATIVE,
    SIMILARITY,
    SMALLEST,
    WIDEST,
    NotApplicable,
    Picture,
    attention_bar,
    in_color,
    new_figure,
    tiles,
    to_picture,
)

SHEET_IMAGES, SHEET_CLASSES = 8, 10

# ---------------------------------------------------------------------------- weights


def filters(model: Model) -> Picture:
    """Principal components of the patch embedding (the paper's Fig. 7, left) and their variance."""
    weight = model.vit.embed.proj.weight.detach().cpu()
    components, singular_values = (
        values.numpy() for values in explain.embedding_filters(weight, model.config.channels)
    )
    share = singular_values**2 / max((singular_values**2).sum(), 1e-300)
    k, columns = len(components), 7
    rows = -(-k // columns)
    caption = (
        f"The first {k} principal components of the rows of E: the pixel patterns that it "
        f"amplifies most. They hold {share[:k].sum():.1%} of the variance of its filters, not of "
        "that of pixels: an embedding that evens out its inputs amplifies what is rare in images. "
        "Gray is 0; each has a scale of its own. Signs are arbitrary."
    )
    figure = new_figure(7.2, 0.6 * rows + 1.0, "What the patch embedding amplifies", caption)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 2.4))
    gray = components.shape[1] != 3
    colored = components.mean(axis=1, keepdims=True) if gray else components
    colored = colored / np.abs(colored).max(axis=(1, 2, 3), keepdims=True)  # (k, 1 or 3, P, P)
    sheet = np.ones((rows * columns, *colored.shape[2:], 3))  # the rest stays white
    sheet[:k] = 0.5 + 0.5 * np.moveaxis(colored, 1, -1)
    tiles(left, sheet.reshape(rows, columns, *sheet.shape[1:]), [], [])
    right.plot(range(1, len(share) + 1), 100 * share.cumsum(), color="0.2")
    right.axvline(k, color=MARK, linewidth=1, label="shown on the left")
    right.legend(loc="lower right")
    right.set(xlabel="component", ylabel="cumulative variance of filters (%)", ylim=(0, 102))
    return Picture(figure, {"components": components, "singular_values": singular_values})


def positions(model: Model) -> Picture:
    """Cosine similarity of position embeddings, one tile per patch (the paper's Fig. 7, center)."""
    g_h, g_w = model.config.grid
    embeddings = model.vit.embed.pos_embed[0].detach().cpu()
    similarity = explain.position_similarity(embeddings, (g_h, g_w)).numpy()
    kind = {"learned": "learned", "sincos": "fixed (sine-cosine)"}[model.config.positions]
    caption = (
        "Each tile: cosine similarity of the position embedding of the patch in that row and "
        f"column with those of all patches. The embeddings are {kind}."
    )
    size = 5.4 * min(1, g_w / g_h) + 0.9, 5.2 * min(1, g_h / g_w) + 0.7
    figure = new_figure(*size, "Similarity of position embeddings", caption)
    axes = figure.subplots()
    rows, columns = ([str(number + 1) for number in range(count)] for count in (g_h, g_w))
    image = tiles(axes, similarity, rows, columns, **SIMILARITY)
    axes.set(xlabel="patch column", ylabel="patch row")
    figure.colorbar(image, ax=axes, label="cosine similarity", pad=0.02)
    return Picture(figure, {"similarity": similarity})


# ---------------------------------------------------------------------------- sheets of images


def augmentation(model: Model) -> Picture:
    """What each operation of the recipe does to training images, and all of them together."""
    config, train = model.checkpoint.training, model.dataset.train
    names = OPERATIONS | {"flip": f"{config.flip} flip"}
    values = {field: getattr(config, field) for field in names}
    off = {f: "off" if isinstance(value, str) else type(value)() for f, value in values.items()}
    used = [field for field in names if values[field] != off[field]]
    if not used:
        raise NotApplicable("the recipe uses no augmentation")
    recipes = {names[field]: replace(config, **off | {field: values[field]}) for field in used}
    chosen = model.sample(train, SHEET_IMAGES)
    images, labels = train.take(chosen)
    rows = {"original": images}
    for name, recipe in (recipes | {"whole recipe": config}).items():
        augment = Augmentation(recipe, model.config, len(train), model.device)
        rows[name] = augment(images, labels, chosen, 0, model.options.seed).images
    figure = _sheet(
        {name: list(map(to_picture, row)) for name, row in rows.items()},
        names=[model.classes[label] for label in labels],
        title=f"Augmentation of training images of {model.dataset.name}",
        caption="Each operation alone, with the settings of the recipe, and last all of them.",
    )
    arrays = {name.replace(" ", "_"): row.cpu().numpy() for name, row in rows.items()}
    return Picture(figure, arrays)


def attention_examples(model: Model) -> Picture:
    """Rollout of one image of each class."""
    rollout = model.probe.rollout.numpy()
    relative = model.config.tokens * rollout[_rows(model)]
    colors = [ATTENTION(RELATIVE(each))[..., :3] for each in relative]
    caption = (
        f"Over all layers, {QUERY_OF_CLASSIFIER[model.config.pooling]}. Above each image: the "
        "prediction, red where it is wrong; rollout does not depend on it."
    )
    figure = _sheet_of_probe(model, {"rollout": colors}, "Attention rollout", caption)
    attention_bar(figure, figure.axes, pad=0.02, shrink=0.9)
    return Picture(figure, {"rollout": rollout})


def token_pca(model: Model) -> Picture:
    """The patch tokens of one image of each class as colors, after several layers."""
    if min(model.config.width, len(model.probe.labels) * model.config.patches) < 3:
        raise NotApplicable("three principal components need a width and patches of at least 3")
    depth, layers = model.config.depth, model.options.layer
    chosen = {0, *(round(depth * k / 3) for k in (1, 2, 3))} if layers == "all" else {layers}
    rows, arrays = {}, {}
    for layer in sorted(chosen):
        patches = model.probe.tokens[:, layer, -model.config.patches :]  # (n, N, D)
        colors = explain.tokens_as_colors(patches).unflatten(1, model.config.grid).numpy()
        arrays[f"layer_{layer}"] = colors
        rows[f"layer {layer}" if layer else "embedding"] = list(colors[_rows(model)])
    caption = (
        "Red, green and blue are the first three principal components of the patch tokens of "
        f"{_probed(model)}, with a separate PCA for each layer: compare colors within a row, "
        "not between rows. Similar colors mean similar tokens; the hue itself is arbitrary. "
        "Above each image: the prediction, red where it is wrong."
    )
    return Picture(_sheet_of_probe(model, rows, "Patch tokens as colors", caption), arrays)


def _sheet_of_probe(
    model: Model, rows: dict[str, Sequence[np.ndarray]], title: str, caption: str
) -> Figure:
    """One image of each class, with its prediction above it and the rows below it."""
    rows_of_probe = _rows(model)
    inputs = [to_picture(image) for image in model.probe.pixels[rows_of_probe]]
    predictions = model.probe.predictions[rows_of_probe]
    names = [model.classes[k] for k in predictions]
    figure = _sheet({"input": inputs} | rows, names, title, caption)
    wrong = predictions != model.probe.labels[rows_of_probe]
    for axes, is_wrong in zip(figure.axes, wrong.tolist(), strict=False):  # those of the first row
        if is_wrong:
            axes.title.set_color("tab:red")
    return figure


def _sheet(
    rows: dict[str, Sequence[np.ndarray]], names: Sequence[str], title: str, caption: str
) -> Figure:
    """Rows of pictures, with the label of each row at its left.

    Args:
        rows: for each label, n pictures or RGB arrays (h, w, 3) from 0 to 1.
        names: the n titles of the columns.
    """
    H, W = next(iter(rows.values()))[0].shape[:2]
    margin = 1.2  # inches
    cell = min(0.85, (WIDEST - margin) / len(names))
    size = max(cell * len(names) + margin, 4), 1.04 * cell * len(rows) * H / W + 0.6
    figure = new_figure(*size, title, caption)
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for line, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(in_color(picture))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation="horizontal", ha="right", va="center")
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(shown(name, 12), fontsize=SMALLEST)
    return figure


def _rows(model: Model) -> list[int]:
    """Rows of the probe: the first image of each of up to ten classes."""
    labels = model.probe.labels.tolist()
    return [labels.index(label) for label in sorted(set(labels))[:SHEET_CLASSES]]


def _probed(model: Model) -> str:
    return f"{len(model.probe.labels)} {model.of_split}"


# ---------------------------------------------------------------------------- layers and heads


def attention_distance(model: Model) -> Picture:
    """One dot per head and layer, and the mean over heads as a line (the paper's Fig. 7, right)."""
    if model.config.tokens == 1:
        raise NotApplicable("with a single token, attention has no reach")
    distance, entropy = (  # (L, h)
        values.mean(dim=0) for values in (model.probe.distance, model.probe.entropy)
    )
    reach = explain.patch_distances(model.config.grid, model.config.patch_size).mean().item()
    title = f"Reach of attention by layer: {_probed(model)}"
    caption = (
        "Left: between patches only, renormalized; low is local, like a small convolution. "
        f"Right: over ln T, the entropy of uniform attention to all T = {model.config.tokens} "
        "tokens; 0 where all weight is on one."
    )
    figure = new_figure(7.4, 2.7, title, caption)
    left, right = figure.subplots(1, 2)
    for axes, values, label, uniform in (
        (left, distance.numpy(), "mean attention distance (pixels)", reach),
        (right, entropy.numpy(), "attention entropy / ln T", 1.0),
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
    numbers = {"mean px": distance.mean().item(), "mean entropy": entropy.mean().item()}
    return Picture(figure, {"distance": distance.numpy(), "entropy": entropy.numpy()}, numbers)


def token_norms(model: Model) -> Picture:
    """Norms of the tokens after each layer."""
    norms = model.probe.tokens.norm(dim=-1).transpose(0, 1).numpy()  # (L + 1, n, T)
    first = int(model.config.pooling == "class")
    caption = (
        "Median over all patch tokens of all images; the shaded band holds the middle 90%, the "
        "dotted lines are the 99% quantile and the maximum. Layer 0 is the embedding. A few tokens "
        "of far larger norm would be the artifacts of Darcet et al. (arXiv 2309.16588)."
    )
    figure = new_figure(4.6, 3.2, f"Token norms, {_probed(model)}", caption)
    axes = figure.subplots()
    layers = range(len(norms))
    kinds = [(norms[:, :, first:], "patch", "tab:blue"), (norms[:, :, 0], "class", "0.2")]
    for values, name, color in kinds[: 1 + first]:
        values = values.reshape(len(norms), -1)
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95), axis=1)
        axes.fill_between(layers, low, high, alpha=0.2, color=color, linewidth=0)
        axes.plot(layers, middle, marker=".", color=color, label=f"{name} tokens")
        for quantile in (0.99, 1):
            high = np.quantile(values, quantile, axis=1)
            axes.plot(layers, high, linestyle=":", linewidth=0.8, color=color)
    axes.set(xlabel="layer", ylabel="token norm |z|", xticks=layers)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return Picture(figure, {"norms": norms})


def layer_similarity(model: Model) -> Picture:
    """Linear CKA between the representations after each pair of layers."""
    if len(model.probe.labels) < 4:
        raise NotApplicable("the unbiased estimator needs at least four images")
    layers = list(model.probe.tokens.flatten(2).unbind(dim=1))  # L + 1 of (n, T D)
    cka = explain.linear_cka(layers).numpy()
    caption = (
        f"Linear CKA (unbiased HSIC) of all tokens after each layer, {_probed(model)}; 0 is the "
        "embedding. 1 means equal up to rotation and scale."
    )
    figure = new_figure(4.2, 3.6, "Similarity of layers", caption)
    axes = figure.subplots()
    image = axes.imshow(cka, cmap="magma", vmin=0, vmax=1, origin="lower")
    ticks = range(0, len(cka), max(1, len(cka) // 12))
    axes.set(xlabel="layer", ylabel="layer", xticks=ticks, yticks=ticks)
    figure.colorbar(image, ax=axes, label="linear CKA", pad=0.02)
    return Picture(figure, {"cka": cka}, {"first to last": float(cka[0, -1])})


def class_tokens(model: Model) -> Picture:
    """Images as points in the plane of the first two principal components, colored by class."""
    if min(model.probe.pooled.shape) < 2:
        raise NotApplicable("two principal components need two images and a width of at least 2")
    _, points, singular_values = explain.principal_components(model.probe.pooled, 2)
    shares = (singular_values**2 / (singular_values**2).sum())[:2].numpy()  # of the variance
    points, labels = points.numpy(), model.probe.labels.numpy()  # (n, 2), (n,)
    what = {"class": "class tokens", "mean": "mean patch tokens"}[model.config.pooling]
    present, sizes = np.unique(labels, return_counts=True)
    named = present[np.argsort(-sizes, kind="stable")[: 20 if len(present) <= 20 else 10]]
    caption = (
        f"The final {what}, normalized, of {_probed(model)}, in the plane of most variance. "
        "Classes that overlap here may be separate in other dimensions."
    )
    if len(named) < len(present):
        caption += " The ten classes of most images are named; gray are the others."
    figure = new_figure(5.2, 3.6, "Input of the head, by true class", caption)
    axes = figure.subplots()
    markers = "os^vDP*Xph"
    for label in sorted(present, key=lambda label: label in named):
        at = points[labels == label]
        # Beyond ten classes, the colors repeat with other markers.
        axes.plot(
            at[:, 0], at[:, 1], markers[(label + label // 10) % len(markers)], ms=4, alpha=0.8,
            mew=0, color=matplotlib.colormaps["tab10"](label % 10) if label in named else "0.7",
            label=shown(model.classes[label]) if label in named else None,
        )  # fmt: skip
    for set_label, axis in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
        set_label(f"principal component {axis + 1} ({shares[axis]:.0%} of the variance)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(figure, {"points": points, "labels": labels, "shares": shares})
