"""Trains and evaluates a Vision Transformer.

    python src/trainer.py                              CIFAR-10, the default recipe, the best device
    python src/trainer.py --recipe demo                no download, no GPU, about a minute
    python src/trainer.py --recipe cpu --epochs 5      a flag beats the recipe; --help lists all
    python src/trainer.py --resume checkpoints/NAME    go on where a run stopped
    python src/trainer.py --evaluate FILE              test accuracy of a checkpoint
    python src/trainer.py --export checkpoints/NAME    its model alone, in half precision
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
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import machine
import processes
import utils
from augment import augment
from data import DataError, Dataset, Split, batch_rows, batches, normalise
from machine import choose_device
from optimizers import set_learning_rates
from processes import (
    FolderInUse,
    Stopped,
    World,
    WorldError,
    complain,
    joined_job,
    without_averaging,
)
from recipes import DEFAULT_RECIPE, RECIPES, TrainConfig
from run import Diverged, Run, check_fit, checkpoint_file, dataset_for, new_run, resumed_run
from utils import UsageError
from ViT import MODELS, ViT, ViTConfig, parameters_of

Forward = Callable[[Tensor], Tensor]  # a model, compiled or not


# ---------------------------------------------------------------------------- arithmetic

# Floating-point operations of a training, and their time on a CPU that does some 2e11 a second.
WORTH_COMPILING = 2e13  # two minutes
FOR_A_GPU = 1e16  # half a day


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The forward pass in bfloat16 where it is safe (autocast), or all of it in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_pays(run: Run, operations: float) -> bool:
    """Whether compiling is worth its half minute: on a GPU, or in minutes of work for a CPU."""
    if run.config.compile != "auto":
        return run.config.compile == "on"
    return run.device.type == "cuda" or (run.device.type == "cpu" and operations > WORTH_COMPILING)


def compile_model(model: nn.Module, batch: Tensor, precision: str) -> Forward:
    """The compiled model, after one step that is thrown away.

    Where compiling does not work, say for want of a C++ compiler, it says so and gives the model.
    """
    forward: Forward = torch.compile(model, dynamic=False)
    try:
        with without_averaging(model):
            with autocast(precision, batch.device):
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


# ---------------------------------------------------------------------------- training


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
    order = batch_rows(run.dataset.train, config.batch_size, shuffle)
    with progress_bar(run) as bar:
        for rows in order[done.steps :]:
            set_learning_rates(run.optimizers, run.rate_factor(run.step))
            batch, draws = run.dataset.train.take(rows), (config.seed, epoch, done.steps)
            targets = targets_of(batch, len(run.dataset.classes))
            images, targets = augment(
                batch.images, targets, config, utils.seed_for(*draws), run.coins[rows], epoch
            )
            # Dropout, drop path and patch dropout draw from torch's own generators, on each rank
            # differently.
            torch.manual_seed(utils.seed_for(*draws, run.world.rank))
            # A short last batch would be compiled for its size alone; it goes uncompiled instead.
            model = forward if len(batch) == config.batch_size else run.parallel
            loss, correct = add_gradients(run, model, images, targets)

            if config.gradient_clip:
                nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_clip)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.average_weights()

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


def targets_of(batch: Split, classes: int) -> Tensor:
    """The labels as probabilities (B, K)."""
    return F.one_hot(batch.labels, classes).to(torch.get_default_dtype())


def add_gradients(
    run: Run, model: Forward, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the batch's mean loss, for the images that are this rank's to do.

    They go through the model in `accumulate` parts, whose gradients add up. Every rank makes the
    same batch and takes a share of it, so that a run does not depend on the number of ranks.

    Args:
        images: (B, C, H, W) uint8 and augmented, of all ranks.
        targets: (B, K), the probability of each class.

    Returns:
        This rank's share of the loss, and how many of its images were classified right: as the
        likeliest class of their target.
    """
    world, config = run.world, run.config
    rows = world.share(torch.arange(len(targets), device=run.device))
    has_rows = len(rows) > 0
    if not has_rows:  # a batch of fewer images than ranks; averaging waits for every rank
        rows = torch.zeros(1, dtype=torch.int64, device=run.device)
    loss, correct = torch.zeros((), device=run.device), 0
    parts = rows.tensor_split(min(config.accumulate, len(rows)))
    for part in parts:
        with nullcontext() if part is parts[-1] else without_averaging(run.parallel):
            inputs = normalise(images[part], run.dataset.mean, run.dataset.std)
            with autocast(run.precision, run.device):
                logits = model(inputs).to(inputs.dtype)
            summed = F.cross_entropy(
                logits, targets[part], label_smoothing=config.label_smoothing, reduction="sum"
            )
            share = summed * (has_rows / len(targets))
            (share * world.size).backward()  # the ranks' gradients are averaged, not added
        loss += share.detach()
        correct += (logits.argmax(dim=1) == targets[part].argmax(dim=1)).sum() * has_rows
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


