"""Trains and evaluates a Vision Transformer.

    python src/trainer.py                              CIFAR-10, the default recipe, the best device
    python src/trainer.py --recipe demo                no download, no GPU, about a minute
    python src/trainer.py --recipe NAME --epochs 5     a flag beats the recipe; --help lists all
    python src/trainer.py --resume checkpoints/NAME    go on where a run stopped
    python src/trainer.py --evaluate FILE              test accuracy of a checkpoint

A run writes to checkpoints/<name>/: after each epoch last.pt and metrics.csv (a row an epoch), at
its end curves.png and result.json. The test images are looked at once, by a run's last step.
"""

import argparse
import dataclasses
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import utils
from augment import random_crop, random_flip
from data import DataError, Dataset, Split, batches, load_dataset, normalise
from recipes import DEFAULT_RECIPE, RECIPES, TrainConfig
from ViT import MODELS, ViT, ViTConfig, parameters_of

Forward = Callable[[Tensor], Tensor]  # a model, compiled or not


class UsageError(Exception):
    """The command line asks for what cannot be; the message is one line for the user."""


class Diverged(Exception):
    """The loss is no longer a number."""


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


def compile_model(model: ViT, batch: Tensor, precision: str) -> tuple[Forward, float]:
    """The compiled model, after one step that is thrown away, and the seconds that took.

    Where compiling does not work, say for want of a C++ compiler, it says so and gives the model.
    """
    print("compiling the model ...", flush=True)
    started = time.perf_counter()
    forward: Forward = torch.compile(model, dynamic=False)
    gpus = [batch.device] if batch.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus), arithmetic(precision, batch.device):
            forward(batch).float().sum().backward()
    except Exception as error:  # whatever a compiler can raise, training can do without it
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"torch.compile is not available here ({reason}); training without it")
        forward = model
    model.zero_grad()
    return forward, time.perf_counter() - started


# ---------------------------------------------------------------------------- a run


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
    history: list[dict[str, Any]]  # a row for each epoch done
    seconds: dict[str, float]  # "compile" and "total", of the processes before this one

    @property
    def epoch(self) -> int:
        """Epochs done, which is also the number of the next one, counted from 0."""
        return len(self.history)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset.train) / self.config.batch_size)

    def rate_factor(self, step: int) -> float:
        """`learning_rate_factor` at a step of the next epoch, 0 for its first."""
        return learning_rate_factor(
            self.epoch * self.steps_per_epoch + step,
            steps=self.config.epochs * self.steps_per_epoch,
            warmup=round(self.config.warmup_epochs * self.steps_per_epoch),
            schedule=self.config.schedule,
        )

    def total_seconds(self) -> float:
        return self.seconds["total"] + utils.process_seconds()

    def save(self) -> None:
        utils.save_checkpoint(
            self.folder / "last.pt",
            model_config=dataclasses.asdict(self.model.config),
            train_config=dataclasses.asdict(self.config),
            recipe=self.recipe,
            weights=self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            epoch=self.epoch,
            random_state=utils.random_state(),
            history=self.history,
            seconds=self.seconds | {"total": self.total_seconds()},
            classes=list(self.dataset.classes),
            mean=list(self.dataset.mean),
            std=list(self.dataset.std),
        )
        utils.write_metrics(self.folder / "metrics.csv", self.history)


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """The recipe's augmentation of a batch of uint8 images (B, C, H, W)."""
    if config.flip:
        images = random_flip(images, generator)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, generator)
    return images


def train_epoch(run: Run, forward: Forward) -> dict[str, Any]:
    """Shows the model every training image once; returns the first columns of metrics.csv."""
    config, epoch, steps = run.config, run.epoch, run.steps_per_epoch
    run.model.train()
    losses = torch.zeros(steps, device=run.device)
    correct = torch.zeros((), device=run.device)
    started = time.perf_counter()
    with progress_bar(run, losses) as advance:
        shuffle = utils.generator_for(config.seed, epoch)
        for step, batch in enumerate(batches(run.dataset.train, config.batch_size, shuffle)):
            set_learning_rates(run.optimizers, run.rate_factor(step))
            draws = utils.generator_for(config.seed, epoch, step, device=run.device)
            images = augment(batch.images, config, draws)
            images = normalise(images, run.dataset.mean, run.dataset.std)
            # A short last batch would be compiled for its size alone; it goes uncompiled instead.
            model = forward if len(batch) == config.batch_size else run.model
            with arithmetic(run.precision, run.device):
                logits = model(images).float()
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)

            loss.backward()
            if config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_clip)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()

            losses[step] = loss.detach()
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            advance(step, len(batch))
    images = len(run.dataset.train)
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * steps,
        "learning_rate": run.optimizers[0].param_groups[0]["lr"],
        "train_loss": losses.mean().item(),
        "train_accuracy": correct.item() / images,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }


