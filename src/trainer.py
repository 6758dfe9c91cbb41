"""Trains and evaluates a Vision Transformer.

    python src/trainer.py                              CIFAR-10, the default recipe, the best device
    python src/trainer.py --recipe demo                no download, no GPU, about a minute
    python src/trainer.py --recipe NAME --epochs 5     a flag beats the recipe; --help lists all
    python src/trainer.py --resume checkpoints/NAME    go on where a run stopped
    python src/trainer.py --evaluate FILE              test accuracy of a checkpoint
    torchrun --nproc-per-node=K src/trainer.py ...     the same, on K devices

A run writes to checkpoints/<name>/: after each epoch, and every --save-minutes, last.pt and
metrics.csv (a row an epoch), at its end curves.png and result.json. The test images are looked at
once, by a run's last step. Ctrl-C and SIGTERM save first and say how to go on.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import processes
import utils
from augment import random_crop, random_flip
from data import DataError, Dataset, Split, batches, load_dataset, normalise
from processes import (
    FolderInUse,
    Job,
    Stopped,
    World,
    WorldError,
    complain,
    joined_job,
    without_averaging,
)
from recipes import DEFAULT_RECIPE, RECIPES, TrainConfig
from ViT import MODELS, ViT, ViTConfig, parameters_of

Forward = Callable[[Tensor], Tensor]  # a model, compiled or not


RUN_FILES = ("last.pt", "metrics.csv", "curves.png", "result.json")


class UsageError(Exception):
    """The command line asks for what cannot be; the message is one line for the user."""


class Diverged(Exception):
    """The loss or a weight is no longer a number; all ranks of a job raise it together."""


# ---------------------------------------------------------------------------- schedule


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The learning rate of a step as a share of the highest: linear up, then down to 0.

    Args:
        step: 0 for the first; at `steps`, after the last one, the factor is 0.
        warmup: steps of linear warm-up; the last of them is the first at the full rate.
        schedule: "cosine" or "linear", the way down.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------------------- optimizers


def make_optimizers(model: ViT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and beside it Muon for the matrices of the blocks where the config says so.

    Weight decay is for matrices alone: not for biases, norms, the class token and positions. Muon
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes a matrix' update orthogonal.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    use_muon = config.optimizer == "muon"
    hidden = [w for name, w in named if use_muon and name.startswith("blocks.") and w.ndim == 2]
    rest = [w for name, w in named if not any(w is matrix for matrix in hidden)]
    groups = [
        {"params": [w for w in rest if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim != 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)]
    if use_muon:
        optimizers.append(
            torch.optim.Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["highest_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["highest_lr"] * factor


# ---------------------------------------------------------------------------- arithmetic


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


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """The forward pass in bfloat16 where it is safe (autocast), or all of it in float32."""
    if precision == "fp32":
        yield
    elif device.type == "cpu":
        # The CPU's fused attention is 12 times slower backward in bfloat16 than in float32 (Zen 4,
        # torch 2.15, T = 16); the plain products are not.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        with torch.autocast(device.type, torch.bfloat16):
            yield


def compile_pays(model: ViT, config: TrainConfig, images: int, device: torch.device) -> bool:
    """Whether compiling is worth its half minute: on a GPU, or in minutes of work for a CPU."""
    if config.compile != "auto":
        return config.compile == "on"
    # 6 operations a weight and token: 2 forward, 4 backward (Kaplan et al., arXiv 2001.08361).
    work = 6 * parameters_of(model.blocks) * model.config.tokens * images * config.epochs
    return device.type == "cuda" or (device.type == "cpu" and work > 2e13)


def compile_model(model: nn.Module, batch: Tensor, precision: str) -> Forward:
    """The compiled model, after one step that is thrown away.

    Where compiling does not work, say for want of a C++ compiler, it says so and gives the model.
    """
    forward: Forward = torch.compile(model, dynamic=False)
    try:
        with without_averaging(model):
            with arithmetic(precision, batch.device):
                logits = forward(batch)
            logits.float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler can raise, training can do without it
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"torch.compile is not available here ({reason}); training without it")
        forward = model
    model.zero_grad()
    return forward


def only_deterministic_kernels() -> None:
    """Has CUDA choose kernels that repeat bit for bit, and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


