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
import pickle
import pickletools
import platform
import reprlib
import sys
import tempfile
import time
import types
import typing
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ViT import ViT, ViTConfig

_IMPORTED = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent  # the repository, whatever the current folder is


# ---------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 2

METRICS = {  # the columns of metrics.csv
    "epoch": int,
    "step": int,
    "learning_rate": float,
    "train_loss": float,
    "train_accuracy": float,
    "seconds": float,
    "images_per_second": float,
    "validation_loss": float | None,
    "validation_accuracy": float | None,
}
# Seeds follow from the train config and the step (`seed_for`), so no random state is kept.
CHECKPOINT = {
    "format": int,
    "model_config": dict[str, Any],  # of ViTConfig
    "train_config": dict[str, Any],  # of TrainConfig
    "recipe": str,
    "weights": dict[str, Tensor],
    "optimizers": list[dict[int, dict[str, Tensor]]],  # of each: parameter's number to its state
    "epoch": int,  # epochs done
    "partial": dict[str, Any],  # PARTIAL of the epoch under way; empty between epochs
    "history": list[dict[str, Any]],  # METRICS of each epoch done
    "seconds": dict[str, float],  # SECONDS
    "classes": list[str],
    "mean": list[float],
    "std": list[float],
    "versions": dict[str, str],
}
PARTIAL = {"steps": int, "losses": Tensor, "correct": int, "seconds": float}
SECONDS = {"compile": float, "total": float}
OPTIMIZER_STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
LARGEST_BUFFER = 2**26  # numbers; no honest image has positions that take more


class CheckpointError(Exception):
    """A file is no checkpoint of this repository; the message is one line for the user."""


def save_checkpoint(path: Path, **content: Any) -> None:
    """Writes a checkpoint of plain containers and tensors, whole or not at all.

    Args:
        content: everything in `CHECKPOINT` but `format` and `versions`.

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
            checkpoint = torch.load(_sound_copy(file), map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail in any way inside zipfile and torch.load
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged") from error
    try:
        _check_content(checkpoint)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no checkpoint to use: {reason[:300]}") from error
    return checkpoint


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ViT, dict[str, Any]]:
    """Rebuilds the model that a checkpoint holds, from the file alone.

    Returns:
        The model, in evaluation mode on `device`, and the checkpoint (class names, mean, std, ...).

    Raises:
        CheckpointError: the file is no checkpoint, or its parts do not fit together.
    """
    checkpoint = load_checkpoint(path)
    model = ViT(ViTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["weights"])
    return model.to(device).eval(), checkpoint


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


def _sound_copy(file: typing.BinaryIO) -> io.BytesIO:
    """The records of an archive that match their checksums, as a new archive.

    torch's own reader looks at no checksum, and believes sizes that the standard library's does
    not; so it gets a copy. What is no archive, a bare pickle for one, never reaches it, nor does
    what torch does not write: a compressed or overlapping record could outgrow the memory.

    Raises:
        BadZipFile and others: the archive is damaged, or is none.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as sound:
        records = archive.infolist()
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        overlap = sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size
        twice = len(set(archive.namelist())) < len(records)
        if compressed or overlap or twice:
            raise zipfile.BadZipFile
        for record in records:
            content = archive.read(record)
            if record.filename.lower().endswith(".pkl"):
                _check_pickle(content)
            sound.writestr(record.filename, content)
    copy.seek(0)
    return copy


def _check_pickle(content: bytes) -> None:
    """Refuses tuples that are in a pickle once and used twice, as torch.save never writes them.

    Nested 60 deep, each within the next twice, they are a key that takes 2^60 steps to hash.

    Raises:
        UnpicklingError and others: there is one, or this is no pickle.
    """
    tuples, on_top = set(), False
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINPUT", "LONG_BINPUT"):
            tuples |= {argument} if on_top else set()
        elif operation.name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise pickle.UnpicklingError
        else:
            on_top = operation.name.startswith("TUPLE")


def _check_content(checkpoint: Any) -> None:
    """Raises ValueError, or what a config raises, where something is not as it was written."""
    if type(checkpoint) is not dict or type(checkpoint.get("format")) is not int:
        raise ValueError("it is nothing that src/trainer.py wrote")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"it has checkpoint format {_shown(checkpoint['format'])}, "
            f"but this code reads {CHECKPOINT_FORMAT}"
        )
    check_fields(checkpoint, CHECKPOINT, "the checkpoint")
    config = config_from(ViTConfig, checkpoint["model_config"])
    _check_weights(config, checkpoint["weights"])
    for key, length in (("classes", config.classes), ("mean", config.channels)):
        if len(checkpoint[key]) != length:
            raise ValueError(f"{key!r} has {len(checkpoint[key])} entries, not {length}")
    if len(checkpoint["std"]) != config.channels or min(checkpoint["std"]) <= 0:
        raise ValueError(f"'std' must be {config.channels} positive numbers")
    for number, row in enumerate(checkpoint["history"], start=1):
        check_fields(row, METRICS, f"epoch {number} of 'history'")
        if row["epoch"] != number:
            raise ValueError(f"epoch {number} of 'history' calls itself {_shown(row['epoch'])}")
        if row["seconds"] <= 0:
            raise ValueError(f"epoch {number} of 'history' took no time")
    validation = [row[key] for row in checkpoint["history"] for key in METRICS if "valid" in key]
    if None in validation and any(value is not None for value in validation):
        raise ValueError("'history' has validation figures for a part of the epochs")
    if checkpoint["epoch"] != len(checkpoint["history"]):
        raise ValueError("'epoch' and the length of 'history' differ")
    check_fields(checkpoint["seconds"], SECONDS, "'seconds'")
    if partial := checkpoint["partial"]:
        check_fields(partial, PARTIAL, "'partial'")
        if partial["losses"].shape != (partial["steps"],):
            raise ValueError("'partial' must have one loss for each step")


