"""Trains and evaluates a Vision Transformer.

    python src/trainer.py                              CIFAR-10, the recipe for this machine
    python src/trainer.py --recipe demo                no download, no GPU, under a minute
    python src/trainer.py --recipe cpu --epochs 5      a flag overrides the recipe; --help lists all
    python src/trainer.py --resume checkpoints/NAME    resume a run
    python src/trainer.py --recipe finetune --init-from WEIGHTS --dataset NAME|folder:PATH
    python src/trainer.py --evaluate FILE              test accuracy of a checkpoint
    python src/trainer.py --export checkpoints/NAME    model.pt: weights only, in half precision
    torchrun --standalone --nproc-per-node=K src/trainer.py ...    the same, on K devices

A run writes to checkpoints/<name>/: last.pt and metrics.csv (a row per epoch) every --save-minutes
and at its end, then curves.png and result.json. The test set is evaluated once, at the end of a
run. Ctrl-C, SIGTERM and SIGHUP save first and say how to resume.
"""

import utils  # noqa: F401  # isort: skip  # before torch: sets how its idle threads wait
import math
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import cli
import device as devices
from checkpoint import RunFolder, code_commit
from device import autocast
from distributed import World, joined_world, without_averaging
from evaluation import evaluate, report
from export import export
from recipes import Recipe, RunOptions, patches_kept
from run import Place, Run, State, new_run, resumed_run
from utils import Stopped, UserError, first_line, is_out_of_memory, run_program

Forward = Callable[[Tensor, Tensor | None], Tensor]  # images and kept patches to logits
LOOK_EVERY = 20  # steps between checks of the loss and other ranks; a check makes all wait


# ---------------------------------------------------------------------------- a step


def train_epoch(run: Run, state: State, model: Forward) -> None:
    """Trains on every training image once, or on those left of an interrupted epoch.

    Every rank builds the same augmented batch and takes its share of it.

    Raises:
        Diverged: a loss is not finite.
        Stopped: a signal has arrived; the run has saved, or tried to.
    """
    world, train = run.world, run.dataset.train
    order = run.batches_left(state)  # for each step, rows of the training set
    started = time.perf_counter() - state.seconds["epoch"]
    run.ready(state.model, state.epoch)  # in training mode
    with progress_bar(run, state) as bar:
        for rows, (images, labels) in zip(order, train.batches(order), strict=True):
            seed = run.seed_draws(state)  # from seed, epoch, step: a resumed run repeats them
            batch = run.augment(images, labels, rows, state.epoch, seed)
            for part in run.parts(batch):  # this rank's share, in --accumulate parts
                with autocast(run.precision, run.device):
                    logits = model(run.normalize(part.images), part.kept)  # (b, K)
                loss = run.loss(logits, part.targets) / len(rows)  # adds up to the batch mean
                # The ranks' gradients are averaged, not added; float16 needs a scaled loss.
                state.scaler.scale(loss * world.size).backward()
                state.count(loss, logits, part.targets)
            update(run, state)
            state.seconds["epoch"] = time.perf_counter() - started
            bar.update(len(rows))
            after_step(run, state, bar)
    totals = run.totals(state)  # waits for the device
    state.seconds["epoch"] = time.perf_counter() - started
    state.end_epoch(run.record(state, totals))


def update(run: Run, state: State) -> None:
    """Updates the weights from their gradients, at this step's learning rate."""
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    if run.config.gradient_clip:
        nn.utils.clip_grad_norm_(state.model.parameters(), run.config.gradient_clip)
    state.set_learning_rates(run.rate_factor(state.step))
    for optimizer in state.optimizers:
        state.scaler.step(optimizer)  # in float16, skips a step whose gradients overflow
        optimizer.zero_grad()
    state.scaler.update()
    state.step += 1


def after_step(run: Run, state: State, bar: tqdm) -> None:
    """Checks the loss every few steps, and saves or stops if any rank asks for it."""
    looks = state.step % LOOK_EVERY == 0
    save, stop = run.save_is_due(state), bool(run.stop.received)
    if run.world.size > 1:  # the ranks ask each other only now and then, as that makes all wait
        save, stop = run.world.any(save, stop) if looks else (False, False)
    if looks:
        loss = run.totals(state)["loss"].item() / run.steps_done(state)
        rate = state.optimizers[0].param_groups[0]["lr"]
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
    if save or stop:
        run.save(state, last=stop)
    if stop:
        raise Stopped(run.stop.received or signal.SIGTERM)