# ---------------------------------------------------------------------------- a run


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
    optimizers: list[torch.optim.Optimizer]
    job: Job
    save_minutes: float
    history: list[dict[str, Any]]  # a row for each epoch done
    seconds: dict[str, float]  # "compile" and "total", of the processes before this one
    saved_step: int = 0  # of the checkpoint there is to go on from; 0: there is none
    save_failed: bool = False  # the last time it was tried

    def __post_init__(self):
        self.parallel = self.world.parallel(self.model)  # the model, over all ranks
        self.looked_at = self.saved_at = time.perf_counter()
        self.begin_epoch()

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

    def begin_epoch(self) -> None:
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        self.progress = Progress(losses, torch.zeros((), dtype=torch.int64, device=self.device))

    def end_epoch(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        self.begin_epoch()

    def total_seconds(self) -> float:
        return self.seconds["total"] + utils.process_seconds()

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


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """The recipe's augmentation of a batch of uint8 images (B, C, H, W)."""
    if config.flip:
        images = random_flip(images, generator)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, generator)
    return images


def train_epoch(run: Run, forward: Forward) -> dict[str, Any]:
    """Shows the model every training image once, or those that an interrupted epoch has left.

    Returns:
        The first columns of metrics.csv.

    Raises:
        Diverged: a loss is not finite.
        Stopped: a signal has come; everything is saved.
    """
    config, epoch, done = run.config, run.epoch, run.progress
    run.model.train()
    started = time.perf_counter() - done.seconds
    shuffle = utils.generator_for(config.seed, epoch)
    with progress_bar(run) as bar:
        for batch in batches(run.dataset.train, config.batch_size, shuffle, start=done.steps):
            set_learning_rates(run.optimizers, run.rate_factor(run.step))
            draws = utils.generator_for(config.seed, epoch, done.steps, device=run.device)
            images = augment(batch.images, config, draws)
            # Dropout and drop path draw from torch's own generators, on each rank differently.
            torch.manual_seed(utils.seed_for(config.seed, epoch, done.steps, run.world.rank))
            # A short last batch would be compiled for its size alone; it goes uncompiled instead.
            model = forward if len(batch) == config.batch_size else run.parallel
            loss, correct = add_gradients(run, model, images, batch.labels)

            if config.gradient_clip:
                nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_clip)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()

            done.losses[done.steps] = loss
            done.correct += correct
            done.steps += 1
            done.seconds = time.perf_counter() - started
            bar.update(len(batch))
            after_step(run, bar)
    losses = run.check_losses()  # which waits for the device
    done.seconds = time.perf_counter() - started
    images = len(run.dataset.train)
    return {
        "epoch": epoch + 1,
        "step": run.step,
        "learning_rate": config.learning_rate * run.rate_factor(run.step - 1),
        "train_loss": losses.mean().item(),
        "train_accuracy": run.world.sum(done.correct).item() / images,
        "seconds": done.seconds,
        "images_per_second": images / done.seconds,
    }


