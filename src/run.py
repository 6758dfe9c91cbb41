"""A run: its options, its state, its folder and its checkpoints; started anew or resumed.

The training loop of trainer.py moves a `Run` from step to step; here is what it takes to begin one,
to save it, and to bring it back where it was.
"""

import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import device as devices
import utils
from checkpoint import (
    Checkpoint,
    EpochRecord,
    Partial,
    checkpoint_file,
    load_checkpoint,
    save_checkpoint,
    versions,
    write_metrics,
)
from data import Dataset, Preprocessing
from datasets import load_dataset, preprocessing_for
from distributed import ALONE, ALONE_JOB, Job, World, without_averaging
from initialization import mimetic, standardize_features, whiten_patches
from optimizers import learning_rate_factor, load_optimizers, make_optimizers
from pretrained import load_pretrained
from recipes import Phase, RunOptions, TrainConfig
from utils import Diverged, UserError
from ViT import ViT, ViTConfig, patches_kept

EXPORTED = {None: "model.pt", "timm": "model_timm.pth", "torchvision": "model_torchvision.pth"}
RUN_FILES = (
    *("last.pt", "best.pt", "metrics.csv", "curves.png", "result.json"),
    *EXPORTED.values(),
)
NO_OPTIONS = RunOptions()
_IMPORTED = time.perf_counter()


# ---------------------------------------------------------------------------- its state


@dataclass
class Progress:
    """Progress within the current epoch; with several ranks, this rank's part of it."""

    losses: Tensor  # (steps per epoch,): of each step done, then zeros
    correct: Tensor  # () int64: training images classified correctly
    steps: int = 0  # done
    seconds: float = 0.0


