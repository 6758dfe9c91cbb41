"""Draws results/trend/trend.png: what more operations and another width gain on CIFAR-10.

    python experiments/trend.py

Left, the error of every recorded run against the floating-point operations of its training, and a
power law through the best of each budget. Right, accuracy against width at two budgets, mean and
standard deviation of three seeds. All on the validation images, of runs on two CPU cores.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "visualization"))
sys.path.insert(0, str(ROOT / "src"))

import style
from ablation import STUDIES, Study, results_of
from config import Parser
from utils import run_program

# The best run of each study, all older than `shipped`. The last is the best of 22 runs of one seed,
# so that the law promises too much (docs/recipe.md).
FITTED = {"size": "width-48", "shape": "width-64", "trend": "combined-muon-low"}
RUNS = {
    "cpu, before": "cpu/earlier",
    "shipped, before": "shipped/before",
    "cpu, seed 0": "cpu/seed0",
    "shipped, width 160": "shipped/width-160",
    "shipped, 110 epochs": "shipped/epochs-110",
    "shipped, 130 epochs": "shipped/epochs-130",
    "shipped": "shipped",
}


class Point(NamedTuple):
    """A change, over its seeds."""

    flops: float
    error: float  # percent of the validation images
    deviation: float
    width: int


def point_of(results: list[dict[str, Any]]) -> Point:
    errors = [100 * (1 - result["validation_accuracy"]) for result in results]
    deviation = statistics.stdev(errors) if len(errors) > 1 else 0.0
    first = results[0]
    return Point(
        first["training_flops"], statistics.mean(errors), deviation, first["model"]["width"]
    )


def points_of(study: Study) -> dict[str, Point]:
    """The changes of a study that were run."""
    found = {change: results_of(study, change) for change in study.changes}
    return {change: point_of(results) for change, results in found.items() if results}


def power_law(points: list[Point]) -> tuple[float, float]:
    """c and b of error = c flops^-b, by least squares of the logarithms."""
    slope, intercept = np.polyfit(
        np.log([point.flops for point in points]), np.log([point.error for point in points]), 1
    )
    return float(np.exp(intercept)), float(-slope)


def draw_operations(axes: Axes, studies: dict[str, dict[str, Point]]) -> None:
    for (name, points), color in zip(studies.items(), ("0.7", "0.5", "tab:blue"), strict=True):
        flops, errors = zip(*((p.flops, p.error) for p in points.values()), strict=True)
        axes.plot(flops, errors, "o", ms=3, color=color, label=f"ablation.py {name}")
    for (name, folder), marker in zip(RUNS.items(), "sDv^X*P", strict=True):
        result = json.loads((ROOT / "results" / folder / "result.json").read_text())
        point = point_of([result])
        axes.plot(point.flops, point.error, marker, ms=5, color="tab:orange", label=name)
    c, b = power_law([studies[study][change] for study, change in FITTED.items()])
    flops = np.geomspace(1e13, 2e16, 50)
    law = f"best of each study: error $\\propto$ operations$^{{-{b:.2f}}}$"
    axes.plot(flops, c * flops**-b, "--", color="0.3", linewidth=1, label=law)
    print(f"error = {c:.3g} x operations^-{b:.4f}")
    for budget in (1e15, 1e16):
        print(f"{budget:.0e} operations: {100 - c * budget**-b:.1f}% validation accuracy")
    axes.set(xscale="log", yscale="log", xlabel="operations of the training (FLOP)")
    axes.set_ylabel("validation error (%)")
    axes.set_yticks([5, 7, 10, 15, 20, 30], [5, 7, 10, 15, 20, 30])
    axes.set_ylim(bottom=3.5)  # room for the legend
    axes.minorticks_off()
    axes.legend(loc="lower left")


def draw_widths(axes: Axes, studies: dict[str, dict[str, Point]]) -> None:
    for (study, name), color in zip(
        {"size": "1.4e13 operations", "shape": "4.3e13 operations"}.items(),
        ("0.5", "tab:blue"),
        strict=True,
    ):
        chosen = [
            point
            for change, point in studies[study].items()
            if change == "none" or change.startswith("width")
        ]
        widths, accuracies, deviations = zip(
            *sorted((p.width, 100 - p.error, p.deviation) for p in chosen), strict=True
        )
        look = {"marker": "o", "ms": 3, "capsize": 2, "color": color}
        axes.errorbar(widths, accuracies, deviations, label=name, **look)
    axes.set(xscale="log", xlabel="width D", ylabel="validation accuracy (%)")
    axes.set_xticks([48, 64, 96, 128, 160, 256], [48, 64, 96, 128, 160, 256])
    axes.minorticks_off()
    axes.legend(loc="lower left")


@style.styled
def draw() -> Figure:
    studies = {name: points_of(STUDIES[name]) for name in FITTED}
    figure = style.new_figure(7.4, 3.2, "")
    left, right = figure.subplots(1, 2)
    draw_operations(left, studies)
    draw_widths(right, studies)
    return figure


def main(argv: list[str]) -> int:
    Parser(prog="trend.py", description=__doc__).parse_args(argv)
    style.save(draw(), ROOT / "results/trend/trend.png", 220)
    return 0


if __name__ == "__main__":
    run_program(main)
