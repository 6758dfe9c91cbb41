"""What may be believed of a checkpoint: a file from anybody is held against what was written.

`sound_copy` is about the file, `check_content` about what it holds. Both raise; utils.py makes one
line of it.
"""

import io
import math
import os
import pickle
import pickletools
import reprlib
import types
import typing
import zipfile
from typing import Any

import torch
from torch import Tensor

from ViT import ViT, ViTConfig

CHECKPOINT_FORMAT = 3

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
    "weights": dict[str, Tensor],  # in the model's precision, or in half of a model alone
    "averaged": dict[str, Tensor],  # the averaged weights; empty where a recipe keeps none
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
DATA_OPTIONS = {"dataset": str, "validation_images": int}  # of TrainConfig
PARTIAL = {"steps": int, "losses": Tensor, "correct": int, "seconds": float}
SECONDS = {"compile": float, "total": float}
OPTIMIZER_STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
LARGEST_BUFFER = 2**26  # numbers; no honest image has positions that take more


def sound_copy(file: typing.BinaryIO) -> io.BytesIO:
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
        if compressed or overlap:
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


def check_content(checkpoint: Any) -> None:
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
    # Of the training, what is used without going on with it; the rest is checked for that.
    training = checkpoint["train_config"]
    used = {name: training[name] for name in DATA_OPTIONS if name in training}
    check_fields(used, DATA_OPTIONS, "'train_config'")
    _check_weights(config, checkpoint["weights"])
    if checkpoint["averaged"]:
        _check_weights(config, checkpoint["averaged"])
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
        if (row["validation_loss"] is None) != (row["validation_accuracy"] is None):
            raise ValueError(f"epoch {number} of 'history' has one of two validation figures")
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
        if weight.shape != wanted.shape or weight.dtype not in (wanted.dtype, torch.float16):
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
