"""Tests of the explanations: remove patches in the order of each map, and silence heads."""

from typing import Any

import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import explain
from data import Batch, Split
from evaluation import predict
from model import PROBE_BATCH, Model
from run_figures import wilson_interval
from style import IN_CELL, SMALLEST, NotApplicable, Picture, new_figure, signed

SHARES = 8  # steps of a curve, each an eighth of the patches
RANDOM_ORDERS = 10
RANDOM = "random order"
CURVES = ("deletion", "insertion", "deletion accuracy", "insertion accuracy")


def maps(model: Model) -> Picture:
    """Deletion and insertion curves of every map, and of random orders."""
    if model.config.patches < 2:
        raise NotApplicable("with a single patch there is nothing to order")
    rows = model.sample(model.split, model.options.images)
    parts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(model.options.seed)
    batches = model.split.batches(rows.split(PROBE_BATCH))
    for batch in tqdm(batches, total=-(-len(rows) // PROBE_BATCH), disable=None, leave=False):
        for name, curves in curves_of(model, batch, generator).items():
            parts.setdefault(name, []).append(curves.cpu())
    measured = {name: torch.cat(part, dim=1) for name, part in parts.items()}  # (4, n, SHARES)
    areas = {name: areas_of(curves) for name, curves in measured.items()}
    print("\n".join(table(areas)))

    best = min((name for name in areas if name != RANDOM), key=lambda n: areas[n]["deletion"])
    lost = {"drop": "dropped", "mean": "painted in the mean color", "black": "painted black"}
    caption = (
        "Probability of the class predicted for the whole image, as patches are "
        f"{lost[model.options.removal]}, in the order of each map and in {RANDOM_ORDERS} "
        "random orders (gray). Left, the most important are removed first: lower is better, "
        f"and lowest for {best}. Right, only the most important are left: higher is better."
    )
    title = f"Which patches matter: {len(rows)} {model.of_split}"
    figure = new_figure(7.4, 3.2, title, caption)
    left, right = figure.subplots(1, 2, sharey=True)
    markers = list("os^vDPX")
    for name in sorted(areas, key=lambda name: sum(areas[name]["deletion_interval"])):
        deletion, insertion = measured[name][:2].mean(dim=1).numpy()  # (SHARES,)
        low, high = areas[name]["deletion_interval"]
        style = {"marker": markers.pop()}
        style |= {"color": "0.6", "linestyle": "--"} if name == RANDOM else {}
        label = f"{name}: {low:.2f} to {high:.2f}"
        shares = np.arange(SHARES)
        left.plot(shares / SHARES, deletion, ms=4, label=label, **style)
        right.plot((shares + 1) / SHARES, insertion, ms=4, **style)
    left.set(xlabel="patches removed, most important first", ylabel="probability of the class")
    right.set(xlabel="patches present, most important first", ylim=(0, 1))
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlim(0, 1)
    legend = {"title": "area on the left, 95% interval", "title_fontsize": SMALLEST}
    right.legend(*left.get_legend_handles_labels(), loc="lower right", **legend)
    arrays = {name.replace(" ", "_"): curves.numpy() for name, curves in measured.items()}
    return Picture(figure, arrays, {"images": len(rows), "areas": areas})


def curves_of(model: Model, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """For each map, (4, B, SHARES): probability by deletion and by insertion, then accuracy.

    Args:
        generator: draws the random orders.
    """
    images = model.normalize(batch.images)
    with torch.no_grad():
        targets = model.vit(images).argmax(dim=1)
    maps = explain.explanations(model.vit, images, targets, model.options.start_layer - 1)
    maps["gradient x input"] = explain.gradient_times_input(model.vit, images, targets)
    fill, curves = fill_of(model), {}
    for name, several in orders_of(maps, RANDOM_ORDERS, generator).items():
        found = []
        for order in several:
            inserted, deleted = (
                explain.kept_probabilities(model.vit, images, targets, each, SHARES, fill)
                for each in (order, order.flip(1))
            )
            pairs = zip(deleted, inserted, strict=True)
            found.append(torch.stack([x.float() for a, b in pairs for x in (a.flip(1), b)]))
        curves[name] = torch.stack(found).mean(dim=0)  # over the random orders
    return curves


def orders_of(
    maps: dict[str, Tensor], draws: int, generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """Patches (B, N) in the order of each map, most important first, and in random orders."""
    flat = {name: values.flatten(1) for name, values in maps.items()}
    orders = {name: [values.argsort(dim=1, descending=True)] for name, values in flat.items()}
    like = flat["attention"]
    random = torch.rand(draws, *like.shape, generator=generator).argsort(dim=2)
    return orders | {RANDOM: list(random.to(like.device))}


def fill_of(model: Model) -> Tensor | None:
    """What --removal puts in place of a patch: a normalized pixel (C, 1, 1); None drops it."""
    black = model.normalize(torch.zeros(1, model.config.channels, 1, 1, dtype=torch.uint8))[0]
    mean = torch.zeros_like(black)  # once normalized
    return {"drop": None, "mean": mean, "black": black}[model.options.removal]


def areas_of(curves: Tensor) -> dict[str, Any]:
    """The mean height of a map's four curves (4, n, SHARES), with intervals over the images."""
    areas = dict(zip(CURVES, explain.area(curves), strict=True))
    means = {name: values.mean().item() for name, values in areas.items()}
    intervals = {f"{n}_interval": explain.bootstrap_interval(v) for n, v in areas.items()}
    return means | intervals


def table(areas: dict[str, dict[str, Any]]) -> list[str]:
    """The areas of all maps in Markdown, the lowest deletion first."""
    lines = [f"| map | {' | '.join(CURVES)} |", "|---" * (1 + len(CURVES)) + "|"]
    for map_name, values in sorted(areas.items(), key=lambda item: item[1]["deletion"]):
        cells = []
        for name in CURVES:
            low, high = values[f"{name}_interval"]
            cells.append(f"{values[name]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {map_name} | {' | '.join(cells)} |")
    return lines


def heads(model: Model) -> Picture:
    """The accuracy lost without each head, and the accuracy as more and more are removed."""
    rows = model.sample(model.split, model.options.images)
    sampled = Split(*model.split.take(rows))

    def hits_and_loss() -> tuple[Tensor, float]:
        logits = predict(model.vit, sampled, model.checkpoint.preprocessing)
        loss = cross_entropy(logits, sampled.labels).item()
        return (logits.argmax(dim=1) == sampled.labels).cpu(), loss

    worth = explain.head_worth(model.vit, hits_and_loss)
    lost = 100 * worth.lost.double().mean(dim=2).numpy()  # (L, h) points
    intervals = [explain.bootstrap_interval(each) for each in worth.lost.flatten(0, 1)]
    intervals = 100 * np.reshape(intervals, (*lost.shape, 2))
    sure = (intervals[..., 0] > 0) | (intervals[..., 1] < 0)
    pruned = worth.pruned.double().mean(dim=1).numpy()  # (L h + 1,)
    low, high = (100 * end for end in wilson_interval(pruned, np.full(len(pruned), len(rows))))
    caption = (
        f"Left: accuracy lost, out of {pruned[0]:.1%}, if the output of one head is zero; gray "
        "where its 95% bootstrap interval contains 0. The darkest color is the largest end of an "
        "interval. Right: accuracy as more heads are removed, the least useful first, ranked on "
        "the same images, which flatters it; band: 95% Wilson intervals. Heads that can replace "
        "each other look useless one by one."
    )
    title = f"What a head is worth: {len(rows)} {model.of_split}"
    figure = new_figure(7.4, 2.8, title, caption)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    most = max(float(np.abs(intervals).max()), 1e-3)
    image = left.imshow(lost, aspect="auto", **signed(most))
    for (row, column), value in np.ndenumerate(lost):
        color = "0.55" if not sure[row, column] else "white" if abs(value) > 0.6 * most else "black"
        left.text(column, row, f"{value:.1f}", color=color, **IN_CELL)
    L, h = lost.shape
    left.set_xticks(range(h), range(1, h + 1))
    left.set_yticks(range(L), range(1, L + 1))
    left.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=left, label="accuracy lost (points)")
    right.plot(range(len(pruned)), 100 * pruned, marker=".")
    right.fill_between(range(len(pruned)), low, high, alpha=0.2, linewidth=0)
    right.set(xlabel="heads removed, least useful first", ylabel="accuracy (%)")
    right.set_ylim(bottom=0)
    arrays = {"lost": lost, "intervals": intervals, "pruned": pruned}
    numbers = {"images": len(rows), "accuracy": float(pruned[0]), "most": float(lost.max())}
    return Picture(figure, arrays, numbers)
