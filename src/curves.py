"""curves.png: loss, accuracy and learning rate of a run; imported only when a run ends."""

import io
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from checkpoint import EpochRecord
from recipes import TrainConfig
from utils import write_whole

# A user's matplotlibrc may ask for something that is not installed, such as TeX.
PLAIN = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}


def shown(name: str, most: int = 28) -> str:
    """A class or file name as text, its middle left out beyond `most` characters.

    Control characters and those that the font cannot draw are escaped.
    """
    has = get_font(findfont(FontProperties())).get_char_index

    def drawable(c: str) -> bool:
        return c == " " or bool(unicodedata.category(c)[0] not in "CZ" and has(ord(c)))

    parts = (c if drawable(c) else c.encode("unicode_escape").decode() for c in name)
    text, half = "".join(parts), (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a figure in the format of the path's extension; the options are savefig's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_whole(path, buffer.getbuffer())


def changes(training: TrainConfig) -> dict[int, list[str]]:
    """What ends before the last epoch, by the number of epochs after which it ends."""
    epochs = training.epochs
    ends = {
        "TrivialAugment": training.policy_off_epochs if training.policy != "off" else 0,
        "mixing": training.mixing_off_epochs if training.mixup or training.cutmix else 0,
        "patch dropout": training.whole_epochs if training.patch_dropout else 0,
    }
    times = sorted({before for before in ends.values() if 0 < before < epochs}, reverse=True)
    return {epochs - time: [name for name, end in ends.items() if end == time] for time in times}


@matplotlib.rc_context(PLAIN)
def write_curves(path: Path, history: list[EpochRecord], training: TrainConfig, title: str) -> None:
    """Draws the curves of a run into a file.

    Training curves are of augmented images and smoothed labels, as the model sees them.
    Vertical lines mark where an augmentation ends.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=150)
    figure.suptitle(shown(title, 110), parse_math=False)
    losses, accuracies, rates = figure.subplots(1, 3)

    def curve(axes, name: str, label: str | None = None, scale: float = 1.0, **style) -> None:
        points = [(row.epoch, getattr(row, name)) for row in history]
        points = [(epoch, scale * value) for epoch, value in points if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    smoothed = "smoothed labels" if training.label_smoothing else "augmented"
    curve(losses, "train_loss", f"training, {smoothed}", marker=".")
    curve(accuracies, "train_accuracy", "training", 100, marker=".")
    curve(rates, "learning_rate", color="tab:gray")
    curve(losses, "validation_loss", "validation", marker=".")
    curve(accuracies, "validation_accuracy", "validation", 100, marker=".")
    labels = ("loss (nats)", "accuracy (%)", "learning rate")
    ends = changes(training)
    for axes, label in zip((losses, accuracies, rates), labels, strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        for after, style in zip(ends, ("--", ":", "-."), strict=False):
            label = f"end of {' and '.join(ends[after])}"
            axes.axvline(after, color="0.5", linewidth=1, linestyle=style, label=label)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write_figure(path, figure)