class Run:
    """A run in progress: what it works with, and the state that a checkpoint brings back.

    Args:
        model: on the CPU, as initialized.
        recipe: the name that checkpoints and result.json state.
        folder: where it is saved; locked by the job.
    """

    def __init__(
        self,
        model: ViT,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        job: Job = ALONE_JOB,
        *,
        recipe: str = "",
        folder: Path = Path(),
        options: RunOptions = NO_OPTIONS,
    ):
        self.config, self.dataset, self.device, self.job = config, dataset, device, job
        self.recipe, self.folder, self.options = recipe, folder, options
        self.preprocessing = dataset.preprocessing
        self.precision = devices.resolve_precision(config.precision, device)
        self.model = model.to(device)
        if config.freeze:
            for name, weight in model.named_parameters():
                weight.requires_grad_(name.startswith("head."))
        self.parallel = self.world.parallel(model)  # the model, over all ranks
        self.optimizers = make_optimizers(model, config, self.precision)
        self.class_weights = None
        if config.balance:
            counts = dataset.train.labels.bincount(minlength=len(dataset.classes))  # (K,)
            self.class_weights = len(dataset.train) / (len(counts) * counts)
        coins = utils.generator_for(config.seed)  # of each image, for alternating flips
        self.coins = torch.rand(len(dataset.train), generator=coins).to(device) < 0.5
        self.history: list[EpochRecord] = []
        self.compile_seconds = self.earlier_seconds = 0.0  # the latter of earlier processes
        self.saved_step = 0  # of the checkpoint that can be resumed; 0: there is none
        self.save_failed = False  # the last time it was tried
        self.looked_at = self.saved_at = time.perf_counter()
        self.begin_epoch()
        if config.compile == "graphs" and (device.type != "cuda" or self.world.size > 1):
            raise UserError("--compile graphs needs one CUDA device; use --compile on")
        if options.keep_best and not dataset.validation:
            raise UserError("--keep-best needs validation images; see --validation-images")
        last = len(dataset.train) % config.batch_size or config.batch_size
        if last < self.world.size:
            raise UserError(
                f"the last batch of an epoch has {last} images, too few for {self.world.size} "
                f"processes; choose another --batch-size than {config.batch_size}"
            )

    def leave_others(self) -> None:
        """Drops the DistributedDataParallel wrapper, after training and before the job ends.

        It holds the process group. If it holds the last reference, torch 2.11 deadlocks: the
        group's destructor waits for a thread that waits for Python.
        """
        self.parallel = self.model
        gc.collect()

    @property
    def world(self) -> World:
        return self.job.world

    @property
    def epoch(self) -> int:
        """Epochs done, which is also the number of the next one, counted from 0."""
        return len(self.history)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset.train) / self.config.batch_size)

    @property
    def step(self) -> int:
        """Steps done since the run began."""
        return self.epoch * self.steps_per_epoch + self.progress.steps

    def rate_factor(self, step: int) -> float:
        """`learning_rate_factor` at a step of the run, 0 for its first."""
        return learning_rate_factor(
            step,
            steps=self.config.epochs * self.steps_per_epoch,
            warmup=round(self.config.warmup_epochs * self.steps_per_epoch),
            schedule=self.config.schedule,
        )

    def flops(self, phase: Phase) -> float:
        """Floating-point operations of the training in a phase."""
        of_an_image = training_flops(
            self.model.config, phase.patch_dropout, frozen=self.config.freeze
        )
        return of_an_image * len(self.dataset.train) * len(phase.epochs)

    def parts(self, batch_size: int) -> Iterator[Tensor]:
        """The rows of this rank's share of a batch, in the parts of gradient accumulation.

        Gradients are averaged over the ranks only in the backward pass of the last part.
        """
        rows = self.world.share(torch.arange(batch_size, device=self.device))
        *parts, last = rows.tensor_split(min(self.config.accumulate, len(rows)))
        for part in parts:
            with without_averaging(self.parallel):
                yield part
        yield last

    def begin_epoch(self) -> None:
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        self.progress = Progress(losses, torch.zeros((), dtype=torch.int64, device=self.device))

    def end_epoch(self, record: EpochRecord) -> None:
        self.history.append(record)
        self.begin_epoch()

    def total_seconds(self) -> float:
        """Of all processes of the run, each from when torch is imported."""
        return self.earlier_seconds + time.perf_counter() - _IMPORTED

    def say(self, line: str) -> None:
        if self.world.leads:
            print(line, flush=True)

    def check_losses(self) -> Tensor:
        """The losses (steps,) of the epoch so far, over all ranks, on the CPU.

        Raises:
            Diverged: one is not finite; names the step and its learning rate.
        """
        losses = self.world.sum(self.progress.losses[: self.progress.steps])
        broken = (~losses.isfinite()).nonzero()
        if len(broken):
            step = self.epoch * self.steps_per_epoch + int(broken[0])
            raise self.diverged(f"the loss is {float(losses[broken[0]])}", step)
        return losses

    def diverged(self, what: str, step: int) -> Diverged:
        """The error to raise for `what` at a step of the run, 0 for its first."""
        rate = self.rate_factor(step) * self.config.learning_rate
        return Diverged(
            f"{what} at step {step + 1} (epoch {step // self.steps_per_epoch + 1}, "
            f"learning rate {rate:.2g}); try a lower --learning-rate, more --warmup-epochs, "
            f"--gradient-clip 1 or --precision fp32{self.what_is_kept()}"
        )

    def save_is_due(self) -> bool:
        return time.perf_counter() - self.saved_at >= 60 * self.options.save_minutes

    def what_is_kept(self) -> str:
        last = self.folder / "last.pt"
        return f"; {last} holds step {self.saved_step}" if self.saved_step else ""

    def save(self, *, last: bool = False) -> None:
        """Writes last.pt and metrics.csv; where that fails, says so and keeps the last good ones.

        Args:
            last: the run does not try again.

        Raises:
            Diverged: a loss or a weight is not finite.
        """
        done, losses = self.progress, self.check_losses()
        correct = int(self.world.sum(done.correct))
        if not all(weight.isfinite().all() for weight in self.model.state_dict().values()):
            raise self.diverged("the weights are not finite", self.step - 1)
        self.saved_at = time.perf_counter()
        if not self.world.leads:
            return
        partial = (
            Partial(steps=done.steps, losses=losses, correct=correct, seconds=done.seconds)
            if done.steps
            else None
        )
        try:
            # The rows first: a run that is killed in between resumes, and writes them again.
            write_metrics(self.folder / "metrics.csv", self.history)
            save_checkpoint(self.folder / "last.pt", self.checkpoint(partial))
            self.saved_step, self.save_failed = self.step, False
        except OSError as error:
            self.save_failed = True
            next_try = "" if last else "; training continues, and the next checkpoint tries again"
            reason = error.strerror or error
            print(f"cannot save step {self.step} to {self.folder}: {reason}{next_try}", flush=True)

    def checkpoint(self, partial: Partial | None = None) -> Checkpoint:
        """The run as it is."""
        return Checkpoint(
            recipe=self.recipe,
            model=self.model.config,
            training=self.config,
            preprocessing=self.preprocessing,
            classes=list(self.dataset.classes),
            drawn_from=self.dataset.drawn_from,
            weights=dict(self.model.state_dict()),
            optimizers=[optimizer.state_dict()["state"] for optimizer in self.optimizers],
            history=self.history,
            partial=partial,
            compile_seconds=self.compile_seconds,
            total_seconds=self.total_seconds(),
            versions=versions(),
        )

    def keep_best(self) -> None:
        """Writes best.pt, a model without its optimizers, if no epoch was better on validation."""
        accuracies = [row.validation_accuracy or 0 for row in self.history]
        if self.world.leads and accuracies[-1] == max(accuracies):
            best = dataclasses.replace(self.checkpoint(), optimizers=None)
            try:
                save_checkpoint(self.folder / "best.pt", best)
            except OSError as error:
                self.say(f"cannot write {self.folder / 'best.pt'}: {error.strerror or error}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Sets a fresh run to where a checkpoint of it was.

        Sums over all ranks are credited to rank 0.

        Raises:
            UserError: the checkpoint is not one of such a run.
        """
        if not checkpoint.optimizers:
            raise UserError("it holds a model without its optimizers, for sharing")
        self.model.load_state_dict(checkpoint.weights)
        load_optimizers(self.optimizers, checkpoint.optimizers)
        self.history, self.preprocessing = checkpoint.history, checkpoint.preprocessing
        self.compile_seconds = checkpoint.compile_seconds
        self.earlier_seconds = checkpoint.total_seconds
        self.begin_epoch()
        if partial := checkpoint.partial:
            if partial.steps > self.steps_per_epoch:
                raise UserError(f"it is at step {partial.steps} of {self.steps_per_epoch}")
            self.progress.steps, self.progress.seconds = partial.steps, partial.seconds
            if self.world.leads:
                self.progress.losses[: partial.steps] = partial.losses
                self.progress.correct += partial.correct
        self.saved_step = self.step


def training_flops(config: ViTConfig, patch_dropout: float = 0.0, *, frozen: bool = False) -> int:
    """Floating-point operations of a training step for each image, as the scaling papers count.

    2 per weight and token in the forward pass, twice that in the backward pass, and the two
    products of attention; norms, softmax and GELU are left out (Kaplan et al., arXiv 2001.08361;
    PaLM, arXiv 2204.02311, B).

    Args:
        frozen: only the head is trained; the rest has no backward pass.
    """
    D, N = config.width, config.patches
    kept = patches_kept(N, patch_dropout)
    T = config.tokens - N + kept
    block = T * (4 * D * D + 2 * D * config.hidden) + 2 * T * T * D
    patches = kept * config.channels * config.patch_size**2 * D
    return (2 if frozen else 6) * (config.depth * block + patches) + 6 * D * config.classes


# ---------------------------------------------------------------------------- its beginning


def new_run(
    recipe: str,
    model_config: ViTConfig,
    config: TrainConfig,
    options: RunOptions,
    device: torch.device,
    job: Job,
    chosen: tuple[str, ...] = (),
) -> Run:
    """A fresh run; the model's channels and classes are those of the data set.

    Args:
        chosen: fields of the model's config that the user has set; starting weights must agree with
            them, and set the others.

    Raises:
        UserError: the folder, the data set, the weights or the configs cannot be used; nothing was
            changed.
    """
    folder = options.output_dir / (options.name or recipe)
    if job.world.leads:
        _refuse_existing(folder, options)  # before what may be a long download
    start = None
    if config.init_from:
        heads = model_config.heads if "heads" in chosen else None
        start = load_pretrained(config.init_from, heads)
        model_config = start.adapted(model_config, chosen)
    preprocessing = start.preprocessing if start else preprocessing_for(config.dataset)
    preprocessing = dataclasses.replace(preprocessing, size=model_config.image_size)
    dataset = dataset_for(config, preprocessing, options, device, job.world)
    model_config = dataclasses.replace(
        model_config, channels=dataset.preprocessing.channels, classes=len(dataset.classes)
    )
    if config.deterministic and device.type == "cuda":
        devices.use_deterministic_kernels()
    torch.manual_seed(config.seed)
    model, notes = ViT(model_config), [*dataset.notes]
    if start:
        notes.append(start.initialize(model, dataset.classes))
    else:
        if config.initialization == "mimetic":
            mimetic(model)
        if config.whiten_patches:
            whiten_patches(model, dataset.train, preprocessing)
    if config.freeze:
        standardize_features(model.to(device), dataset.train, preprocessing)
    run = Run(model, config, dataset, device, job, recipe=recipe, folder=folder, options=options)
    _take_new_folder(folder, options, job)
    for note in notes:
        run.say(note)
    return run


def resumed_run(
    path: Path, changes: dict[str, Any], options: RunOptions, device: torch.device, job: Job
) -> Run:
    """The run whose folder or checkpoint is given, as its last checkpoint left it.

    Args:
        changes: of `epochs` and `accumulate`.

    Raises:
        UserError: the checkpoint or a change cannot be used.
    """
    path = checkpoint_file(path)
    if path.name != "last.pt":  # which the run would overwrite
        raise UserError(f"--resume takes a run's folder or its last.pt, not {path}")
    _take_folder(path.parent, job)
    checkpoint = load_checkpoint(path)
    before = checkpoint.training
    config = dataclasses.replace(before, **changes)
    dataset = dataset_for(config, checkpoint.preprocessing, options, device, job.world)
    check_fit(checkpoint, dataset)
    if config.deterministic and device.type == "cuda":
        devices.use_deterministic_kernels()
    names = {"recipe": checkpoint.recipe, "folder": path.parent, "options": options}
    run = Run(ViT(checkpoint.model), config, dataset, device, job, **names)
    try:
        run.restore(checkpoint)
    except UserError as error:
        raise UserError(f"{path} cannot be resumed: {error}") from error
    if run.step > config.epochs * run.steps_per_epoch:
        raise UserError(
            f"--epochs {config.epochs} is less than {run.folder} has done: epoch {run.epoch}"
            f" and {run.progress.steps} steps"
        )
    if config.epochs != before.epochs:
        rate = config.learning_rate * run.rate_factor(run.step)
        run.say(
            f"the {config.schedule} schedule now reaches 0 at epoch {config.epochs} instead of "
            f"{before.epochs}: the learning rate continues at {rate:.2g}"
        )
    return run


def _refuse_existing(folder: Path, options: RunOptions) -> None:
    if any((folder / name).exists() for name in RUN_FILES) and not options.overwrite:
        raise UserError(
            f"{folder} exists; --resume continues it, --overwrite replaces it, --name names another"
        )


def _take_new_folder(folder: Path, options: RunOptions, job: Job) -> None:
    """Makes the folder of a new run; --overwrite empties it."""
    try:
        if job.world.leads:
            folder.mkdir(parents=True, exist_ok=True)
        _take_folder(folder, job)
        if job.world.leads:
            _refuse_existing(folder, options)
            with tempfile.TemporaryFile(dir=folder):
                pass  # fails now rather than after an epoch where nothing can be written
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def _take_folder(folder: Path, job: Job) -> None:
    try:
        job.lock(folder)
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}") from error


# ---------------------------------------------------------------------------- its data


def dataset_for(
    config: TrainConfig,
    preprocessing: Preprocessing,
    options: RunOptions,
    device: torch.device,
    world: World = ALONE,
) -> Dataset:
    with world.one_of_each_host_first():
        return load_dataset(
            config.dataset,
            preprocessing,
            validation_images=config.validation_images,
            device=device,
            data_dir=options.data_dir,
            strict=options.strict,
        )


def check_fit(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Raises UserError where a data set has other classes than a model, or is split otherwise."""
    wanted, found = (tuple(each.classes) for each in (checkpoint, dataset))
    if wanted != found:
        pairs = zip(wanted, found, strict=False)
        a, b = next((pair for pair in pairs if pair[0] != pair[1]), (len(wanted), len(found)))
        raise UserError(
            f"the classes of {dataset.name} are not the model's: {b!r} instead of {a!r}"
        )
    before, now = checkpoint.drawn_from, dataset.drawn_from
    if before and now and before != now:
        raise UserError(
            f"{dataset.name} has {now:,} images instead of {before:,}: it is split anew, and the "
            "model may have been trained on images that are now held out"
        )
