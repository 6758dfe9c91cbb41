"""Draws results/trend/trend.png: accuracy on CIFAR-10 against the operations of training.

    python experiments/trend.py

The test accuracy of the runs recorded here, beside published ones of other plain ViTs that saw
no other data. Operations are the floating-point operations of training: 6 x multiply-adds of a
forward pass x images seen. For the sources, and what their accuracies are, see docs/related.md.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from config import Parser
from curves import write_figure
from utils import run_program


class Point(NamedTuple):
    """An accuracy in percent, and the offset of its label in points, to the right and up."""

    operations: float
    accuracy: float
    name: str
    dx: float = 5
    dy: float = -2


PUBLISHED = (
    Point(3.5e15, 86.09, "s-chh, fixed sines"),
    Point(3.5e15, 88.49, "s-chh, rotary"),
    Point(3.5e15, 90.57, "s-chh, Shaw"),
    Point(1.2e16, 92.58, "CVT-6/4", -36, 2),
    Point(1.4e16, 92.43, "CVT-7/4"),
    Point(1.4e16, 91.38, "ViT-Lite-7/4"),
    Point(1.7e16, 93.58, "SPT_LSA's ViT", -62, 2),
    Point(2.3e16, 94.01, "CVT-7/4, paper"),
    Point(2.6e16, 90.92, "ViT-CIFAR", 5, -6),
    Point(1e17, 95.66, "vitookit, ViT-Ti/2", -78, 2),
)
# Folders of results/, with the seeds that are averaged.
OURS = {
    "cpu": ("cpu/seed0", "cpu/seed1", "cpu/seed2"),
    "core": ("core",),
    "shipped": ("shipped",),
}
STYLE = {"font.size": 8, "legend.fontsize": 8, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def point_of(name: str, folders: tuple[str, ...]) -> Point:
    """The operations of a run, and its test accuracy averaged over the seeds."""
    files = [ROOT / "results" / folder / "result.json" for folder in folders]
    results = [json.loads(file.read_text()) for file in files]
    accuracy = statistics.mean(100 * result["test_accuracy"] for result in results)
    return Point(results[0]["training_flops"], accuracy, name, -5, 5)


def draw() -> Figure:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=200)
    axes, ours = figure.subplots(), [point_of(*run) for run in OURS.items()]
    kinds = [(ours, "this repository", "o-", "tab:blue", "right")]
    kinds += [(PUBLISHED, "published", "x", "0.35", "left")]
    for points, label, style, color, side in kinds:
        x, y = zip(*((point.operations, point.accuracy) for point in points), strict=True)
        axes.plot(x, y, style, markersize=5, color=color, label=label)
        for point in points:
            axes.annotate(
                point.name, point[:2], (point.dx, point.dy), textcoords="offset points",
                fontsize=7, color=color, horizontalalignment=side,
            )  # fmt: skip
    axes.set(xscale="log", xlabel="floating-point operations of the training", xlim=(5e13, 3e17))
    axes.set(ylabel="CIFAR-10 test accuracy (%)", ylim=(84, 97))
    axes.grid(axis="y", color="0.92")
    axes.legend(loc="upper left")
    return figure


def main(argv: list[str]) -> int:
    Parser(prog="trend.py", description=__doc__).parse_args(argv)
    with matplotlib.rc_context(STYLE):
        write_figure(ROOT / "results/trend/trend.png", draw())
    return 0


if __name__ == "__main__":
    run_program(main)
