"""`Run`, what stays fixed in training; `State`, what a step changes; starting and resuming.

The training loop in trainer.py advances the `State` step by step. A checkpoint consists of the
`Run`'s configs and `State.to_dict()`.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import datasets
import device as devices
from augment import OPERATIONS, Augmentation, Seen
from base import DropPath
from checkpoint import Checkpoint, EpochRecord, RunFolder, check_fit, load_checkpoint, versions
from data import Dataset, Preprocessing, Split, shuffled_batches
from datasets import FOLDER
from distributed import ALONE, StopSignals, World, without_averaging
from evaluation import features_of
from initialization import mimetic, standardize_features, whiten_patches
from optimizers import layer_of, learning_rate_factor, load_optimizers, make_optimizers
from pretrained import load_pretrained
from recipes import RunOptions, TrainConfig, patches_kept
from utils import (
    Diverged,
    UserError,
    generator_for,
    one_line,
    printable,
    seed_default_generators,
    seed_for,
)
from ViT import ViT, ViTConfig, parameters_of

_STARTED = time.perf_counter()


# ---------------------------------------------------------------------------- what a step changes


@dataclass
class State:
    """Everything that a step changes; each rank holds its own part of the sums."""

    model: ViT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # scales the loss in float16; otherwise does nothing
    step: int = 0  # steps done since the run began
    history: list[EpochRecord] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # this epoch's, one number each
    seconds: dict[str, float] = field(default_factory=lambda: {"epoch": 0.0, "compile": 0.0})
    compiled: str | bool = False  # or how: "default", or "graphs" for CUDA graphs
    started: float = _STARTED  # a `time.perf_counter` time, minus earlier processes' seconds

    @property
    def epoch(self) -> int:
        """Epochs done; also the number of the current one, counted from 0."""
        return len(self.history)

    @property
    def total_seconds(self) -> float:
        """Of this process and those that it resumes, each counted from importing torch."""
        return time.perf_counter() - self.started

    def count(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds part of a batch to the sums. A new metric is a sum here and a record field.

        The loss is the part's share of the batch mean; logits and targets are (n, K).
        """
        hits = logits.argmax(dim=1) == targets.argmax(dim=1)
        added = {"loss": loss.detach(), "correct": hits.sum()}
        # If the checkpoint of an unfinished epoch lacks a sum, it starts with the next epoch.
        sums = self.sums or dict.fromkeys(added, 0)
        self.sums = {name: sums[name] + each for name, each in added.items() if name in sums}

    def set_learning_rates(self, factor: float) -> None:
        """Sets each parameter group's learning rate to `factor` times its peak."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor

    def end_epoch(self, record: EpochRecord) -> None:
        self.history.append(record)
        self.sums, self.seconds["epoch"] = {}, 0.0

    def to_dict(self, totals: dict[str, Tensor]) -> dict[str, Any]:
        """The state as fields of a `Checkpoint`; `totals` are the sums over all ranks."""
        return {
            "weights": dict(self.model.state_dict()),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": list(self.history),
            "sums": totals,
            "seconds": self.seconds | {"total": self.total_seconds},
        }

    def load(self, saved: Checkpoint, world: World = ALONE) -> None:
        """The inverse of `to_dict`, for a fresh state; rank 0 gets the sums of all ranks."""
        self.model.load_state_dict(saved.weights)
        load_optimizers(self.optimizers, saved.optimizers)
        if saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        self.step, self.history = saved.step, list(saved.history)
        device = next(self.model.parameters()).device
        self.sums = {name: (value * world.leads).to(device) for name, value in saved.sums.items()}
        self.seconds |= saved.seconds
        self.started -= self.seconds.pop("total", 0.0)


# ---------------------------------------------------------------------------- what it works with


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run trains and is saved."""

    device: torch.device
    options: RunOptions = field(default_factory=RunOptions)
    world: World = ALONE
    folder: RunFolder = field(default_factory=lambda: RunFolder(Path()))


