"""What surrounds training: checkpoints, the run log, seeding, and flags made from dataclasses."""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import io
import json
import os
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from checks import (
    CHECKPOINT,
    CHECKPOINT_FORMAT,
    METRICS,
    OPTIMIZER_STATE,
    check_content,
    check_fields,
    sound_copy,
)
from ViT import ViT, ViTConfig

ROOT = Path(__file__).resolve().parent.parent  # the repository, whatever the current folder is


# ---------------------------------------------------------------------------- checkpoints


_WRITTEN = ("format", "versions")  # by `save_checkpoint` itself


class CheckpointError(Exception):
    """A file is no checkpoint of this repository; the message is one line for the user."""


def save_checkpoint(path: Path, **content: Any) -> None:
    """Writes a checkpoint of plain containers and tensors, whole or not at all.

    Args:
        content: everything in `CHECKPOINT` but what is `_WRITTEN` here.

    Raises:
        OSError: the file cannot be written; one that was there is still there.
    """
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    versions = {name: str(version) for name, version in versions.items()}
    checkpoint = content | {"format": CHECKPOINT_FORMAT, "versions": versions}
    assert checkpoint.keys() == CHECKPOINT.keys(), checkpoint.keys() ^ CHECKPOINT.keys()
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getbuffer())


def save_model(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes the model of a checkpoint alone: the evaluated weights, in half precision.

    `load_model` reads it like any other, into float32; a run cannot go on from it.

    Raises:
        OSError: as in `save_checkpoint`.
        CheckpointError: a weight is too large for half precision.
    """
    weights = checkpoint[evaluated_weights(checkpoint)]
    halves = {name: weight.half() for name, weight in weights.items()}
    if not all(half.isfinite().all() for half in halves.values()):
        raise CheckpointError(f"{path} cannot hold weights above 65,504 in half precision")
    kept = {name: value for name, value in checkpoint.items() if name not in _WRITTEN}
    without = {"averaged": {}, "optimizers": [], "partial": {}}
    save_checkpoint(path, **kept | without | {"weights": halves})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, running nothing that is in it and believing none of it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds what `save_checkpoint`
            would not have written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file")
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(sound_copy(file), map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail in any way inside zipfile and torch.load
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged") from error
    try:
        check_content(checkpoint)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no checkpoint to use: {reason[:300]}") from error
    return checkpoint


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ViT, dict[str, Any]]:
    """Rebuilds the model that a checkpoint holds, from the file alone.

    Returns:
        The model, with the averaged weights where there are any, in evaluation mode on `device`,
        and the checkpoint (class names, mean, std, ...).

    Raises:
        CheckpointError: the file is no checkpoint, or its parts do not fit together.
    """
    checkpoint = load_checkpoint(path)
    return build_model(checkpoint, evaluated_weights(checkpoint), device).eval(), checkpoint


def evaluated_weights(checkpoint: dict[str, Any]) -> str:
    """Which weights of a checkpoint count: the averaged ones where there are any."""
    return "averaged" if checkpoint["averaged"] else "weights"


def build_model(checkpoint: dict[str, Any], weights: str, device: torch.device | str) -> ViT:
    """The model of a checkpoint with its "weights" or its "averaged" ones."""
    model = ViT(ViTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint[weights])
    return model.to(device)


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """Brings back what optimizers remember of each of their parameters; their options stay.

    Raises:
        ValueError: it is not what such optimizers remember of such parameters.
    """
    if len(states) != len(optimizers):
        raise ValueError(f"it has {len(states)} optimizers, not {len(optimizers)}")
    for optimizer, state in zip(optimizers, states, strict=True):
        name = type(optimizer).__name__
        parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
        check_fields(state, dict.fromkeys(range(len(parameters)), dict[str, Tensor]), name)
        for number, weight in enumerate(parameters):
            check_fields(state[number], dict.fromkeys(OPTIMIZER_STATE[name], Tensor), name)
            for key, value in state[number].items():
                if value.shape != (() if key == "step" else weight.shape):
                    raise ValueError(f"{key!r} of {name} has shape {tuple(value.shape)}")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    A process that is killed on the way leaves a temporary file; see `remove_partial_files`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Has a rename in a folder outlive a loss of power, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows opens no folders; the rename itself is done
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial_files(folder: Path, names: Iterable[str]) -> None:
    """Removes what killed runs left of these files; only who locked the folder may."""
    for name in names:
        for file in folder.glob(f".{name}.*.part"):
            file.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the run log


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv: a row for each epoch."""
    rows = ({name: _short(value) for name, value in row.items()} for row in history)
    write_table(path, METRICS, rows)


def write_table(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes a CSV file with a line of names and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes result.json and the like; what JSON has no word for, say a path, as its text."""
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_curves(path: Path, history: list[dict[str, float]], title: str) -> None:
    """curves.png: loss, accuracy and learning rate against the epoch."""
    figure = Figure(figsize=(10, 3.2), layout="constrained", dpi=150)
    figure.suptitle(title)
    draw_curves(figure, history)
    write_figure(path, figure)


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a figure in the format that the path's ending names.

    Args:
        options: of matplotlib's savefig.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_whole(path, buffer.getbuffer())


def draw_curves(figure: Figure, history: list[dict[str, float]]) -> None:
    """Draws into an empty figure.

    The training curves are of augmented images and smoothed labels, as the model met them.
    """
    losses, accuracies, rates = figure.subplots(1, 3)

    def curve(axes, name: str, label: str | None = None, scale: float = 1.0, **style) -> None:
        points = [(row["epoch"], scale * row[name]) for row in history if row[name] is not None]
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


def _short(value: float | None) -> float | str | None:
    return f"{value:.6g}" if isinstance(value, float) else value


# ---------------------------------------------------------------------------- seeding


def seed_for(*key: int) -> int:
    """A seed that depends on the key alone, say (seed, epoch), so a draw can be redone."""
    (state,) = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1, np.uint64)
    return int(state) >> 1  # a seed must fit into an int64


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the key alone."""
    return torch.Generator(device).manual_seed(seed_for(*key))


# ---------------------------------------------------------------------------- the command line


class UsageError(Exception):
    """What a user asks for cannot be; the message is one line for the user."""


def run_program(main: Callable[[list[str]], int]) -> typing.NoReturn:
    """Ends the process with what `main` returns for its command line.

    With 130 after Ctrl-C, and 141 once nobody reads its output any more, as after `| head`.
    """
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        status = 141
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest flag for a misspelt one."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2]
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists all)"
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(group: argparse._ArgumentGroup, config: Any) -> None:
    """Adds a flag for each field of a config, with its value there as the default that help shows.

    A field is declared as `name: Annotated[type, "help"]`. A flag that is not given leaves nothing
    in the parsed arguments, so that `given` can tell.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        kind, text = typing.get_args(hint)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "type": kind}
        if kind is bool:
            options = {"default": argparse.SUPPRESS, "action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": typing.get_args(kind), "type": str}
        elif isinstance(kind, types.UnionType):  # int | tuple[int, int]
            options |= {"type": _height_and_width, "metavar": "PIXELS"}
        else:
            options |= {"metavar": kind.__name__.upper()}
        value = getattr(config, name)
        shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
        group.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({shown})", **options)


def given(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields of a config class that the command line gave a value."""
    names = (field.name for field in dataclasses.fields(config_class))
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _height_and_width(text: str) -> tuple[int, int]:
    """'32' or '32x48'."""
    try:
        height, width = (int(part) for part in (text.split("x") * 2)[:2])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 32 or 32x48") from None
    return height, width


def existing_path(text: str) -> Path:
    """A path as given, or, where there is nothing, the same inside the repository."""
    path = Path(text)
    return path if path.exists() else ROOT / text