def progress_bar(run: Run, state: State) -> tqdm:
    """An epoch's progress bar, shown only on a terminal."""
    return tqdm(
        total=len(run.dataset.train),
        initial=run.steps_done(state) * run.config.batch_size,
        desc=f"epoch {state.epoch + 1}/{run.config.epochs}",
        unit=" images",
        disable=None if run.world.leads else True,  # None: only on a terminal
        leave=False,
    )


# ---------------------------------------------------------------------------- compiling

# FLOPs and steps above which compiling pays off: 100 s of a CPU at 2e11 a second; a minute
# of a GPU at 5e13, where each step saves some 10 ms of host time. Both are estimates.
WORTH_COMPILING = {"cpu": (2e13, 0), "cuda": (3e15, 2000)}
# How torch reports that it has no working compiler: on a CPU, on a GPU, in this Python version.
NO_COMPILER = (
    r"InvalidCxxCompiler|CppCompileError|TritonMissing|GPUTooOldForTriton|CalledProcessError"
    r"|Failed to find C compiler|torch.compile is not supported"
)


def compiled(run: Run, state: State) -> Forward:
    """The model, compiled for each number of patches where that pays off, or else unchanged.

    The choice does not depend on progress, so a resumed run computes exactly as before. A batch
    of another size, such as a short last one, goes through the uncompiled model.
    """
    config, rows = run.config, torch.arange(run.config.batch_size, device=run.device)
    epochs = [n for n in (0, config.epochs - 1) if compile_pays(run, config.patch_dropout_in(n))]
    if not epochs:
        return run.parallel
    run.say("compiling the model ...")
    started = time.perf_counter()
    mode = "reduce-overhead" if config.compile == "graphs" else None
    ready = set()  # `sizes_of` of the compiled parts
    try:
        fast = torch.compile(run.parallel, dynamic=False, mode=mode)
        for epoch in epochs:
            batch = run.augment(*run.dataset.train.take(rows), rows, epoch, 0)
            run.ready(state.model, epoch)
            for part in run.parts(batch):
                if (sizes := sizes_of(part.images, part.kept)) not in ready:
                    ready.add(sizes)
                    with without_averaging(run.parallel):
                        with autocast(run.precision, run.device):
                            logits = fast(run.normalize(part.images), part.kept)
                        logits.float().sum().backward()
    except Exception as error:
        if not re.search(NO_COMPILER, f"{type(error).__name__} {error}"):
            error.add_note("--compile off trains without torch.compile")
            raise
        run.say(f"torch.compile is not available ({first_line(error)}); training without it")
        return run.parallel
    finally:
        state.model.zero_grad()
        state.seconds["compile"] += time.perf_counter() - started

    state.compiled = "graphs" if mode else "default"

    def forward(images: Tensor, kept: Tensor | None) -> Tensor:
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        return (fast if sizes_of(images, kept) in ready else run.parallel)(images, kept)

    return forward


def sizes_of(images: Tensor, kept: Tensor | None) -> tuple[int, int | None]:
    return len(images), None if kept is None else kept.shape[1]


def compile_pays(run: Run, patch_dropout: float) -> bool:
    """Whether compiling for this rate of patch dropout is worth half a minute."""
    if run.config.batch_size > len(run.dataset.train):
        return False  # the only batch is a short one
    if run.config.compile != "auto":
        return run.config.compile != "off"
    flops, steps = WORTH_COMPILING.get(run.device.type, (math.inf, 0))
    epochs = list(map(run.config.patch_dropout_in, range(run.config.epochs))).count(patch_dropout)
    return run.flops()[patch_dropout] > flops and epochs * run.steps_per_epoch > steps


def check_attention(run: Run, state: State) -> None:
    """Switches to plain attention if this device's fused kernel fails, as cuDNN's may."""
    config, blocks = run.model_config, state.model.blocks
    try:
        for dropout in {0.0, run.config.patch_dropout}:
            tokens = config.tokens - config.patches + patches_kept(config.patches, dropout)
            z = torch.ones(2, tokens, config.width, device=run.device, requires_grad=True)
            with autocast(run.precision, run.device):
                blocks[0].attn(z).sum().backward()
    except RuntimeError as error:
        run.say(f"fused attention fails here ({first_line(error)}); using plain attention")
        for block in blocks:
            block.attn.implementation = "plain"
    state.model.zero_grad()


