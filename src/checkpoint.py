"""Everything a run leaves on disk: self-describing checkpoints, the log, the run's folder."""

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
from torch import Tensor

from config import Config
from data import Dataset, Preprocessing
from datasets import FOLDER
from recipes import TrainConfig
from utils import (
    ROOT,
    UserError,
    complain,
    named_path,
    one_line,
    write_json,
    write_table,
    write_torch,
)
from ViT import ViT, ViTConfig
from weight_files import read_torch

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

EXPORTED = {
    None: "model.pt",
    "timm": "model_timm.pth",
    "torchvision": "model_torchvision.pth",
    "onnx": "model.onnx",
}
TIMM_CONFIG = "config.json"  # beside an exported state dict
RUN_FILES = (
    *("last.pt", "best.pt", "metrics.csv", "curves.png", "result.json"),
    *EXPORTED.values(),
    TIMM_CONFIG,
)

# ---------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 6
CONFIGS = {"model": ViTConfig, "training": TrainConfig, "preprocessing": Preprocessing}


@dataclass(frozen=True, kw_only=True)
class EpochRecord(Config):
    """A row of metrics.csv."""

    epoch: int  # counted from 1
    step: int  # of the run, at the end of the epoch
    learning_rate: float
    train_loss: float
    train_accuracy: float
    seconds: Annotated[float, "of training", "(0, inf)"]
    images_per_second: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Config):
    """A run's configs and `State.to_dict()`; a file may lack the fields that have a default.

    No random state is stored: seeds derive from `training.seed` and the step (`seed_for`).
    """

    recipe: str
    model: ViTConfig
    training: TrainConfig
    preprocessing: Preprocessing  # what the model expects of images
    classes: list[str]  # names, in the order of the logits
    drawn_from: int = 0  # as in data.Dataset; also 0 if unknown
    trained: Tensor | None = None  # as in data.Dataset
    versions: dict[str, str]
    # The state. An exported model has only weights, in float16, and a history.
    weights: dict[str, Tensor]
    optimizers: list[dict[int, dict[str, Tensor]]] | None = None  # parameter number to its state
    step: int = 0  # steps done
    history: list[EpochRecord]
    scaler: dict[str, float] = field(default_factory=dict)  # of the loss, in float16
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the current epoch, over all ranks
    seconds: dict[str, float] = field(default_factory=dict)  # as in `State`

    def __post_init__(self):
        super().__post_init__()
        K, C, (H, W) = self.model.classes, self.model.channels, self.model.image_size
        if len(self.classes) != K:
            raise UserError(f"classes has {len(self.classes)} names, but the model has {K} classes")
        if (self.preprocessing.channels, self.preprocessing.size) != (C, (H, W)):
            raise UserError(f"preprocessing is not that of {C} x {H} x {W} pixels")
        if [row.epoch for row in self.history] != list(range(1, len(self.history) + 1)):
            raise UserError("history must have a row for each epoch, in order")
        if self.trained is not None and self.trained.dtype != torch.int64:
            raise UserError("trained must be of int64")
        check_weights(self.model, self.weights)
        for kept in (kept for each in self.optimizers or () for kept in each.values()):
            check_numbers(kept)
        missing = self.sums and {"loss", "correct"} - self.sums.keys()
        if missing or any(each.numel() != 1 for each in self.sums.values()):
            raise UserError("sums must hold loss and correct, a number each")