EVALUATION_BATCH = 500


def predict(model: ViT, split: Split, dataset: Dataset) -> Tensor:
    """Logits (n, K) of a split, in float32 whatever the training ran in."""
    model.eval()
    with torch.inference_mode():
        return torch.cat(
            [
                model(normalise(batch.images, dataset.mean, dataset.std))
                for batch in batches(split, EVALUATION_BATCH)
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
    path = checkpoint_file(path)
    model, checkpoint = utils.load_model(path, device)
    name = checkpoint["train_config"]["dataset"]
    dataset = dataset_for(name, 0, arguments, device, world)
    check_fit(model.config, dataset)
    result = evaluate(model, dataset.test, dataset, world)
    if not world.leads:
        return
    print(f"{path}: {len(dataset.test):,} test images of {name}")
    print(f"{'loss':12}{result.loss:8.4f}")
    print(f"{'top-1':12}{result.top1:8.2%}")
    print(f"{'top-5':12}{result.top5:8.2%}")
    for label, accuracy in zip(dataset.classes, result.of_class, strict=True):
        print(f"  {label:10}{accuracy:8.2%}")


def export(path: Path, overwrite: bool) -> None:
    """--export: writes model.pt beside a checkpoint, a file to give away."""
    path = checkpoint_file(path)
    target = path.with_name("model.pt")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; --overwrite it")
    checkpoint = utils.load_checkpoint(path)
    try:
        utils.save_model(target, checkpoint)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB; --evaluate it")


# ---------------------------------------------------------------------------- command line


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
    task.add_argument(
        "--export",
        metavar="RUN",
        type=utils.existing_path,
        help="write its model.pt: the model alone, in half precision",
    )
    run.add_argument("--name", help="the run's folder under checkpoints/ (the recipe's name)")
    run.add_argument(
        "--overwrite", action="store_true", help="replace a run of that name, or its model.pt"
    )
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
    run.add_argument(
        "--save-epochs",
        metavar="EPOCHS",
        type=_epochs,
        default=1,
        help="save after so many epochs each, and after the last (1)",
    )
    run.add_argument("--device", help="cuda, cuda:1, mps or cpu (the best there is)")
    model = parser.add_argument_group("model (value of the recipe)")
    model.add_argument("--model", choices=MODELS, help="a size: sets --width, --depth and --heads")
    utils.add_flags(model, recipe.model)
    utils.add_flags(parser.add_argument_group("training (value of the recipe)"), recipe.train)
    arguments = parser.parse_args(argv)
    for task in ("resume", "evaluate", "export"):
        if getattr(arguments, task) and (flag := without_effect(argv, task)):
            parser.error(f"{flag} has no effect with --{task}; leave it out")
    return arguments


def without_effect(argv: list[str], task: str) -> str | None:
    """A flag in a command line that --resume, --evaluate or --export would not heed."""
    unheeded = {"--recipe", "--name"}
    if task == "resume":
        unheeded.add("--overwrite")
    else:
        options = (*dataclasses.fields(ViTConfig), *dataclasses.fields(TrainConfig))
        unheeded |= {f"--{option.name.replace('_', '-')}" for option in options} | {"--model"}
    given = [argument.split("=")[0].replace("--no-", "--") for argument in argv]
    return next((flag for flag in given if flag in unheeded), None)


def _minutes(text: str) -> float:
    """A time in minutes, 0 or more."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes")
    return minutes


def _epochs(text: str) -> int:
    """A number of epochs, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of epochs")
    return int(text)


# ---------------------------------------------------------------------------- main


def train(run: Run, command: str, arguments: argparse.Namespace) -> bool:
    """Trains a run to its last epoch, then tests it and writes what it came to.

    Returns:
        Whether all of it could be written.
    """
    config, world = run.config, run.world
    devices = f"{world.size} x " * (world.size > 1) + machine.device_name(run.device)
    run.say(
        f"{run.folder}: ViT of {parameters_of(run.model):,} parameters on "
        f"{len(run.dataset.train):,} images of {config.dataset}, {run.precision} on {devices}"
    )
    if run.device.type == "cpu" and sum(run.operations().values()) > FOR_A_GPU:
        run.say("made for a GPU, this takes hours or days here; --recipe cpu takes ten minutes")
    forwards, began, fresh = forwards_of(run), time.perf_counter(), not run.step

    with run.job.stop.postponed():
        while run.epoch < config.epochs:
            row = train_epoch(run, forwards[config.patch_dropout_in(run.epoch)])
            run.end_epoch(row | {"validation_loss": None, "validation_accuracy": None})
            if run.epoch % config.validate_every == 0 or run.epoch == config.epochs:
                validate(run)
            if run.epoch % arguments.save_epochs == 0 or run.epoch == config.epochs:
                run.save()
            run.say(epoch_line(run.history[-1], config.epochs))
        if validate(run):  # the epoch that --epochs has now made the last
            run.save()

    started = time.perf_counter()
    test = None
    if not arguments.no_test:
        test = evaluate(run.evaluated, run.dataset.test, run.dataset, world)
    ended = time.perf_counter()
    if run.save_failed:
        run.save(last=True)
    seconds = {"evaluation": ended - started, "first_step_to_end": ended - began if fresh else None}
    return write_outcome(run, test, seconds, command)


def validate(run: Run) -> bool:
    """Adds the figures of the validation images to the last row of the history.

    Returns:
        Whether there are such images, and the row did not have their figures.
    """
    row, split = run.history[-1], run.dataset.validation
    if not len(split) or row["validation_loss"] is not None:
        return False
    result = evaluate(run.evaluated, split, run.dataset, run.world)
    row |= {"validation_loss": result.loss, "validation_accuracy": result.top1}
    return True


def forwards_of(run: Run) -> dict[float, Forward]:
    """The model for each share of patches that is left out in an epoch, compiled where it pays.

    Compiled for the batches that this rank will see. Whether it pays does not depend on how far the
    run is: one that goes on must compute as before.
    """
    config, forwards = run.config, {}
    ahead = {config.patch_dropout_in(epoch) for epoch in range(run.epoch, config.epochs)}
    started = time.perf_counter()
    run.model.train()
    for patch_dropout, operations in run.operations().items():
        forwards[patch_dropout] = run.parallel
        if patch_dropout in ahead and compile_pays(run, operations):
            run.say("compiling the model ...")
            run.model.embed.patch_dropout = patch_dropout
            forwards[patch_dropout] = compile_model(run.parallel, example_of(run), run.precision)
    run.model.embed.patch_dropout = config.patch_dropout_in(run.epoch)
    run.seconds["compile"] += time.perf_counter() - started
    return forwards


def example_of(run: Run) -> Tensor:
    """A batch, or a part of one, of the size that this rank's forward passes have."""
    rows = run.world.share(torch.arange(run.config.batch_size, device=run.device))
    images = run.dataset.train.take(rows.tensor_split(run.config.accumulate)[0]).images
    return normalise(images, run.dataset.mean, run.dataset.std)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in a line."""
    line = f"epoch {row['epoch']:3}/{epochs}   train loss {row['train_loss']:.4f}"
    if row["validation_loss"] is not None:
        line += f"   validation loss {row['validation_loss']:.4f}"
        line += f"   accuracy {row['validation_accuracy']:.2%}"
    return f"{line}   {row['seconds']:.1f} s"


def write_outcome(
    run: Run, test: Evaluation | None, seconds: dict[str, float | None], command: str
) -> bool:
    """curves.png, result.json and the last lines on the terminal; whether all is written.

    Args:
        seconds: "evaluation", and "first_step_to_end": from the first training step to the end of
            the evaluation, saving and validating included; None for a run that was gone on with.
    """
    if not run.world.leads:
        return True
    outcome = f"test loss {test.loss:.4f}   test accuracy {test.top1:.2%}" if test else "not tested"
    training = sum(row["seconds"] for row in run.history)
    images_per_second = len(run.dataset.train) * run.config.epochs / training
    peak = machine.peak_memory_bytes(run.device)  # before the matrices that measure the rate
    rate = run.world.size * machine.matrix_rate(run.device, run.precision)
    result = {
        "command": command,
        "recipe": run.recipe,
        "model": dataclasses.asdict(run.model.config),
        "training": dataclasses.asdict(run.config),
        "parameters": parameters_of(run.model),
        "epochs": run.config.epochs,
        "seed": run.config.seed,
        "device": run.device.type,
        "device_name": machine.device_name(run.device),
        "processes": run.world.size,
        "precision": run.precision,
        "torch": str(torch.__version__),
        "validation_accuracy": run.history[-1]["validation_accuracy"],
        "test_accuracy": test.top1 if test else None,
        "test_loss": test.loss if test else None,
        "seconds": {
            "training": training,
            **seconds,
            "compile": run.seconds["compile"],
            "total": run.total_seconds(),
        },
        "images_per_second": images_per_second,
        "matrix_flops_per_second": rate,
        "matrix_rate_share": sum(run.operations().values()) / training / rate,
        "peak_memory_bytes": peak,
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
            machine.keep_freed_memory()
            if arguments.export:
                if job.world.leads:
                    export(arguments.export, arguments.overwrite)
                return 0
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
            worked = train(run, command, arguments)
            run.leave_others()
            return 0 if worked else 1
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