# ---------------------------------------------------------------------------- a run

FOR_A_GPU = 5e15  # operations: a quarter of a day on a CPU at 2e11 a second


def train(run: Run, state: State, command_line: str = "") -> dict[str, Any] | None:
    """Trains a run to its last epoch, tests it once, and writes its results.

    Returns the content of result.json; None on ranks other than 0, or if not everything could
    be written.
    """
    run.say(run.headline(state))
    if run.device.type == "cpu" and sum(run.flops().values()) > FOR_A_GPU:
        run.say("this recipe targets a GPU; expect hours or days here (--recipe cpu: ten minutes)")
    commit = code_commit() if run.world.leads else None  # now, as the code may change later
    with hints(run, state):
        check_attention(run, state)
        run = run.on_features(state)
        model = compiled(run, state)
        began, resumed = time.perf_counter(), state.step > 0
        with run.stop:
            train_epochs(run, state, model)
        started, test = time.perf_counter(), None
        if run.options.test and run.dataset.test:
            test = evaluate(state.model, run.dataset.test, run.dataset.preprocessing, run.world)
        ended = time.perf_counter()
        if any(run.world.any(run.folder.save_failed)):
            run.save(state, last=True)
    if not run.world.leads:
        return None
    result = {"command": command_line, "commit": commit, **run.result(state)}
    result |= {"test_accuracy": test and test.top1, "test_loss": test and test.loss}
    result["seconds"] |= {
        "evaluation": ended - started,
        # Includes saving and validation; only for a run that was not interrupted.
        "first_step_to_end": None if resumed else ended - began,
        "total": state.total_seconds,
    }
    return result if write_result(run, state, result) else None


def train_epochs(run: Run, state: State, model: Forward) -> None:
    """Trains the remaining epochs; validates when due, saves and reports."""
    writer = tensorboard(run, state) if run.options.tensorboard and run.world.leads else None
    while state.epoch < run.config.epochs:
        train_epoch(run, state, model)
        is_last = state.epoch == run.config.epochs
        due = is_last or state.epoch % run.config.validate_every == 0
        best = due and validate(run, state) and run.is_best(state)
        if any(run.world.any(is_last, best, run.save_is_due(state), bool(run.folder.replaces))):
            run.save(state, best=best)
        record = state.history[-1]
        for name, value in asdict(record).items() if writer else ():
            if value is not None:
                writer.add_scalar(name, value, record.epoch)
                writer.flush()
        line = f"epoch {record.epoch:3}/{run.config.epochs}   train loss {record.train_loss:.4f}"
        if record.validation_loss is not None:
            line += f"   validation loss {record.validation_loss:.4f}"
            line += f"   accuracy {record.validation_accuracy:.2%}"
        run.say(f"{line}   {record.seconds:.1f} s")
    if validate(run, state):  # if resumed with --epochs that end at an epoch not yet validated
        run.save(state)
    if any(run.world.any(bool(run.stop.received))):  # all stop if one has a signal
        raise Stopped(run.stop.received or signal.SIGTERM)