def check_weights(config: ViTConfig, weights: dict[str, Tensor]) -> None:
    """Raises UserError unless the weights fit the config, without allocating a model."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.depth:
        raise UserError(f"depth is {config.depth}, but there are weights of {len(blocks)} blocks")
    try:
        with torch.device("meta"):
            ViT(config).load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(one_line(error).partition(": ")[2][:300]) from error
    check_numbers(weights)


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raises UserError unless all tensors are dense, complete, finite and on the CPU."""
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if dense and tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{name} is larger than what the file holds of it")
        if not (dense and tensor.is_floating_point() and tensor.isfinite().all()):
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}".replace("torch.", "")
            raise UserError(f"{name} has values that are not finite numbers ({kind})")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint of plain containers and tensors, whole or not at all."""
    content = vars(checkpoint) | {"history": [asdict(row) for row in checkpoint.history]}
    content |= {name: asdict(content[name]) for name in CONFIGS}
    write_torch(path, {"format": CHECKPOINT_FORMAT, **content})


def save_model(path: Path, checkpoint: Checkpoint) -> None:
    """Writes only the model of a checkpoint, in half precision; no run can resume from it."""
    halves = {name: weight.half() for name, weight in checkpoint.weights.items()}
    if not all(half.isfinite().all() for half in halves.values()):
        raise UserError(f"{path} cannot hold weights above 65,504 in half precision")
    save_checkpoint(path, model_only(replace(checkpoint, weights=halves)))


def model_only(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without the parts that only resuming needs."""
    return replace(checkpoint, optimizers=None, sums={})


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        UserError: there is no such file, it is damaged, or its content makes no sense.
    """
    return as_checkpoint(path, read_torch(Path(path)))


def as_checkpoint(path: str | Path, content: Any) -> Checkpoint:
    """Rebuilds what `save_checkpoint` wrote. The classes refuse an unknown field by name."""
    try:
        if type(content) is not dict or type(content.get("format")) is not int:
            raise UserError("src/trainer.py did not write it")
        content = _from_format_5(content) if content["format"] == 5 else content
        if (number := content["format"]) != CHECKPOINT_FORMAT:
            raise UserError(f"it has checkpoint format {number}, this code reads 5 and 6")
        fields = {name: value for name, value in content.items() if name != "format"}
        fields |= {name: config(**fields[name]) for name, config in CONFIGS.items()}
        fields["history"] = [EpochRecord(**row) for row in fields["history"]]
        return Checkpoint(**fields)
    except Exception as error:  # content of any kind can fail in any way
        reason = one_line(error)[:300]
        raise UserError(f"{path} is not a usable checkpoint: {reason}") from error


def _from_format_5(old: dict[str, Any]) -> dict[str, Any]:
    """Format 6 has sums instead of each step's loss, and one unit for all that ends early."""
    new, history = dict(old, format=6), old["history"]
    partial = new.pop("partial", None) or {"steps": 0, "seconds": 0.0}
    new["step"] = (history[-1]["step"] if history else 0) + partial["steps"]
    if partial["steps"]:
        correct = torch.tensor(partial["correct"])
        new["sums"] = {"loss": partial["losses"].sum(), "correct": correct}
    new["seconds"] = {"epoch": partial["seconds"]}
    new["seconds"] |= {each: new.pop(f"{each}_seconds", 0.0) for each in ("compile", "total")}
    training = new["training"] = dict(old["training"])
    epochs = training["epochs"]
    shares = {"policy_off_epochs": "policy_epochs", "mixing_off_epochs": "mixed_epochs"}
    for name, share in shares.items():
        training[name] = epochs - math.ceil(training.pop(share, 1.0) * epochs)
    return new


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ViT, Checkpoint]:
    """Rebuilds the model that a checkpoint holds, from the file alone.

    Returns:
        The model, in evaluation mode on `device`, and the checkpoint,
        whose `preprocessing` and `classes` say what goes in and what comes out.

    Raises:
        UserError: the file is not a usable checkpoint.
    """
    checkpoint = load_checkpoint(path)
    if (needed := 4 * checkpoint.model.heads * checkpoint.model.tokens**2) > 2**30:
        tokens = f"{checkpoint.model.tokens:,} tokens an image"
        complain(f"{path} has {tokens}: attention may need {needed / 1e9:.0f} GB of memory")
    model = ViT(checkpoint.model)
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval(), checkpoint


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def code_commit() -> str | None:
    """The commit of this code, with a "+" if src/ has changed since; None if unknown."""
    stated = ROOT / "COMMIT"  # a copy without its history may have it
    if not (ROOT / ".git").exists() and stated.exists():
        return stated.read_text().strip()

    git, how = ["git", "-C", str(ROOT)], {"text": True, "stderr": subprocess.DEVNULL}
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], **how).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "src"], **how)
        return f"{commit}+" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def find_checkpoint(text: str) -> Path:
    """A checkpoint by its path, from here or from the repository; last.pt of a run's folder."""
    path = named_path(text)
    path = path if path.exists() else named_path(ROOT / path)
    return path / "last.pt" if path.is_dir() else path