def add_gradients(
    run: Run, model: Forward, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the batch's mean loss, for the images that are this rank's to do.

    They go through the model in `accumulate` parts, whose gradients add up. Every rank makes the
    same batch and takes a share of it, so that a run does not depend on the number of ranks.

    Args:
        images: (B, C, H, W) uint8 and augmented, of all ranks.
        labels: (B,)

    Returns:
        This rank's share of the loss, and how many of its images were classified right.
    """
    world, config = run.world, run.config
    rows = world.share(torch.arange(len(labels), device=run.device))
    counts = len(rows) > 0
    if not counts:  # a batch of fewer images than ranks; averaging waits for every rank
        rows = torch.zeros(1, dtype=torch.int64, device=run.device)
    loss, correct = torch.zeros((), device=run.device), 0
    parts = rows.tensor_split(min(config.accumulate, len(rows)))
    for part in parts:
        with nullcontext() if part is parts[-1] else without_averaging(run.parallel):
            inputs = normalise(images[part], run.dataset.mean, run.dataset.std)
            with arithmetic(run.precision, run.device):
                logits = model(inputs).to(inputs.dtype)
            summed = F.cross_entropy(
                logits, labels[part], label_smoothing=config.label_smoothing, reduction="sum"
            )
            share = summed * (counts / len(labels))
            (share * world.size).backward()  # the ranks' gradients are averaged, not added
        loss += share.detach()
        correct += (logits.argmax(dim=1) == labels[part]).sum() * counts
    return loss, correct


class Due(IntEnum):
    """What a step is followed by; each includes those before it."""

    NOTHING = 0
    LOOK = 1  # at the losses: reading one waits for the device, so it is done once a second
    SAVE = 2
    STOP = 3


def after_step(run: Run, bar: tqdm) -> None:
    """Looks at the losses, saves, and stops, each where it is due on any rank.

    Raises:
        Diverged: a loss is not finite.
        Stopped: a signal has come; everything is saved.
    """
    now, due = time.perf_counter(), Due.NOTHING
    if now - run.looked_at > 1:
        due = Due.LOOK
    if now - run.saved_at >= 60 * run.save_minutes and run.progress.steps < run.steps_per_epoch:
        due = Due.SAVE
    if run.job.stop.received:
        due = Due.STOP
    due = run.world.agree(due)
    if due >= Due.LOOK:
        losses, rate = run.check_losses(), run.optimizers[0].param_groups[0]["lr"]
        bar.set_postfix(loss=f"{losses[-1].item():.3f}", lr=f"{rate:.1e}", refresh=False)
        run.looked_at = now
    if due >= Due.SAVE:
        run.save(last=due == Due.STOP)
    if due >= Due.STOP:
        raise Stopped(run.job.stop.received or signal.SIGTERM)


def progress_bar(run: Run) -> tqdm:
    """A bar for an epoch, on a terminal."""
    return tqdm(
        total=len(run.dataset.train),
        initial=run.progress.steps * run.config.batch_size,
        desc=f"epoch {run.epoch + 1}/{run.config.epochs}",
        unit=" images",
        disable=None if run.world.leads else True,  # None: no bar where the output is a file
        leave=False,
    )


# ---------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    """How good a model's logits are; accuracies from 0 to 1."""

    loss: float  # cross-entropy in nats
    top1: float
    top5: float
    of_class: list[float]  # top-1 within each class


def predict(model: ViT, split: Split, dataset: Dataset, batch_size: int = 500) -> Tensor:
    """Logits (n, K) of a split, in float32 whatever the training ran in."""
    model.eval()
    with torch.inference_mode():
        return torch.cat(
            [
                model(normalise(batch.images, dataset.mean, dataset.std))
                for batch in batches(split, batch_size)
            ]
        )


def evaluate(
    model: ViT, split: Split, dataset: Dataset, world: World = processes.ALONE
) -> Evaluation:
    """Evaluates a model on a split, each image once, on the one rank that has it in its share."""
    share = split.take(world.share(torch.arange(len(split), device=split.labels.device)))
    logits, labels = predict(model, share, dataset).cpu(), share.labels.cpu()
    best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
    hits = (best == labels[:, None]).double()  # (n, 5)
    classes = F.one_hot(labels, len(dataset.classes)).double()  # (n, K)
    summed = world.sum(F.cross_entropy(logits.double(), labels, reduction="sum"))
    found = world.sum(hits.sum(dim=0))  # (5,): as the first answer, as the second, ...
    hits_of_class = world.sum(hits[:, 0] @ classes)  # (K,)
    images_of_class = world.sum(classes.sum(dim=0))
    return Evaluation(
        loss=summed.item() / len(split),
        top1=found[0].item() / len(split),
        top5=found.sum().item() / len(split),
        of_class=(hits_of_class / images_of_class).tolist(),
    )


def report(path: Path, arguments: argparse.Namespace, device: torch.device, world: World) -> None:
    """--evaluate: loss, top-1, top-5 and the accuracy of each class on the test images."""
    path = _checkpoint_file(path)
    model, checkpoint = utils.load_model(path, device)
    name = str(checkpoint["train_config"].get("dataset"))
    dataset = _dataset(name, 0, arguments, device, world)
    _check_fit(model.config, dataset)
    result = evaluate(model, dataset.test, dataset, world)
    if not world.leads:
        return
    print(f"{path}: {len(dataset.test):,} test images of {name}")
    print(f"{'loss':12}{result.loss:8.4f}")
    print(f"{'top-1':12}{result.top1:8.2%}")
    print(f"{'top-5':12}{result.top5:8.2%}")
    for label, accuracy in zip(dataset.classes, result.of_class, strict=True):
        print(f"  {label:10}{accuracy:8.2%}")


# ---------------------------------------------------------------------------- from flags to a run


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags for every field of ViTConfig and TrainConfig; help shows the chosen recipe's values."""
    first = utils.Parser(prog="trainer.py", add_help=False)
    first.add_argument("--recipe", choices=RECIPES, default=DEFAULT_RECIPE, help="where to start")
    recipe = RECIPES[first.parse_known_args(argv)[0].recipe]

    parser = utils.Parser(
        prog=first.prog,
        parents=[first],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="recipes:\n"
        + "\n".join(
            f"  {name:10}{recipe.about.splitlines()[0]}" for name, recipe in RECIPES.items()
        ),
    )
    run = parser.add_argument_group("run")
    task = run.add_mutually_exclusive_group()
    task.add_argument("--resume", metavar="RUN", type=utils.existing_path, help="go on with a run")
    task.add_argument(
        "--evaluate", metavar="FILE", type=utils.existing_path, help="test a checkpoint"
    )
    run.add_argument("--name", help="the run's folder under checkpoints/ (the recipe's name)")
    run.add_argument("--overwrite", action="store_true", help="replace a run of that name")
    run.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=utils.ROOT / "checkpoints",
        help="where run folders are (checkpoints/)",
    )
    run.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=utils.ROOT / "data",
        help="where CIFAR-10 is, or will be downloaded to (data/)",
    )
    run.add_argument("--data-url", metavar="URL", help="another address of CIFAR-10's archive")
    run.add_argument(
        "--no-test",
        action="store_true",
        help="leave the test images alone, for choosing by the validation images",
    )
    run.add_argument(
        "--save-minutes",
        metavar="MINUTES",
        type=_minutes,
        default=10.0,
        help="save also within an epoch, so often at most; 0 is after each step (10)",
    )
    run.add_argument("--device", help="cuda, cuda:1, mps or cpu (the best there is)")
    model = parser.add_argument_group("model (value of the recipe)")
    model.add_argument("--model", choices=MODELS, help="a size: sets --width, --depth and --heads")
    utils.add_flags(model, recipe.model)
    utils.add_flags(parser.add_argument_group("training (value of the recipe)"), recipe.train)
    return parser.parse_args(argv)


