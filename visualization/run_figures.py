"""Figures of a model's predictions for a whole split."""

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import PercentFormatter

import explain
from curves import shown
from model import Model
from style import (
    IN_CELL,
    SMALLEST,
    WIDEST,
    NotApplicable,
    Picture,
    new_figure,
    show_picture,
    to_picture,
)

MISTAKES = 24


def confusion(model: Model) -> Picture:
    """The predicted classes (columns) of each true class (rows), in percent of the row."""
    labels, predictions = model.split.labels, model.probabilities.argmax(dim=1)
    K = len(model.classes)
    counts = explain.confusion_matrix(labels, predictions, K).cpu().numpy()
    accuracy = float(counts.trace() / counts.sum())
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    title = f"Accuracy {accuracy:.2%} on {len(labels):,} {model.of_split}"
    caption = "Rows sum to 100%. The diagonal is the accuracy of each class."
    side, beside = (min(max(0.42 * K, 3), WIDEST - 1.6), 1.6) if K <= 20 else (4, 3.4)
    figure = new_figure(side + beside, side + 1, title, caption)
    norm = PowerNorm(0.4, 0, 100)  # or the mistakes would all be black
    if K <= 20:
        axes = figure.subplots()
        for (row, column), value in np.ndenumerate(share):
            text, color = f"{value:.0f}", "black" if norm(value) > 0.6 else "white"
            axes.text(column, row, "·" if text == "0" else text, color=color, **IN_CELL)
        names = [shown(name, 20) for name in model.classes]
        axes.set_xticks(range(K), names, rotation=45, ha="right")
        axes.set_yticks(range(K), names)
    else:
        axes, right = figure.subplots(1, 2, width_ratios=(1, 0.6))
        right.set_axis_off()
        text = "\n".join(["most frequent confusions", "", *confusions(model, counts)])
        right.text(0, 1, text, va="top", size=SMALLEST, transform=right.transAxes)
    image = axes.imshow(share, cmap="magma", norm=norm)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8, pad=0.02)
    return Picture(figure, {"counts": counts}, {"accuracy": accuracy})


def confusions(model: Model, counts: np.ndarray) -> list[str]:
    """The ten most frequent confusions in counts (K, K), by name."""
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    pairs = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None)[:10]]
    return [
        f"{shown(model.classes[true])} as\n    {shown(model.classes[other])}: {wrong[true, other]}"
        for true, other in pairs
        if wrong[true, other]
    ]


def mistakes(model: Model) -> Picture:
    """The wrong predictions that the model is most confident of."""
    labels, probabilities = model.split.labels, model.probabilities
    chosen = explain.confident_mistakes(probabilities, labels, MISTAKES)
    if not len(chosen):
        raise NotApplicable(f"the model makes no mistakes on the {model.of_split}")
    confidence, predictions = probabilities[chosen].max(dim=1)
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    title = f"Most confident mistakes on {len(labels):,} {model.of_split}"
    caption = "Above each image: the true class, then the prediction and its probability."
    figure = new_figure(max(1.15 * columns, 4), 1.5 * rows + 0.4, title, caption)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    parts = model.split.take(chosen).images, labels[chosen], predictions, confidence
    for axes, image, label, prediction, share in zip(grid.flat, *parts, strict=False):
        true, other = (shown(model.classes[k], 18) for k in (label, prediction))
        name = f"{true} as\n{other} {share:.1%}"
        show_picture(axes, to_picture(image), name)
        axes.title.set_fontsize(SMALLEST)
    arrays = {"rows": chosen, "predictions": predictions, "confidence": confidence}
    return Picture(figure, {name: values.cpu().numpy() for name, values in arrays.items()})


def reliability(model: Model) -> Picture:
    """Accuracy against confidence in each bin, and the bin's number of images."""
    confidence, predictions = model.probabilities.max(dim=1)
    result = explain.calibration(confidence.cpu(), (predictions == model.split.labels).cpu())
    accuracy, mean, counts = (values.numpy() for values in result[:3])  # (bins,)
    bins = len(counts)
    caption = (
        f"ECE {result.error:.2%}: the mean distance of the {bins} bins' dots from the diagonal, "
        "weighted by the images in each bin. Below the diagonal the model is overconfident. Bars: "
        "95% Wilson intervals."
    )
    figure = new_figure(3.8, 4.4, f"Calibration on {model.of_split}", caption)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    filled = counts > 0
    x, y = mean[filled], accuracy[filled]
    low, high = wilson_interval(y, counts[filled])
    bars = np.stack([y - low, high - y]).clip(min=0)
    above.errorbar(x, y, bars, fmt="o", ms=4, color="tab:blue", elinewidth=1, label="one bin")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left")
    below.bar(np.arange(bins) / bins, counts, 1 / bins, align="edge", color="0.6")
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    for axis in (above.xaxis, above.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    arrays = {"accuracy": accuracy, "confidence": mean, "counts": counts}
    return Picture(figure, arrays, {"ECE": result.error})


def wilson_interval(share: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95% intervals for shares of n images, n at least 1 (Wilson, 1927)."""
    z2 = 1.96**2
    center = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = np.sqrt(z2 * (share * (1 - share) / counts + z2 / (4 * counts**2))) / (1 + z2 / counts)
    return center - half, center + half