@dataclass(frozen=True, kw_only=True)
class Run(Place):
    """What stays fixed in training; only the folder and the signals are mutable."""

    recipe: str  # the name in checkpoints and result.json
    config: TrainConfig
    dataset: Dataset
    precision: str  # "bf16", "fp16" or "fp32"
    model_config: ViTConfig
    parallel: Callable[..., Tensor]  # the state's model, across all ranks
    augment: Augmentation
    normalize: Callable[[Tensor], Tensor]  # uint8 images to the model's input
    class_weights: Tensor | None  # (K,)
    stop: StopSignals = field(default_factory=StopSignals)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset.train) / self.config.batch_size)

    @property
    def features_once(self) -> bool:
        """Whether the model is frozen and sees an image the same way in every epoch."""
        config, model = self.config, self.model_config
        varying = [getattr(config, name) for name in (*OPERATIONS, "patch_dropout")]
        varying += [model.dropout, model.attention_dropout, model.drop_path]
        return config.freeze is True and not any(value and value != "off" for value in varying)

    def on_features(self, state: State) -> "Run":
        """If `features_once`, a run that trains the head alone, on features computed once."""
        if not self.features_once:
            return self
        train = self.dataset.train
        features = features_of(state.model, train, self.dataset.preprocessing)  # (n, D)
        dataset = dataclasses.replace(self.dataset, train=Split(features, train.labels))
        head = self.world.parallel(state.model.head)
        on_features = {"parallel": lambda z, kept: head(z), "normalize": lambda z: z}
        return dataclasses.replace(self, dataset=dataset, **on_features)

    def steps_done(self, state: State) -> int:
        """Steps done in the current epoch."""
        return state.step - state.epoch * self.steps_per_epoch

    def rate_factor(self, step: int) -> float:
        """`learning_rate_factor` at a step of the run, counted from 0."""
        config, an_epoch = self.config, self.steps_per_epoch
        first_whole = max(0, config.epochs - config.whole_epochs) * an_epoch
        cost = 1.0  # of a step on whole images, relative to a step before them
        if config.schedule_over == "operations":
            fewer = training_flops(self.model_config, config.patch_dropout)
            cost = training_flops(self.model_config) / fewer

        def clock(step: int) -> float:
            return min(step, first_whole) + cost * max(0, step - first_whole)

        steps, warmup = config.epochs * an_epoch, round(config.warmup_epochs * an_epoch)
        return learning_rate_factor(clock(step), clock(steps), clock(warmup), config.schedule)

    def flops(self) -> dict[float, float]:
        """Floating-point operations of the whole training, by rate of patch dropout."""
        epochs = Counter(map(self.config.patch_dropout_in, range(self.config.epochs)))
        frozen, images = self.config.freeze, len(self.dataset.train)
        if self.features_once:
            of_head = 6 * self.model_config.width * self.model_config.classes
            once = training_flops(self.model_config, frozen=True)
            return {0.0: images * (once + (self.config.epochs - 1) * of_head)}
        return {
            dropout: training_flops(self.model_config, dropout, frozen=frozen) * images * count
            for dropout, count in epochs.items()
        }

    # --------------------------------------------------------------------------- a step

    def batches_left(self, state: State) -> tuple[Tensor, ...]:
        """The rows of each remaining batch of the epoch; seed and epoch determine them."""
        order = generator_for(self.config.seed, state.epoch)
        batches = shuffled_batches(self.dataset.train, self.config.batch_size, order)
        return batches[self.steps_done(state) :]

    def seed_draws(self, state: State) -> int:
        """Seeds the next step's random draws, so they do not depend on earlier ones.

        Dropout and drop path draw from torch's generators, differently on each rank. The seed
        returned, for augmentation, is the same on every rank.
        """
        key = (self.config.seed, state.epoch, self.steps_done(state))
        seed_default_generators(seed_for(*key, self.world.rank), self.device)
        return seed_for(*key)

    def parts(self, batch: Seen) -> Iterator[Seen]:
        """This rank's share of a batch, in parts for gradient accumulation.

        Gradients are averaged over the ranks only in the backward pass of the last part.
        """
        share = self.world.share(torch.arange(len(batch.images), device=self.device))
        *parts, last = share.tensor_split(min(self.config.accumulate, len(share)))
        for rows in parts:
            with without_averaging(self.parallel):
                yield batch.part(rows)
        yield batch.part(last)

    def ready(self, model: ViT, epoch: int) -> None:
        """Puts a model in training mode; if whole epochs follow, drop path waits for them."""
        model.train()
        waits = self.config.whole_epochs and self.config.patch_dropout_in(epoch)
        for module in model.modules():
            if isinstance(module, DropPath):
                module.train(not waits)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy between (n, K) logits and targets, summed over the images."""
        return F.cross_entropy(
            logits.to(targets.dtype),
            targets,
            self.class_weights,
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )

    # --------------------------------------------------------------------------- an epoch

    def totals(self, state: State) -> dict[str, Tensor]:
        """The sums over all ranks, on the CPU; waits for the device. May raise `Diverged`."""
        totals = {name: self.world.sum(value) for name, value in state.sums.items()}
        if "loss" in totals and not totals["loss"].isfinite():
            raise self.diverged(state, f"the loss is {totals['loss'].item()}")
        return totals

    def record(self, state: State, totals: dict[str, Tensor]) -> EpochRecord:
        """The record of an epoch whose steps are done, from its `totals`."""
        images, rate = len(self.dataset.train), self.rate_factor(state.step - 1)
        return EpochRecord(
            epoch=state.epoch + 1,
            step=state.step,
            learning_rate=self.config.learning_rate * rate,
            train_loss=totals["loss"].item() / self.steps_per_epoch,
            train_accuracy=totals["correct"].item() / images,
            seconds=state.seconds["epoch"],
            images_per_second=images / state.seconds["epoch"],
        )

    def diverged(self, state: State, what: str) -> Diverged:
        """The error to raise for `what`, found after a step."""
        step = state.step - 1  # counted from 0
        factor, muon = self.rate_factor(step), self.config.optimizer == "muon"
        rate = f"learning rate {factor * self.config.learning_rate:.2g}"
        rate += f", Muon's {factor * self.config.muon_learning_rate:.2g}" if muon else ""
        error = Diverged(
            f"{what} by step {state.step} (epoch {step // self.steps_per_epoch + 1}, {rate}); try "
            f"a lower {'--muon-learning-rate or ' if muon else ''}--learning-rate, more "
            "--warmup-epochs, --gradient-clip 1 or --precision fp32"
        )
        error.__notes__ = self.folder.kept()
        return error

    # ------------------------------------------------------------------------ on disk

    def save_is_due(self, state: State) -> bool:
        """Whether to save now; after an epoch's last step, `train_epochs` decides that."""
        minutes = (time.perf_counter() - self.folder.saved_at) / 60
        ends_epoch = self.steps_done(state) == self.steps_per_epoch
        return minutes >= self.options.save_minutes and not ends_epoch

    def save(self, state: State, **how: bool) -> None:
        """Saves the state on rank 0, or raises `Diverged`; `how` is for `RunFolder.save`."""
        totals = self.totals(state)
        if not all(weight.isfinite().all() for weight in state.model.state_dict().values()):
            raise self.diverged(state, "the weights are not finite")
        self.folder.saved_at = time.perf_counter()
        if self.world.leads:
            checkpoint = Checkpoint(
                recipe=self.recipe,
                model=self.model_config,
                training=self.config,
                preprocessing=self.dataset.preprocessing,
                classes=list(self.dataset.classes),
                drawn_from=self.dataset.drawn_from,
                trained=self.dataset.trained,
                versions=versions(),
                **state.to_dict(totals),
            )
            self.folder.save(checkpoint, **how)

    def is_best(self, state: State) -> bool:
        """Whether --keep-best keeps the last epoch: no earlier one validates better."""
        rows = state.history[self.folder.best_from :]
        accuracies = [row.validation_accuracy or 0 for row in rows]
        return self.options.keep_best and accuracies[-1] == max(accuracies)

    def result(self, state: State) -> dict[str, Any]:
        """The training part of result.json; `train` adds the test and the other timings."""
        training = sum(record.seconds for record in state.history)
        return {
            "recipe": self.recipe,
            "model": asdict(self.model_config),
            "training": asdict(self.config),
            "parameters": parameters_of(state.model),
            "epochs": self.config.epochs,
            "seed": self.config.seed,
            "device": self.device.type,
            "device_name": devices.device_name(self.device),
            "processes": self.world.size,
            "precision": self.precision,  # of training and validation; the test is in float32
            "torch": str(torch.__version__),
            "compiled": state.compiled,
            "validation_accuracy": state.history[-1].validation_accuracy,
            "seconds": {"training": training, "compile": state.seconds["compile"]},
            "images_per_second": len(self.dataset.train) * self.config.epochs / training,
            "training_flops": sum(self.flops().values()),
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
        }

    def is_finished(self, state: State) -> bool:
        """Whether all epochs are done and result.json is written, with the test if wanted."""
        try:
            result = json.loads((self.folder.path / "result.json").read_text())
            untested = self.dataset.test and result["test_accuracy"] is None
            done = state.epoch == self.config.epochs == result["epochs"]
            return done and not (self.options.test and untested)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    # ------------------------------------------------------------------------ on the terminal

    def say(self, line: str) -> None:
        if self.world.leads:
            print(printable(line), flush=True)

    def headline(self, state: State) -> str:
        """One line on the model, the data, the precision and the device."""
        count = f"{self.world.size} x " if self.world.size > 1 else ""
        return (
            f"{self.folder.path}: ViT of {parameters_of(state.model):,} parameters on "
            f"{len(self.dataset.train):,} images of {self.config.dataset}, {self.precision} on "
            f"{count}{devices.device_name(self.device)}"
        )


