"""A run: its state, its folder, its checkpoints; started anew or gone on with.

The training loop of trainer.py moves a `Run` from step to step; here is what it takes to begin one,
to save it, and to bring it back where it was.
"""

import argparse
import copy
import dataclasses
import gc
import math
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
import utils
from checks import config_from
from data import Dataset, Split, load_dataset
from optimizers import learning_rate_factor, make_optimizers
from processes import Job, World
from recipes import RECIPES, TrainConfig
from utils import UsageError
from ViT import MODELS, ViT, ViTConfig

RUN_FILES = ("last.pt", "metrics.csv", "curves.png", "result.json", "model.pt")


class Diverged(Exception):
    """The loss or a weight is no longer a number; all ranks of a job raise it together."""


# ---------------------------------------------------------------------------- its state


@dataclasses.dataclass
class Progress:
    """How far the epoch under way is; of several ranks, what this one has done of it."""

    losses: Tensor  # (steps an epoch,): of each step done, then zeros
    correct: Tensor  # () int64: training images classified right
    steps: int = 0  # done
    seconds: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run in progress: what it works with, and the state that a checkpoint brings back."""

    folder: Path
    recipe: str
    config: TrainConfig
    dataset: Dataset
    device: torch.device
    precision: str  # "bf16" or "fp32"
    model: ViT
    averaged: ViT | None  # the model of the averaged weights, where the config asks for them
    optimizers: list[torch.optim.Optimizer]
    job: Job
    save_minutes: float
    history: list[dict[str, Any]]  # a row for each epoch done
    seconds: dict[str, float]  # "compile" and "total", of the processes before this one
    saved_step: int = 0  # of the checkpoint there is to go on from; 0: there is none
    save_failed: bool = False  # the last time it was tried

    def __post_init__(self):
        self.parallel = self.world.parallel(self.model)  # the model, over all ranks
        coins = utils.generator_for(self.config.seed)
        self.coins = torch.rand(len(self.dataset.train), generator=coins).to(self.device) < 0.5
        self.looked_at = self.saved_at = time.perf_counter()
        self.begin_epoch()

    def leave_others(self) -> None:
        """Lets go of the model over all ranks, after training and before the job ends.

        What averages the gradients holds the process group. Where it is the last to do so, torch
        2.11 waits for ever for a thread of the group that waits for Python.
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

    @property
    def evaluated(self) -> ViT:
        """The model whose accuracy counts."""
        return self.averaged or self.model

    def operations(self) -> dict[float, float]:
        """Floating-point operations of the training, by the share of patches that is left out."""
        done: dict[float, float] = defaultdict(float)
        for epoch in range(self.config.epochs):
            patch_dropout = self.config.patch_dropout_in(epoch)
            of_an_image = machine.training_flops(self.model.config, patch_dropout)
            done[patch_dropout] += of_an_image * len(self.dataset.train)
        return done

    @torch.no_grad()
    def average_weights(self) -> None:
        """Moves the averaged weights towards those of the step just done.

        The decay rises from 0.1, as in TensorFlow's ExponentialMovingAverage, so that the first
        weights are soon forgotten. To be called before the step is counted.
        """
        if self.averaged is None:
            return
        decay = min(self.config.averaging, (1 + self.step) / (10 + self.step))
        averages, weights = list(self.averaged.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def begin_epoch(self) -> None:
        self.model.embed.patch_dropout = self.config.patch_dropout_in(self.epoch)
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        self.progress = Progress(losses, torch.zeros((), dtype=torch.int64, device=self.device))

    def end_epoch(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        self.begin_epoch()

    def total_seconds(self) -> float:
        return self.seconds["total"] + machine.process_seconds()

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
        """What to raise when `what` is wrong since a step of the run, 0 for its first."""
        rate = self.rate_factor(step) * self.config.learning_rate
        return Diverged(
            f"{what} at step {step + 1} (epoch {step // self.steps_per_epoch + 1}, "
            f"learning rate {rate:.2g}); try a lower --learning-rate, more --warmup-epochs, "
            f"--gradient-clip 1 or --precision fp32{self.what_is_kept()}"
        )

    def what_is_kept(self) -> str:
        last = self.folder / "last.pt"
        return f"; {last} holds step {self.saved_step}" if self.saved_step else ""

    def save(self, *, last: bool = False) -> None:
        """Writes last.pt and metrics.csv; where that fails, says so and keeps the last good ones.

        Args:
            last: the run makes no other try.

        Raises:
            Diverged: there are losses or weights that no checkpoint should hold.
        """
        done, losses = self.progress, self.check_losses()
        correct = int(self.world.sum(done.correct))
        weights = self.model.state_dict()
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise self.diverged("the weights are not finite", self.step - 1)
        self.saved_at = time.perf_counter()
        if not self.world.leads:
            return
        partial = {"steps": done.steps, "losses": losses, "correct": correct}
        try:
            # The rows first: a run that is killed in between goes on, and writes them again.
            utils.write_metrics(self.folder / "metrics.csv", self.history)
            utils.save_checkpoint(
                self.folder / "last.pt",
                model_config=dataclasses.asdict(self.model.config),
                train_config=dataclasses.asdict(self.config),
                recipe=self.recipe,
                weights=dict(weights),
                averaged=dict(self.averaged.state_dict()) if self.averaged else {},
                optimizers=[optimizer.state_dict()["state"] for optimizer in self.optimizers],
                epoch=self.epoch,
                partial=partial | {"seconds": done.seconds} if done.steps else {},
                history=self.history,
                seconds=self.seconds | {"total": self.total_seconds()},
                classes=list(self.dataset.classes),
                mean=list(self.dataset.mean),
                std=list(self.dataset.std),
            )
            self.saved_step, self.save_failed = self.step, False
        except OSError as error:
            self.save_failed = True
            goes_on = "" if last else "; training goes on, and the next checkpoint is another try"
            reason = error.strerror or error
            print(f"cannot save step {self.step} to {self.folder}: {reason}{goes_on}", flush=True)


# ---------------------------------------------------------------------------- its beginning


def new_run(arguments: argparse.Namespace, device: torch.device, job: Job) -> Run:
    """A fresh run of a recipe, changed by the flags given."""
    model_config, config = configs_from(arguments)
    name = arguments.name or arguments.recipe
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise UsageError(f"--name {name!r} must be letters, digits, '.', '_' and '-'")
    folder = arguments.output_dir / name
    if job.world.leads:
        _refuse_existing(folder, arguments)  # before what may be a long download
    dataset = dataset_for(config.dataset, config.validation_images, arguments, device, job.world)
    check_fit(model_config, dataset)
    _take_new_folder(folder, arguments, job)
    torch.manual_seed(config.seed)
    model = ViT(model_config)
    if config.initialisation == "mimetic":
        model.mimic_trained_attention()
    model.to(device)
    precision = machine.resolve_precision(config.precision, device)
    return Run(
        folder=folder,
        recipe=arguments.recipe,
        config=config,
        dataset=dataset,
        device=device,
        precision=precision,
        model=model,
        averaged=copy.deepcopy(model).requires_grad_(False) if config.averaging else None,
        optimizers=make_optimizers(model, config, precision),
        job=job,
        save_minutes=arguments.save_minutes,
        history=[],
        seconds={"compile": 0.0, "total": 0.0},
    )


def configs_from(arguments: argparse.Namespace) -> tuple[ViTConfig, TrainConfig]:
    """Those of the recipe, changed by the flags given."""
    recipe = RECIPES[arguments.recipe]
    size = MODELS[arguments.model] if arguments.model else {}
    try:
        model = dataclasses.replace(recipe.model, **size | utils.given(arguments, ViTConfig))
        return model, dataclasses.replace(recipe.train, **utils.given(arguments, TrainConfig))
    except ValueError as error:
        raise UsageError(str(error)) from error


def resumed_run(arguments: argparse.Namespace, device: torch.device, job: Job) -> Run:
    """The run whose folder or checkpoint is given, as its last checkpoint left it."""
    changed = utils.given(arguments, ViTConfig) | utils.given(arguments, TrainConfig)
    refused = [name for name in changed if name not in ("epochs", "accumulate")]
    if refused or arguments.model:
        flag = (refused or ["model"])[0].replace("_", "-")
        raise UsageError(
            f"--{flag} cannot change while a run goes on; only --epochs and --accumulate can"
        )
    path = checkpoint_file(arguments.resume)
    _take_folder(path.parent, job)
    checkpoint = utils.load_checkpoint(path)
    if not checkpoint["optimizers"]:
        raise utils.CheckpointError(
            f"{path} holds a model without its optimizers; it cannot be gone on with"
        )
    model = utils.build_model(checkpoint, "weights", device)
    averaged = None
    try:
        before = config_from(TrainConfig, checkpoint["train_config"])
        precision = machine.resolve_precision(before.precision, device)
        optimizers = make_optimizers(model, before, precision)
        utils.load_optimizers(optimizers, checkpoint["optimizers"])
        if bool(before.averaging) != bool(checkpoint["averaged"]):
            raise ValueError(f"averaging is {before.averaging}, which its averaged weights belie")
        if before.averaging:
            averaged = utils.build_model(checkpoint, "averaged", device).requires_grad_(False)
    except ValueError as error:
        raise utils.CheckpointError(f"{path} cannot be gone on with: {error}") from error
    try:
        config = dataclasses.replace(before, **changed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    dataset = dataset_for(config.dataset, config.validation_images, arguments, device, job.world)
    check_fit(model.config, dataset)
    run = Run(
        folder=path.parent,
        recipe=checkpoint["recipe"],
        config=config,
        dataset=dataset,
        device=device,
        precision=precision,
        model=model,
        averaged=averaged,
        optimizers=optimizers,
        job=job,
        save_minutes=arguments.save_minutes,
        history=checkpoint["history"],
        seconds=checkpoint["seconds"],
    )
    _go_on_within_epoch(run, checkpoint["partial"])
    run.saved_step = run.step
    if run.step > config.epochs * run.steps_per_epoch:
        raise UsageError(
            f"--epochs {config.epochs} is less than {run.folder} has done: epoch {run.epoch}"
            f" and {run.progress.steps} steps"
        )
    if config.epochs != before.epochs:
        rate = config.learning_rate * run.rate_factor(run.step)
        run.say(
            f"the {config.schedule} schedule now reaches 0 at epoch {config.epochs} instead of "
            f"{before.epochs}: the learning rate goes on at {rate:.2g}"
        )
    return run


def _go_on_within_epoch(run: Run, partial: dict[str, Any]) -> None:
    """Sets a run to where it was in an epoch; what all ranks did together, rank 0 now has done."""
    if not partial:
        return
    if not 0 < partial["steps"] <= run.steps_per_epoch:
        raise utils.CheckpointError(
            f"{run.folder} cannot be gone on with: step {partial['steps']} "
            f"of an epoch of {run.steps_per_epoch}"
        )
    run.progress.steps, run.progress.seconds = partial["steps"], partial["seconds"]
    if run.world.leads:
        run.progress.losses[: partial["steps"]] = partial["losses"]
        run.progress.correct += partial["correct"]


def _refuse_existing(folder: Path, arguments: argparse.Namespace) -> None:
    if any((folder / name).exists() for name in RUN_FILES) and not arguments.overwrite:
        raise UsageError(f"{folder} exists; --resume it, --overwrite it, or choose another --name")


def _take_new_folder(folder: Path, arguments: argparse.Namespace, job: Job) -> None:
    """Makes the folder of a new run, and empties it where the user said so."""
    try:
        if job.world.leads:
            folder.mkdir(parents=True, exist_ok=True)
        _take_folder(folder, job)
        if job.world.leads:
            _refuse_existing(folder, arguments)
            with tempfile.TemporaryFile(dir=folder):
                pass  # better to learn here than after an epoch that nothing can be written
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def _take_folder(folder: Path, job: Job) -> None:
    """Locks a run's folder and removes what a killed run was writing there."""
    try:
        job.lock(folder)
        if job.world.leads:
            utils.remove_partial_files(folder, RUN_FILES)
    except OSError as error:
        raise UsageError(f"cannot use {folder}: {error.strerror}") from error


def checkpoint_file(path: Path) -> Path:
    return path / "last.pt" if path.is_dir() else path


# ---------------------------------------------------------------------------- its data


def dataset_for(
    name: str,
    validation_images: int,
    arguments: argparse.Namespace,
    device: torch.device,
    world: World,
) -> Dataset:
    with world.one_of_each_host_first():
        return load_dataset(
            name,
            validation_images=validation_images,
            device=device,
            data_dir=arguments.data_dir,
            data_url=arguments.data_url,
        )


def check_fit(config: ViTConfig, dataset: Dataset, split: Split | None = None) -> None:
    """Raises UsageError where images, of the training split if no other, are none of a model's."""
    images = (split or dataset.train).images
    found = (len(dataset.classes), *images.shape[1:])
    wanted = (config.classes, config.channels, *config.image_size)
    if wanted != found:
        (K, *shape), (count, *size) = wanted, found
        raise UsageError(
            f"the model is for {K} classes of images of {' x '.join(map(str, shape))}, "
            f"but {dataset.name} has {count} of {' x '.join(map(str, size))}"
        )