@contextmanager
def progress_bar(run: Run, losses: Tensor) -> Iterator[Callable[[int, int], None]]:
    """A bar for an epoch, on a terminal, that also watches that the losses are numbers.

    Reading a loss waits for the device, so both look at the losses once a second and at the end.

    Raises:
        Diverged: a loss is not finite; names the step and its learning rate.
    """
    looked = time.perf_counter()

    def look(step: int) -> None:
        broken = (~losses[: step + 1].isfinite()).nonzero()
        if len(broken):
            raise _diverged(run, int(broken[0]), float(losses[broken[0]]))
        rate = run.optimizers[0].param_groups[0]["lr"]
        bar.set_postfix(loss=f"{losses[step].item():.3f}", lr=f"{rate:.1e}", refresh=False)

    def advance(step: int, images: int) -> None:
        nonlocal looked
        if time.perf_counter() - looked > 1 or step + 1 == run.steps_per_epoch:
            look(step)
            looked = time.perf_counter()
        bar.update(images)

    with tqdm(
        total=len(run.dataset.train),
        desc=f"epoch {run.epoch + 1}/{run.config.epochs}",
        unit=" images",
        disable=None,  # no bar where the output is a file
        leave=False,
    ) as bar:
        yield advance


def _diverged(run: Run, step: int, loss: float) -> Diverged:
    rate = run.rate_factor(step) * run.config.learning_rate
    kept = f"; {run.folder / 'last.pt'} holds epoch {run.epoch}" if run.epoch else ""
    return Diverged(
        f"the loss is {loss} at step {run.epoch * run.steps_per_epoch + step + 1} "
        f"(epoch {run.epoch + 1}, learning rate {rate:.2g}); try a lower --learning-rate, "
        f"more --warmup-epochs, --gradient-clip 1 or --precision fp32{kept}"
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


def evaluate(model: ViT, split: Split, dataset: Dataset) -> Evaluation:
    """Evaluates a model on a split, each image once."""
    logits, labels = predict(model, split, dataset).cpu(), split.labels.cpu()
    best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
    hits = best == labels[:, None]
    return Evaluation(
        loss=F.cross_entropy(logits, labels).item(),
        top1=hits[:, 0].double().mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        of_class=[
            hits[labels == label, 0].double().mean().item() for label in range(len(dataset.classes))
        ],
    )


def report(path: Path, arguments: argparse.Namespace) -> None:
    """--evaluate: loss, top-1, top-5 and the accuracy of each class on the test images."""
    device = choose_device(arguments.device)
    model, checkpoint = utils.load_model(_checkpoint_file(path), device)
    name = checkpoint["train_config"].get("dataset")
    dataset = _dataset(name, 0, arguments, device)
    result = evaluate(model, dataset.test, dataset)
    print(f"{_checkpoint_file(path)}: {len(dataset.test):,} test images of {name}")
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
    run.add_argument("--device", help="cuda, cuda:1, mps or cpu (the best there is)")
    model = parser.add_argument_group("model (value of the recipe)")
    model.add_argument("--model", choices=MODELS, help="a size: sets --width, --depth and --heads")
    utils.add_flags(model, recipe.model)
    utils.add_flags(parser.add_argument_group("training (value of the recipe)"), recipe.train)
    return parser.parse_args(argv)


def choose_device(name: str | None) -> torch.device:
    """Raises UsageError for a device that this machine does not have."""
    if name is None:
        return utils.best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name} is not here; try cpu, or none for the best") from None
    return device


