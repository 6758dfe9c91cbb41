"""What a run leaves on disk: checkpoints that describe themselves, and the run log."""

import io
import subprocess
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
from torch import Tensor

from config import Config
from data import Preprocessing
from recipes import TrainConfig
from utils import ROOT, UserError, one_line, write_table, write_torch
from ViT import ViT, ViTConfig

# ---------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 5
CONFIGS = {"model": ViTConfig, "training": TrainConfig, "preprocessing": Preprocessing}


@dataclass(frozen=True, kw_only=True)
class EpochRecord(Config):
    """An epoch, as a row of metrics.csv has it."""

    epoch: int  # counted from 1
    step: int  # the run's, at the end of the epoch
    learning_rate: float
    train_loss: float
    train_accuracy: float
    seconds: Annotated[float, "of training", "(0, inf)"]
    images_per_second: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Partial:
    """How far an epoch was when it was saved."""

    steps: int  # done
    losses: Tensor  # (steps,)
    correct: int  # training images classified correctly
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a checkpoint holds; a field with a default may be missing in a file.

    No random state is kept: every seed follows from `training.seed` and the step (`seed_for`).
    """

    recipe: str
    model: ViTConfig
    training: TrainConfig
    preprocessing: Preprocessing  # of the images that the model expects
    classes: list[str]  # their names, in the order of the logits
    drawn_from: int = 0  # as in data.Dataset; 0 also where it is not known
    weights: dict[str, Tensor]  # float32, or float16 in an exported model
    optimizers: list[dict[int, dict[str, Tensor]]] | None = None  # parameter's number to its state
    history: list[EpochRecord]
    partial: Partial | None = None  # of the epoch under way
    compile_seconds: float = 0.0
    total_seconds: float = 0.0
    versions: dict[str, str]

    def __post_init__(self):
        K, (H, W) = self.model.classes, self.model.image_size
        if len(self.classes) != K:
            raise UserError(f"classes has {len(self.classes)} names, but the model has {K} classes")
        if (self.preprocessing.channels, self.preprocessing.size) != (self.model.channels, (H, W)):
            raise UserError(
                f"preprocessing is not that of {self.model.channels} x {H} x {W} pixels"
            )
        if [row.epoch for row in self.history] != list(range(1, len(self.history) + 1)):
            raise UserError("history must have a row for each epoch, in their order")
        check_weights(self.model, self.weights)


def check_weights(config: ViTConfig, weights: dict[str, Tensor]) -> None:
    """Raises UserError unless the weights are those of a model, before that takes memory."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.depth:
        raise UserError(f"depth is {config.depth}, but there are weights of {len(blocks)} blocks")
    try:
        with torch.device("meta"):
            ViT(config).load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(one_line(error)) from error
    for name, weight in weights.items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            raise UserError(f"{name} has values that are not finite numbers")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of plain containers and tensors, whole or not at all.

    Raises:
        OSError: the file cannot be written; one that was there is still there.
    """
    content = vars(checkpoint) | {"history": [asdict(row) for row in checkpoint.history]}
    content |= {name: asdict(content[name]) for name in CONFIGS}
    content["partial"] = vars(checkpoint.partial) if checkpoint.partial else None
    write_torch(path, {"format": CHECKPOINT_FORMAT, **content})


def save_model(path: Path, checkpoint: Checkpoint) -> None:
    """Writes only the model of a checkpoint, in half precision.

    `load_model` reads it like any other, into float32; a run cannot resume from it.

    Raises:
        OSError: as in `save_checkpoint`.
        UserError: a weight is too large for half precision.
    """
    halves = {name: weight.half() for name, weight in checkpoint.weights.items()}
    if not all(half.isfinite().all() for half in halves.values()):
        raise UserError(f"{path} cannot hold weights above 65,504 in half precision")
    save_checkpoint(path, replace(checkpoint, weights=halves, optimizers=None, partial=None))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        UserError: there is no such file, it is damaged, or its content makes no sense.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:
            if damaged := archive.testzip():  # torch.load compares no checksum
                raise zipfile.BadZipFile(damaged)
        content.seek(0)
        with warnings.catch_warnings(action="ignore"):
            plain = torch.load(content, map_location="cpu", weights_only=True)
        return _from_dict(plain)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UserError, TypeError, KeyError) as error:
        reason = one_line(error)[:300]
        raise UserError(f"{path} is not a usable checkpoint: {reason}") from error
    except Exception as error:  # a damaged file can fail in any way inside zipfile and torch.load
        raise UserError(f"{path} is not a checkpoint, or is damaged") from error


def _from_dict(content: Any) -> Checkpoint:
    """What `save_checkpoint` wrote. A class refuses a field that it does not know by name."""
    if type(content) is not dict or type(content.get("format")) is not int:
        raise UserError("src/trainer.py did not write it")
    if content["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"it has checkpoint format {content['format']}, this code reads {CHECKPOINT_FORMAT}"
        )
    fields = {name: value for name, value in content.items() if name != "format"}
    fields |= {name: config(**fields[name]) for name, config in CONFIGS.items()}
    fields["history"] = [EpochRecord(**row) for row in fields["history"]]
    fields["partial"] = Partial(**fields["partial"]) if fields.get("partial") else None
    return Checkpoint(**fields)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ViT, Checkpoint]:
    """Rebuilds the model that a checkpoint holds, from the file alone.

    Returns:
        The model, in evaluation mode on `device`, and the checkpoint,
        whose `preprocessing` and `classes` say what goes in and what comes out.

    Raises:
        UserError: the file is not a usable checkpoint.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = ViT(checkpoint.model)
    except (RuntimeError, MemoryError) as error:  # fixed positions of an image too large for memory
        raise UserError(f"{path} is not a usable checkpoint: out of memory") from error
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval(), checkpoint


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def code_commit() -> str | None:
    """The commit of this code, with a "+" where files have changed since; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "src"))
    except (OSError, subprocess.CalledProcessError):
        return None


def checkpoint_file(path: Path) -> Path:
    """A file as given; of a run's folder its last checkpoint."""
    return path / "last.pt" if path.is_dir() else path


# ---------------------------------------------------------------------------- the run log


def write_metrics(path: Path, history: list[EpochRecord]) -> None:
    """metrics.csv: a row for each epoch."""
    rows = ({name: _short(value) for name, value in asdict(row).items()} for row in history)
    write_table(path, EpochRecord.fields(), rows)


def _short(value: float | None) -> float | str | None:
    return f"{value:.6g}" if isinstance(value, float) else value