def tensorboard(run: Run, state: State) -> Any:
    """The writer for --tensorboard; it starts with a batch as the model sees it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
    epoch = state.epoch + 1  # this and later ones are redone
    writer = SummaryWriter(run.folder.path, purge_step=epoch)
    rows = torch.arange(min(64, len(run.dataset.train)), device=run.device)
    images = run.augment(*run.dataset.train.take(rows), rows, state.epoch, 0).images
    if images.shape[1] in (1, 3):
        writer.add_images("augmented batch", images, epoch)
    return writer


def validate(run: Run, state: State) -> bool:
    """Adds validation metrics to the last record; returns whether it added any."""
    record, split = state.history[-1], run.dataset.validation
    if not split or record.validation_loss is not None:
        return False
    result = evaluate(state.model, split, run.dataset.preprocessing, run.world, run.precision)
    if not math.isfinite(result.loss):
        raise run.diverged(state, f"the validation loss is {result.loss}")
    figures = {"validation_loss": result.loss, "validation_accuracy": result.top1}
    state.history[-1] = replace(record, **figures)
    return True


def write_result(run: Run, state: State, result: dict[str, Any]) -> bool:
    """Prints the outcome, writes curves.png and result.json; returns whether that worked."""
    from curves import write_curves  # imports matplotlib, which training does not need

    outcome, seconds = "not tested", result["seconds"]
    if result["test_accuracy"] is not None:
        loss, accuracy = result["test_loss"], result["test_accuracy"]
        outcome = f"test loss {loss:.4f}   test accuracy {accuracy:.2%}"
    print(f"{outcome}   {seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all")
    path = run.folder.path
    about = {"history": state.history, "training": run.config, "title": f"{path.name}: {outcome}"}
    written = run.folder.write_result(result, partial(write_curves, **about))
    if written:
        print(f"wrote last.pt, metrics.csv, result.json and curves.png to {path}")
    return written


@contextmanager
def hints(run: Run, state: State) -> Iterator[None]:
    """Adds advice to errors that pass through; saves first if a file has gone missing."""
    try:
        yield
    except (Stopped, UserError) as error:
        # A file that was there at the start is gone; with several ranks, some may not know it.
        if isinstance(error, UserError) and run.world.size == 1 and state.step:
            run.save(state, last=True)
        if run.folder.save_failed:
            error.add_note("the last steps could not be saved")
        hint = cli.resume_hint(run.folder.path, run.options)
        error.add_note(hint if run.folder.saved_step else "nothing is saved")
        raise
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            batch, parts = run.config.batch_size, run.config.accumulate
            error.__notes__ = [
                f"instead of --batch-size {batch} --accumulate {parts}, try --accumulate "
                f"{min(2 * parts, batch)} for the same batch in smaller parts, or a smaller "
                "--batch-size",
                *run.folder.kept(),
            ]
        raise


# ---------------------------------------------------------------------------- main


def fit(recipe: Recipe, options: RunOptions, *, name: str = "custom") -> dict[str, Any] | None:
    """Trains a recipe in this process, from Python: `fit(RECIPES["demo"], RunOptions())`.

    Args:
        recipe: with `init_from`, the weights set the model's sizes; a size that differs from
            `ViTConfig()` must agree with them.
        name: the recipe name in checkpoints, and the folder if the options do not name one.

    Returns:
        The content of result.json, or None where it could not be written.

    Raises:
        UserError: an option or the data cannot be used.
        Diverged: a loss or a weight is not finite.
        Stopped: a signal has arrived; the run has saved, or tried to.
    """
    started, model = time.perf_counter(), recipe.model
    chosen = {each: getattr(model, each) for each in model.changed()}
    devices.keep_freed_memory()
    with joined_world(options.device, options.wait_minutes) as world:
        device = devices.choose_device(options.device, world)
        with RunFolder(options.output_dir / (options.name or name)) as folder:
            place = Place(device=device, options=options, world=world, folder=folder)
            run, state = new_run(name, model, recipe.train, place, chosen)
            state.started = started
            return train(run, state)


def begin_or_resume(
    command: cli.Command, device: torch.device, world: World, command_line: str
) -> int:
    """Trains a new or a resumed run; returns the exit status."""
    with RunFolder(command.folder) as folder:
        place = Place(device=device, options=command.options, world=world, folder=folder)
        if command.task == "resume":
            run, state = resumed_run(command.path, command.training_changes, place)
        else:
            configs = command.model, command.training
            run, state = new_run(command.recipe, *configs, place, command.model_changes)
            if command.note:
                run.say(command.note)
        if run.is_finished(state):
            run.say(f"{folder.path} already finished; raise --epochs to continue")
            return 0
        result = train(run, state, command_line)
    return 1 if result is None and world.leads else 0


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    command = cli.parse(argv, description=__doc__)
    options = command.options
    devices.keep_freed_memory()
    with joined_world(options.device, options.wait_minutes) as world:
        world.refuse_differing(argv)
        if command.task == "export":
            if world.leads:
                export(command.path, options.library, options.overwrite)
            return 0
        device = devices.choose_device(options.device, world)
        if command.task == "evaluate":
            report(command.path, options, device, world, command.training_changes.get("dataset"))
            return 0
        if world.leads and (unusable := devices.unusable_gpu()):
            print(unusable)
        return begin_or_resume(
            command, device, world, shlex.join(["python", "src/trainer.py", *argv])
        )


if __name__ == "__main__":
    run_program(main)