def new_run(arguments: argparse.Namespace, device: torch.device) -> Run:
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
    files = [folder / name for name in ("last.pt", "metrics.csv", "curves.png", "result.json")]
    if any(file.exists() for file in files) and not arguments.overwrite:
        raise UsageError(f"{folder} exists; --resume it, --overwrite it, or choose another --name")
    dataset = _dataset(config.dataset, config.validation_images, arguments, device)
    _check_fit(model_config, dataset)
    torch.manual_seed(config.seed)
    model = ViT(model_config).to(device)
    optimizers = make_optimizers(model, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    return Run(
        folder=folder,
        recipe=arguments.recipe,
        config=config,
        dataset=dataset,
        device=device,
        precision=resolve_precision(config.precision, device),
        model=model,
        optimizers=optimizers,
        history=[],
        seconds={"compile": 0.0, "total": 0.0},
    )


def resumed_run(arguments: argparse.Namespace, device: torch.device) -> Run:
    """The run whose folder or checkpoint is given, as its last checkpoint left it."""
    changed = utils.given(arguments, ViTConfig) | utils.given(arguments, TrainConfig)
    refused = [name for name in changed if name != "epochs"]
    if refused or arguments.model:
        flag = (refused or ["model"])[0].replace("_", "-")
        raise UsageError(f"--{flag} cannot change while a run goes on; only --epochs can")
    path = _checkpoint_file(arguments.resume)
    model, checkpoint = utils.load_model(path, device)
    try:
        config = TrainConfig(**checkpoint["train_config"] | changed)
        optimizers = make_optimizers(model, config)
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        utils.set_random_state(checkpoint["random_state"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise utils.CheckpointError(f"{path} cannot be gone on with: {error}") from error
    dataset = _dataset(config.dataset, config.validation_images, arguments, device)
    return Run(
        folder=path.parent,
        recipe=checkpoint["recipe"],
        config=config,
        dataset=dataset,
        device=device,
        precision=resolve_precision(config.precision, device),
        model=model,
        optimizers=optimizers,
        history=checkpoint["history"],
        seconds=checkpoint["seconds"],
    )


def _checkpoint_file(path: Path) -> Path:
    return path / "last.pt" if path.is_dir() else path


def _dataset(
    name: str, validation_images: int, arguments: argparse.Namespace, device: torch.device
) -> Dataset:
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


def train(run: Run, command: str, no_test: bool) -> None:
    """Trains a run to its last epoch, then tests it and writes what it came to."""
    config, device = run.config, run.device
    total = parameters_of(run.model)
    print(
        f"{run.folder}: ViT of {total:,} parameters on {len(run.dataset.train):,} images of "
        f"{config.dataset}, {run.precision} on {utils.device_name(device)}",
        flush=True,
    )
    forward: Forward = run.model
    if compile_pays(run.model, config, len(run.dataset.train), device):
        example = run.dataset.train.take(torch.arange(config.batch_size, device=device)).images
        example = normalise(example, run.dataset.mean, run.dataset.std)
        forward, seconds = compile_model(run.model, example, run.precision)
        run.seconds["compile"] += seconds

    while run.epoch < config.epochs:
        row = train_epoch(run, forward)
        row |= {"validation_loss": None, "validation_accuracy": None}
        if len(run.dataset.validation):
            validation = evaluate(run.model, run.dataset.validation, run.dataset)
            row |= {"validation_loss": validation.loss, "validation_accuracy": validation.top1}
        run.history.append(row)
        run.save()
        print(epoch_line(row, config.epochs), flush=True)

    started = time.perf_counter()
    test = None if no_test else evaluate(run.model, run.dataset.test, run.dataset)
    write_outcome(run, test, time.perf_counter() - started, command)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in a line."""
    line = f"epoch {row['epoch']:3}/{epochs}   train loss {row['train_loss']:.4f}"
    if row["validation_loss"] is not None:
        line += f"   validation loss {row['validation_loss']:.4f}"
        line += f"   accuracy {row['validation_accuracy']:.2%}"
    return f"{line}   {row['seconds']:.1f} s"


def write_outcome(
    run: Run, test: Evaluation | None, evaluation_seconds: float, command: str
) -> None:
    """curves.png, result.json and the last lines on the terminal."""
    outcome = f"test loss {test.loss:.4f}   test accuracy {test.top1:.2%}" if test else "not tested"
    utils.write_curves(run.folder / "curves.png", run.history, f"{run.folder.name}: {outcome}")
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
    utils.write_json(run.folder / "result.json", result)
    print(f"{outcome}   {training:.0f} s of training, {result['seconds']['total']:.0f} s in all")
    print(f"wrote last.pt, metrics.csv, result.json and curves.png to {run.folder}")


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    arguments = parse_arguments(argv)
    run = None
    try:
        utils.keep_freed_memory()
        if arguments.evaluate:
            report(arguments.evaluate, arguments)
            return 0
        device = choose_device(arguments.device)
        run = resumed_run(arguments, device) if arguments.resume else new_run(arguments, device)
        if run.epoch >= run.config.epochs:
            print(f"{run.folder} has done its {run.epoch} epochs; raise --epochs to go on")
            return 0
        train(run, shlex.join(["python", "src/trainer.py", *argv]), arguments.no_test)
        return 0
    except (UsageError, DataError, utils.CheckpointError) as error:
        print(f"trainer.py: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"trainer.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = f"; go on with --resume {run.folder}" if run and run.epoch else ""
        print(f"\ntrainer.py: stopped{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
