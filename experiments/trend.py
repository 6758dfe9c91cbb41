"""Draws results/trend/trend.png: what more operations gain on CIFAR-10.

    python experiments/trend.py

The validation error of every recorded run, on CPU cores, against the floating-point operations of
its training, and a power law through the best of each study.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from config import Parser
from curves import write_figure
from study import STUDIES, results_of
from utils import run_program

# The best run of each study, all older than `shipped`. The last is the best of 22 runs of one seed,
# so that the law promises too much (docs/recipe.md).
FITTED = {"size": "width-48", "shape": "width-64", "trend": "combined-muon-low"}
RUNS = ("cpu/earlier", "shipped/before", "cpu/seed0", "shipped/width-160", "shipped/epochs-110")
RUNS += ("shipped/epochs-130", "shipped")
STYLE = {"font.size": 8, "legend.fontsize": 7, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def point_of(results: list[dict[str, Any]]) -> tuple[float, float]:
    """Operations of a run, and percent of the validation images it misses, mean over its seeds."""
    errors = [100 * (1 - result["validation_accuracy"]) for result in results]
    return results[0]["training_flops"], statistics.mean(errors)


def points_of(study: str) -> dict[str, tuple[float, float]]:
    """The changes of a study that were run."""
    found = {change: results_of(STUDIES[study], change) for change in STUDIES[study].changes}
    return {change: point_of(results) for change, results in found.items() if results}


def power_law(points: list[tuple[float, float]]) -> tuple[float, float]:
    """c and b of error = c flops^-b, by least squares of the logarithms."""
    slope, intercept = np.polyfit(*np.log(points).T, 1)
    return float(np.exp(intercept)), float(-slope)


def draw() -> Figure:
    """The figure; prints the law and what it forecasts."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained", dpi=220)
    axes, studies = figure.subplots(), {name: points_of(name) for name in FITTED}
    for (name, points), color in zip(studies.items(), ("0.7", "0.5", "tab:blue"), strict=True):
        axes.plot(
            *zip(*points.values(), strict=True), "o", ms=3, color=color, label=f"study {name}"
        )
    for name, marker in zip(RUNS, "sDv^X*P", strict=True):
        result = json.loads((ROOT / "results" / name / "result.json").read_text())
        axes.plot(*point_of([result]), marker, ms=5, color="tab:orange", label=name)
    c, b = power_law([studies[study][change] for study, change in FITTED.items()])
    flops = np.geomspace(1e13, 2e16, 50)
    law = f"best of each study: error $\\propto$ operations$^{{-{b:.2f}}}$"
    axes.plot(flops, c * flops**-b, "--", color="0.3", linewidth=1, label=law)
    print(f"error = {c:.3g} x operations^-{b:.4f}")
    for budget in (1e15, 1e16):
        print(f"{budget:.0e} operations: {100 - c * budget**-b:.1f}% validation accuracy")
    axes.set(xlabel="operations of the training (FLOP)", ylabel="validation error (%)")
    axes.set(xscale="log", yscale="log", ylim=(3.5, None))  # with room for the legend
    axes.set_yticks([5, 7, 10, 15, 20, 30], [5, 7, 10, 15, 20, 30])
    axes.minorticks_off()
    axes.legend(loc="lower left")
    return figure


def main(argv: list[str]) -> int:
    Parser(prog="trend.py", description=__doc__).parse_args(argv)
    with matplotlib.rc_context(STYLE):
        write_figure(ROOT / "results/trend/trend.png", draw())
    return 0


if __name__ == "__main__":
    run_program(main)