def training_flops(config: ViTConfig, patch_dropout: float = 0.0, *, frozen: int = False) -> int:
    """Floating-point operations per image of a training step, as the scaling papers count them.

    2 per weight and token in the forward pass, twice that in the backward pass, and the two
    products of attention; norms, softmax and GELU are left out (Kaplan et al., arXiv 2001.08361;
    PaLM, arXiv 2204.02311, B). `frozen` layers (`TrainConfig.freeze`) have no backward pass.
    """
    D, N = config.width, config.patches
    kept = patches_kept(N, patch_dropout)
    T = config.tokens - N + kept
    block = T * (4 * D * D + 2 * D * config.hidden) + 2 * T * T * D
    patches = kept * config.channels * config.patch_size**2 * D
    trained = 0 if frozen is True else (config.depth - frozen) * block + (not frozen) * patches
    return 2 * (config.depth * block + patches) + 4 * trained + 6 * D * config.classes


# ---------------------------------------------------------------------------- starting a run


def load_data(config: TrainConfig, preprocessing: Preprocessing, place: Place) -> Dataset:
    """Loads a run's data set, after turning on deterministic kernels if they are wanted."""
    if config.deterministic and place.device.type == "cuda":
        devices.use_deterministic_kernels()
    return datasets.load_dataset(
        config.dataset,
        preprocessing,
        validation_images=config.validation_images,
        device=place.device,
        data_dir=place.options.data_dir,
        world=place.world,
    )