def _minutes(text: str) -> float:
    """A time in minutes, 0 or more."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes")
    return minutes


def choose_device(name: str | None, world: World = processes.ALONE) -> torch.device:
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
        return utils.best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name} is not here; try cpu, or none for the best") from None
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL
    return device


def new_run(arguments: argparse.Namespace, device: torch.device, job: Job) -> Run:
    """A fresh run of a recipe, changed by the flags given."""
    recipe = RECIPES[arguments.recipe]
    size = MODELS[arguments.model] if arguments.model else {}
    try:
        model_config = dataclasses.replace(recipe.model, **size | utils.given(arguments, ViTConfig))
        config = dataclasses.replace(recipe.train, **utils.given(arguments, TrainConfig))
    except ValueError as error:
        raise UsageError(str(error)) from error
    name = arguments.name or arguments.recipe
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise UsageError(f"--name {name!r} must be letters, digits, '.', '_' and '-'")
    folder = arguments.output_dir / name
    if job.world.leads:
        _refuse_existing(folder, arguments)  # before what may be a long download
    dataset = _dataset(config.dataset, config.validation_images, arguments, device, job.world)
    _check_fit(model_config, dataset)
    _take_new_folder(folder, arguments, job)
    torch.manual_seed(config.seed)
    model = ViT(model_config).to(device)
    return Run(
        folder=folder,
        recipe=arguments.recipe,
        config=config,
        dataset=dataset,
        device=device,
        precision=resolve_precision(config.precision, device),
        model=model,
        optimizers=make_optimizers(model, config),
        job=job,
        save_minutes=arguments.save_minutes,
        history=[],
        seconds={"compile": 0.0, "total": 0.0},
    )


def resumed_run(arguments: argparse.Namespace, device: torch.device, job: Job) -> Run:
    """The run whose folder or checkpoint is given, as its last checkpoint left it."""
    changed = utils.given(arguments, ViTConfig) | utils.given(arguments, TrainConfig)
    refused = [name for name in changed if name not in ("epochs", "accumulate")]
    if refused or arguments.model:
        flag = (refused or ["model"])[0].replace("_", "-")
        raise UsageError(
            f"--{flag} cannot change while a run goes on; only --epochs and --accumulate can"
        )
    path = _checkpoint_file(arguments.resume)
    _take_folder(path.parent, job)
    model, checkpoint = utils.load_model(path, device)
    try:
        before = utils.config_from(TrainConfig, checkpoint["train_config"])
        optimizers = make_optimizers(model, before)
        utils.load_optimizers(optimizers, checkpoint["optimizers"])
    except ValueError as error:
        raise utils.CheckpointError(f"{path} cannot be gone on with: {error}") from error
    try:
        config = dataclasses.replace(before, **changed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    dataset = _dataset(config.dataset, config.validation_images, arguments, device, job.world)
    _check_fit(model.config, dataset)
    run = Run(
        folder=path.parent,
        recipe=checkpoint["recipe"],
        config=config,
        dataset=dataset,
        device=device,
        precision=resolve_precision(config.precision, device),
        model=model,
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
            utils.remove_partial_files(folder)
    except OSError as error:
        raise UsageError(f"cannot use {folder}: {error.strerror}") from error


def _checkpoint_file(path: Path) -> Path:
    return path / "last.pt" if path.is_dir() else path


def _dataset(
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


def _check_fit(config: ViTConfig, dataset: Dataset) -> None:
    channels, *size = dataset.train.images.shape[1:]
    wanted = (config.channels, *config.image_size, config.classes)
    found = (channels, *size, len(dataset.classes))
    if wanted != found:
        names = ("channels", "height", "width", "classes")
        raise UsageError(
            f"the model is for {dict(zip(names, wanted, strict=True))}, "
            f"but {dataset.name} has {dict(zip(names, found, strict=True))}"
        )


# ---------------------------------------------------------------------------- main


def train(run: Run, command: str, no_test: bool) -> bool:
    """Trains a run to its last epoch, then tests it and writes what it came to.

    Returns:
        Whether all of it could be written.
    """
    config, world = run.config, run.world
    devices = f"{world.size} x " * (world.size > 1) + utils.device_name(run.device)
    run.say(
        f"{run.folder}: ViT of {parameters_of(run.model):,} parameters on "
        f"{len(run.dataset.train):,} images of {config.dataset}, {run.precision} on {devices}"
    )
    forward: Forward = run.parallel
    if run.epoch < config.epochs and compile_pays(
        run.model, config, len(run.dataset.train), run.device
    ):
        forward = compiled(run)

    with run.job.stop.postponed():
        while run.epoch < config.epochs:
            row = train_epoch(run, forward)
            row |= {"validation_loss": None, "validation_accuracy": None}
            if len(run.dataset.validation):
                validation = evaluate(run.model, run.dataset.validation, run.dataset, world)
                row |= {"validation_loss": validation.loss, "validation_accuracy": validation.top1}
            run.end_epoch(row)
            run.save()
            run.say(epoch_line(row, config.epochs))

    started = time.perf_counter()
    test = None if no_test else evaluate(run.model, run.dataset.test, run.dataset, world)
    if run.save_failed:
        run.save(last=True)
    return write_outcome(run, test, time.perf_counter() - started, command)


def compiled(run: Run) -> Forward:
    """The model, compiled for the batches that this rank will see."""
    run.say("compiling the model ...")
    started = time.perf_counter()
    run.model.train()
    share = run.world.share(torch.arange(run.config.batch_size, device=run.device))
    example = run.dataset.train.take(share.tensor_split(run.config.accumulate)[0]).images
    example = normalise(example, run.dataset.mean, run.dataset.std)
    forward = compile_model(run.parallel, example, run.precision)
    run.seconds["compile"] += time.perf_counter() - started
    return forward


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in a line."""
    line = f"epoch {row['epoch']:3}/{epochs}   train loss {row['train_loss']:.4f}"
    if row["validation_loss"] is not None:
        line += f"   validation loss {row['validation_loss']:.4f}"
        line += f"   accuracy {row['validation_accuracy']:.2%}"
    return f"{line}   {row['seconds']:.1f} s"