def check_fit(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Raises UserError if a data set's classes or split differ from the model's."""
    for ours, theirs in zip_longest(checkpoint.classes, dataset.classes):
        if ours != theirs:
            instead = f"{theirs!r} instead of {ours!r}"
            raise UserError(f"the classes of {dataset.name} are not the model's: {instead}")
    before, now = checkpoint.drawn_from, dataset.drawn_from
    drawn = now or (dataset.held_out and checkpoint.training.dataset.startswith(FOLDER))
    if before and drawn and before != now:
        raise UserError(
            f"the held-out images of {dataset.name} were drawn from {before:,} by their rows, and "
            "are no longer: the model may have been trained on images that are now held out"
        )
    trained = set() if checkpoint.trained is None else set(checkpoint.trained.tolist())
    if moved := [name for each, name in dataset.held_out.items() if each in trained]:
        raise UserError(
            f"the model was trained on {len(moved)} pictures that {dataset.name} now holds out, "
            f"such as {moved[0]}: put the folder back as it was, or train anew"
        )


# ---------------------------------------------------------------------------- a run's folder


class RunFolder:
    """Where a run is saved: locked by one run at a time, its files written whole or not at all.

    As a context manager, it releases the lock at the end. Only rank 0 locks and writes. If the
    folder is deleted during the run, it is created again, unless another run has done so.
    """

    def __init__(self, path: Path):
        self.path = named_path(path)
        self.saved_step = 0  # of the checkpoint that can be resumed; 0: there is none
        self.save_failed = False  # on the last attempt
        self.saved_at = time.perf_counter()
        self.best_from = 0  # the first epoch that best.pt is chosen from
        self._lock: int | None = None
        self.replaces: set[str] = set()  # files of an earlier run, until this one is saved

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refuse_existing(self, overwrite: bool) -> None:
        """Raises UserError if the folder holds a run that must not be replaced."""
        if any((self.path / name).exists() for name in RUN_FILES) and not overwrite:
            hint = "--resume continues it, --overwrite replaces it, --name names another"
            raise UserError(f"{self.path} exists; {hint}")

    def make(self, overwrite: bool) -> None:
        """Creates and locks the folder of a new run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error
        self.refuse_existing(overwrite)
        self.take()
        self.replaces = {name for name in RUN_FILES if (self.path / name).exists()}

    def take(self) -> None:
        """Locks the folder until the end of this context or of the process, however it ends.

        The lock is on the folder itself, so a run that is killed leaves no lock file behind.
        If nothing can be written, this fails now rather than after an epoch.
        """
        try:
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error
        lock = None
        try:
            lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            in_use = f"{self.path} is in use by another run; wait for it, or stop it"
            raise UserError(in_use) from None
        except (OSError, AttributeError):  # as on Windows and some network file systems
            print(f"cannot lock {self.path} here; do not start a second run in it")
        self._lock = lock

    def _hold(self) -> None:
        """Creates the folder again if it was deleted; UserError if another run has done so."""
        try:
            held = self._lock is None or os.path.samestat(os.fstat(self._lock), os.stat(self.path))
        except OSError:
            held = False
        if not held:
            self.make(overwrite=False)

    def save(self, checkpoint: Checkpoint, *, last: bool = False, best: bool = False) -> None:
        """Writes last.pt and metrics.csv; if that fails, says so and keeps the last good ones.

        `last`: the run will not try again; `best`: also writes best.pt, which no run resumes.
        """
        try:
            self._hold()
            # metrics.csv first: a run that is killed in between resumes and writes it again.
            rows = (
                {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()}
                for row in checkpoint.history
            )
            write_table(self.path / "metrics.csv", EpochRecord.fields(), rows)
            save_checkpoint(self.path / "last.pt", checkpoint)
            for name in self.replaces - {"metrics.csv", "last.pt"}:
                (self.path / name).unlink(missing_ok=True)
            self.replaces = set()
            if best:
                save_checkpoint(self.path / "best.pt", model_only(checkpoint))
            self.saved_step, self.save_failed = checkpoint.step, False
        except (OSError, UserError) as error:
            self.save_failed = True
            next_try = "" if last else "; training continues, and the next checkpoint tries again"
            reason = getattr(error, "strerror", None) or error
            print(f"cannot save step {checkpoint.step} to {self.path}: {reason}{next_try}")

    def write_result(self, result: dict[str, Any], draw: Callable[[Path], None]) -> bool:
        """Writes curves.png, using `draw`, and result.json; returns whether all is written.

        result.json comes last, as it marks a run as finished.
        """
        if self.replaces:
            complain(f"{self.path} still has the earlier run: this one could not be saved")
            return False
        writers = {"curves.png": draw, "result.json": partial(write_json, content=result)}
        failed = []
        for name, write in writers.items():
            try:
                self._hold()
                write(self.path / name)
            except Exception as error:  # drawing can fail in any way
                failed.append(f"{name}: {one_line(error)}")
        if failed:
            complain(f"cannot write the result to {self.path}: {', '.join(failed)}")
        elif self.save_failed:
            complain(f"the last checkpoint could not be written to {self.path}")
        return not failed and not self.save_failed

    def kept(self) -> list[str]:
        """A line on the last good checkpoint, if there is one, to add to an error."""
        saved = f"{self.path / 'last.pt'} holds step {self.saved_step}"
        return [saved] if self.saved_step else []