def assemble(
    model: ViT, config: TrainConfig, dataset: Dataset, place: Place, recipe: str = ""
) -> tuple[Run, State]:
    """A run and its first state, from an initialized model on the CPU."""
    count, device, world = len(dataset.train), place.device, place.world
    if config.compile == "graphs" and (device.type != "cuda" or world.size > 1):
        raise UserError("--compile graphs needs one CUDA device; use --compile on")
    if place.options.keep_best and not dataset.validation:
        raise UserError("--keep-best needs validation images; see --validation-images")
    if (last := count % config.batch_size or config.batch_size) < world.size:
        raise UserError(
            f"the last batch of an epoch has {last} images, too few for {world.size} processes; "
            f"choose another --batch-size than {config.batch_size}"
        )
    if config.freeze > (depth := model.config.depth):
        raise UserError(f"--freeze {config.freeze} is above the model's {depth} blocks")
    for name, weight in model.named_parameters() if config.freeze else ():
        trained = layer_of(name, depth + 1) > config.freeze
        weight.requires_grad_(name.startswith("head.") if config.freeze is True else trained)
    class_weights = None
    if config.balance:
        counts = dataset.train.labels.bincount(minlength=len(dataset.classes))  # (K,)
        class_weights = count / (len(counts) * counts)
    precision = devices.resolve_precision(config.precision, device)
    model = model.to(device)
    run = Run(
        **vars(place),
        recipe=recipe,
        config=config,
        dataset=dataset,
        precision=precision,
        model_config=model.config,
        parallel=world.parallel(model),
        augment=Augmentation(config, model.config, count, device),
        normalize=dataset.preprocessing.normalize,
        class_weights=class_weights,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return run, State(model, make_optimizers(model, config, precision), scaler)


def new_run(
    recipe: str,
    model_config: ViTConfig,
    config: TrainConfig,
    place: Place,
    chosen: dict[str, Any] | None = None,
) -> tuple[Run, State]:
    """Starts a run; the data set determines the model's channels and classes.

    With `init_from`, the weights must agree with the `chosen` fields of the model's config, and
    set those that are not `pretrained.FREE`. If this fails, the run's folder is unchanged.
    """
    config = dataclasses.replace(config, dataset=datasets.anchored(config.dataset))
    if place.world.leads:
        place.folder.refuse_existing(place.options.overwrite)  # before a possibly long download
    start = None
    if config.init_from:
        chosen = chosen or {}
        stated = chosen.get("heads"), config.mean, config.std, config.crop
        start = load_pretrained(config.init_from, *stated)
        start = start.for_channels(datasets.preprocessing_for(config.dataset).channels)
        model_config = start.adapted(model_config, chosen)
    expected = start.preprocessing if start else datasets.preprocessing_for(config.dataset)
    preprocessing = dataclasses.replace(expected, size=model_config.image_size, ranges={})
    dataset = load_data(config, preprocessing, place)
    model_config = dataclasses.replace(
        model_config, channels=dataset.preprocessing.channels, classes=len(dataset.classes)
    )
    sized = config.for_images(count := len(dataset.train))
    torch.manual_seed(config.seed)
    model, notes = ViT(model_config), [*dataset.notes]
    if sized != config:
        by = f"{sized.epochs} epochs in batches of {sized.batch_size}"
        notes.append(f"chosen for {count:,} training images: {by}")
        config = sized
    if start:
        notes.append(start.initialize(model, dataset.classes))
    if config.initialization == "mimetic":
        mimetic(model)
    if config.whiten_patches:
        whiten_patches(model, dataset.train, preprocessing)
    if config.freeze is True:
        standardize_features(model.to(place.device), dataset.train, preprocessing)
    run, state = assemble(model, config, dataset, place, recipe)
    if run.world.leads:
        run.folder.make(run.options.overwrite)
    run.world.wait()
    for note in notes:
        run.say(note)
    return run, state


def resumed_run(path: Path, changes: dict[str, Any], place: Place) -> tuple[Run, State]:
    """The run of a last.pt, as it left off, with `changes` to its training config."""
    if path.name != "last.pt":  # the file that the run goes on to overwrite
        raise UserError(f"--resume takes a run's folder or its last.pt, not {path}")
    if place.world.leads:
        place.folder.take()
    place.world.wait()
    checkpoint = load_checkpoint(path)
    if where := changes.get("dataset"):
        changes = changes | {"dataset": datasets.anchored(where)}
        if not (where.startswith(FOLDER) and checkpoint.training.dataset.startswith(FOLDER)):
            raise UserError(f"--dataset with --resume is for a moved folder, not {where}")
    config = dataclasses.replace(checkpoint.training, **changes)
    dataset = load_data(config, checkpoint.preprocessing, place)
    check_fit(checkpoint, dataset)
    run, state = assemble(ViT(checkpoint.model), config, dataset, place, checkpoint.recipe)
    try:
        if not checkpoint.optimizers:
            raise UserError("it holds a model without its optimizers, for sharing")
        state.load(checkpoint, place.world)
        if state.history and dataset.trained is not None:  # pictures may have changed
            last, spe = state.history[-1], run.steps_per_epoch
            state.step += state.epoch * spe - last.step
            state.history[-1] = dataclasses.replace(last, step=state.epoch * spe)
        if not 0 <= run.steps_done(state) <= run.steps_per_epoch:
            raise UserError(f"it is at step {run.steps_done(state)} of {run.steps_per_epoch}")
    except (UserError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed: {one_line(error)}") from error
    run.folder.saved_step = state.step
    run.folder.best_from = 0 if (path.parent / "best.pt").exists() else state.epoch
    if state.step > config.epochs * run.steps_per_epoch:
        raise UserError(f"--epochs {config.epochs} is too few: {state.epoch} epochs are done")
    if config.epochs != (before := checkpoint.training.epochs):
        rate = config.learning_rate * run.rate_factor(state.step)
        run.say(
            f"the {config.schedule} schedule now reaches 0 at epoch {config.epochs} instead of "
            f"{before}: the learning rate continues at {rate:.2g}"
        )
    return run, state