def write_outcome(
    run: Run, test: Evaluation | None, evaluation_seconds: float, command: str
) -> bool:
    """curves.png, result.json and the last lines on the terminal; whether all is written."""
    if not run.world.leads:
        return True
    outcome = f"test loss {test.loss:.4f}   test accuracy {test.top1:.2%}" if test else "not tested"
    training = sum(row["seconds"] for row in run.history)
    result = {
        "command": command,
        "recipe": run.recipe,
        "model": dataclasses.asdict(run.model.config),
        "training": dataclasses.asdict(run.config),
        "parameters": parameters_of(run.model),
        "epochs": run.config.epochs,
        "seed": run.config.seed,
        "device": run.device.type,
        "device_name": utils.device_name(run.device),
        "processes": run.world.size,
        "precision": run.precision,
        "torch": str(torch.__version__),
        "validation_accuracy": run.history[-1]["validation_accuracy"],
        "test_accuracy": test.top1 if test else None,
        "test_loss": test.loss if test else None,
        "seconds": {
            "training": training,
            "evaluation": evaluation_seconds,
            "compile": run.seconds["compile"],
            "total": run.total_seconds(),
        },
        "images_per_second": len(run.dataset.train) * run.config.epochs / training,
        "peak_memory_bytes": utils.peak_memory_bytes(run.device),
    }
    print(f"{outcome}   {training:.0f} s of training, {result['seconds']['total']:.0f} s in all")
    try:
        utils.write_curves(run.folder / "curves.png", run.history, f"{run.folder.name}: {outcome}")
        utils.write_json(run.folder / "result.json", result)
    except OSError as error:
        complain(f"cannot write the result to {run.folder}: {error.strerror or error}")
        return False
    if run.save_failed:
        complain(f"the last checkpoint could not be written to {run.folder}")
        return False
    print(f"wrote last.pt, metrics.csv, result.json and curves.png to {run.folder}")
    return True


