"""curves.png: loss, accuracy and learning rate of a run; imported only when a run ends."""

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import EpochRecord, write_whole


def write_curves(path: Path, history: list[EpochRecord], title: str) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained", dpi=150)
    figure.suptitle(title)
    draw_curves(figure, history)
    write_figure(path, figure)


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a figure in the format of the path's extension; the options are savefig's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_whole(path, buffer.getbuffer())


def draw_curves(figure: Figure, history: list[EpochRecord]) -> None:
    """Draws into an empty figure.

    The training curves are of augmented images and smoothed labels, as the model met them.
    """
    losses, accuracies, rates = figure.subplots(1, 3)

    def curve(axes, name: str, label: str | None = None, scale: float = 1.0, **style) -> None:
        points = [(row.epoch, getattr(row, name)) for row in history]
        points = [(epoch, scale * value) for epoch, value in points if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    curve(losses, "train_loss", "training, as augmented", marker=".")
    curve(accuracies, "train_accuracy", "training", 100, marker=".")
    curve(rates, "learning_rate", color="tab:gray")
    curve(losses, "validation_loss", "validation", marker=".")
    curve(accuracies, "validation_accuracy", "validation", 100, marker=".")
    labels = ("loss (nats)", "accuracy (%)", "learning rate at the epoch's end")
    for axes, label in zip((losses, accuracies, rates), labels, strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    losses.legend(frameon=False)
