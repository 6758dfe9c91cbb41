"""What surrounds training: checkpoints, the run log, seeding, and flags made from dataclasses."""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
import types
import typing
import warnings
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
from processes import ALONE, World
from ViT import ViT, ViTConfig, patches_kept

_IMPORTED = time.perf_counter()
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


def remove_partial_files(folder: Path) -> None:
    """Removes what killed runs left of files they were writing; only who locked a folder may."""
    for file in folder.glob(".*.part"):
        file.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the run log


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv: a row for each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(METRICS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _short(value) for name, value in row.items()} for row in history)
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


def write_figure(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
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


# ---------------------------------------------------------------------------- the machine


class UsageError(Exception):
    """What a user asks for cannot be; the message is one line for the user."""


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_device(name: str | None, world: World = ALONE) -> torch.device:
    """The named device, or the best there is; of several ranks, each on a GPU of its own.

    Raises:
        UsageError: this machine does not have it.
    """
    if world.size > 1:
        if name not in (None, "cuda", "cpu"):
            raise UsageError(f"--device {name} is one device for {world.size} processes; try cuda")
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"cuda:{world.local_rank}" if name == "cuda" else name
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name} is not here; try cpu, or none for the best") from None
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL
    return device


def resolve_precision(choice: str, device: torch.device) -> str:
    """ "auto" to "bf16" where the device has instructions that multiply bfloat16, else "fp32"."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"
    return "fp32"


def device_name(device: torch.device) -> str:
    """The device as people call it, e.g. 'NVIDIA H200' or 'AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name
    return name if device.type == "mps" else f"{name}, {torch.get_num_threads()} threads"


def process_seconds() -> float:
    """Seconds since this process began, importing torch included."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except (OSError, AttributeError):  # not Linux
        return time.perf_counter() - _IMPORTED


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory in use at any time: the GPU's for tensors, or the process' on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_flops(config: ViTConfig, patch_dropout: float = 0.0) -> int:
    """Floating-point operations of a training step for each image, as the scaling papers count.

    2 a weight and token forward, twice that backward, and the two products of attention; norms,
    softmax and GELU are left out (Kaplan et al., arXiv 2001.08361; PaLM, arXiv 2204.02311, B).
    """
    D, hidden = config.width, round(config.mlp_ratio * config.width)
    N = config.grid[0] * config.grid[1]
    T = config.tokens - N + patches_kept(N, patch_dropout)
    block = T * (4 * D * D + 2 * D * hidden) + 2 * T * T * D
    patches = N * config.channels * config.patch_size**2 * D
    return 6 * (config.depth * block + patches + D * config.classes)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that square matrix products reach here, at their best."""
    size = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):  # the first of them warms up
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next tensor instead of unmapping them.

    By default every activation of over 32 MB is mapped afresh and its pages are zeroed by the
    kernel; training on a CPU is about 1.3 times faster without that. Elsewhere this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------- the command line


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