def _check_weights(config: ViTConfig, weights: dict[str, Tensor]) -> None:
    """Holds weights against a model without memory, before one that takes memory is made."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.depth:
        raise ValueError(f"depth {_shown(config.depth)}, but weights of {len(blocks)} blocks")
    with torch.device("meta"):
        model = ViT(config)
    expected = model.state_dict()
    check_fields(weights, dict.fromkeys(expected, Tensor), "'weights'")
    for name, weight in weights.items():
        wanted = expected[name]
        if (weight.shape, weight.dtype) != (wanted.shape, wanted.dtype):
            found, wanted = ((tuple(w.shape), str(w.dtype)) for w in (weight, wanted))
            raise ValueError(f"{name} is {found}, but the model's is {wanted}")
    if any(buffer.numel() > LARGEST_BUFFER for buffer in model.buffers()):
        raise ValueError(f"image_size {config.image_size} has too many patches")


def check_fields(fields: dict[Any, Any], kinds: dict[Any, Any], what: str) -> None:
    """Raises ValueError unless a dict has exactly the keys of `kinds`, with values of those kinds.

    Args:
        kinds: a type for each key, which may say what is inside, as `list[float]` does.
        what: the dict's name in the message.
    """
    if missing := kinds.keys() - fields.keys():
        raise ValueError(f"{what} lacks {min(missing)!r}")
    if unknown := fields.keys() - kinds.keys():
        raise ValueError(f"{what} has an unknown {_shown(unknown.pop())}")
    for key, kind in kinds.items():
        _check_kind(fields[key], kind, f"{key!r} of {what}")


def config_from(config_class: type, values: dict[str, Any]) -> Any:
    """A config of the values in a checkpoint, all of them there and of their declared types.

    Raises:
        ValueError: they are not, or make no config.
    """
    check_fields(values, typing.get_type_hints(config_class), config_class.__name__)
    return config_class(**values)


def _check_kind(value: Any, kind: Any, what: str) -> None:
    """Raises ValueError unless a value is of a type, with all that is in it."""
    container, inner = typing.get_origin(kind), typing.get_args(kind)
    if not _fits(value, container if container in (dict, list) else kind):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(f"{what} must be {name}, not {_shown(value)}")
    if container is list:
        for number, item in enumerate(value):
            _check_kind(item, inner[0], f"entry {number} of {what}")
    if container is dict:
        for key, item in value.items():
            _check_kind(key, inner[0], f"a key of {what}")
            _check_kind(item, inner[1], f"{_shown(key)} of {what}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type exactly; but an int is a float too, and a float is finite.

    A tensor must be finite, and plain: dense, on the CPU, and no larger than what holds it.
    """
    inner = typing.get_args(kind)
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is Tensor:
        plain = type(value) is Tensor and value.layout is torch.strided and not value.is_quantized
        plain = plain and value.device.type == "cpu" and value.is_contiguous()
        return plain and bool(value.isfinite().all())
    if typing.get_origin(kind) is typing.Literal:
        return type(value) is str and value in inner
    if typing.get_origin(kind) is types.UnionType:
        return any(_fits(value, each) for each in inner)
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and len(value) == len(inner) and all(map(_fits, value, inner))
    return type(value) is kind


def _shown(value: Any) -> str:
    """A value of a stranger's, short whatever it is: some take exponentially long to print."""
    if isinstance(value, Tensor):
        return "a tensor that is not plain or not finite"
    if isinstance(value, int | float | str | None):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getbuffer())


def draw_curves(figure: Figure, history: list[dict[str, float]]) -> None:
    """Draws into an empty figure.

    The training curves are of augmented images and smoothed labels, as the model met them.
    """
    losses, accuracies, rates = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]

    def curve(axes, name: str, label: str | None = None, scale: float = 1.0, **style) -> None:
        axes.plot(epochs, [scale * row[name] for row in history], label=label, **style)

    curve(losses, "train_loss", "training, as augmented", marker=".")
    curve(accuracies, "train_accuracy", "training", 100, marker=".")
    curve(rates, "learning_rate", color="tab:gray")
    if history[0]["validation_loss"] is not None:
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


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