def go_on_hint(run: Run | None, arguments: argparse.Namespace) -> str:
    """What becomes of a run that stopped."""
    if run is None or not run.saved_step:
        return "nothing was trained, and nothing is saved"
    unsaved = "the last steps could not be saved; " * run.save_failed
    return f"{unsaved}go on with --resume {run.folder}" + " --no-test" * arguments.no_test


def out_of_memory_hint(run: Run | None) -> str:
    if run is None:
        return "out of memory"
    batch, parts = run.config.batch_size, run.config.accumulate
    more_parts = f"--accumulate {2 * parts} for the same batch in smaller parts, or "
    return (
        f"out of memory with --batch-size {batch} --accumulate {parts}; try "
        f"{more_parts * (2 * parts <= batch)}a smaller --batch-size{run.what_is_kept()}"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an exception of its own; the CPU's allocator has a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_finished(run: Run) -> bool:
    """Whether a run has done all its epochs and written what they came to."""
    try:
        result = json.loads((run.folder / "result.json").read_text())
        return run.epoch == run.config.epochs == result["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    arguments = parse_arguments(argv)
    command = shlex.join(["python", "src/trainer.py", *argv])
    run = None
    try:
        with joined_job(arguments.device != "cpu" and torch.cuda.is_available()) as job:
            utils.keep_freed_memory()
            device = choose_device(arguments.device, job.world)
            if arguments.evaluate:
                report(arguments.evaluate, arguments, device, job.world)
                return 0
            run = (resumed_run if arguments.resume else new_run)(arguments, device, job)
            if is_finished(run):
                run.say(f"{run.folder} has done its {run.epoch} epochs; raise --epochs to go on")
                return 0
            if run.config.deterministic and device.type == "cuda":
                only_deterministic_kernels()
            return 0 if train(run, command, arguments.no_test) else 1
    except (UsageError, DataError, FolderInUse, utils.CheckpointError) as error:
        complain(str(error))
        return 2
    except Diverged as error:
        if run.world.leads:
            complain(str(error))
        return 1
    except WorldError as error:
        complain(str(error))
        return 1
    except Stopped as stop:
        if run is None or run.world.leads:
            complain(f"stopped by {stop}; {go_on_hint(run, arguments)}")
        return stop.status
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        complain(out_of_memory_hint(run))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
