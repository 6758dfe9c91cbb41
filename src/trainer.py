"""Trains and evaluates a Vision Transformer.

    python src/trainer.py                              CIFAR-10, the recipe for this machine
    python src/trainer.py --recipe demo                no download, no GPU, under a minute
    python src/trainer.py --recipe cpu --epochs 5      a flag overrides the recipe; --help lists all
    python src/trainer.py --resume checkpoints/NAME    resume a run
    python src/trainer.py --recipe finetune --init-from WEIGHTS --dataset NAME|folder:PATH
    python src/trainer.py --evaluate FILE              test accuracy of a checkpoint
    python src/trainer.py --export checkpoints/NAME    model.pt: weights only, in half precision
    torchrun --nproc-per-node=K src/trainer.py ...     the same, on K devices

A run writes to checkpoints/<name>/: every --save-minutes and at its end last.pt and metrics.csv (a
row per epoch), at its end curves.png and result.json. The test set is evaluated once, at the end of
a run. Ctrl-C and SIGTERM save first and say how to resume.
"""

import json
import math
import shlex
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cli
import device as devices
import utils
from augment import augment
from checkpoint import (
    EpochRecord,
    checkpoint_file,
    code_commit,
    load_checkpoint,
    load_model,
    save_model,
)
from config import changed_flags
from data import shuffled_batches
from distributed import World, joined_job, without_averaging
from evaluation import Evaluation, evaluate
from optimizers import set_learning_rates
from pretrained import state_dict_for
from recipes import Phase, Recipe, RunOptions
from run import EXPORTED, Run, check_fit, dataset_for, new_run, resumed_run
from utils import Diverged, Stopped, UserError, WorldError, complain, first_line, run_program
from ViT import parameters_of

Forward = Callable[[Tensor, float], Tensor]  # images and patch dropout to logits, compiled or not


# ---------------------------------------------------------------------------- training


def train_epoch(run: Run, forward: Forward, patch_dropout: float) -> EpochRecord:
    """Shows the model every training image once, or those that an interrupted epoch has left.

    Every rank makes the same batch and takes a share of it, so that a run does not depend on the
    number of ranks.

    Raises:
        Diverged: a loss is not finite.
        Stopped: a signal has come; everything is saved.
    """
    config, train, progress = run.config, run.dataset.train, run.progress
    started = time.perf_counter() - progress.seconds
    order = shuffled_batches(train, config.batch_size, utils.generator_for(config.seed, run.epoch))
    order = order[progress.steps :]
    run.model.train()
    with progress_bar(run) as bar:
        for rows, (images, labels) in zip(order, train.batches(order), strict=True):
            key = (config.seed, run.epoch, progress.steps)  # of all draws
            targets = F.one_hot(labels, len(run.dataset.classes)).to(torch.get_default_dtype())
            images, targets = augment(
                images, targets, config, utils.seed_for(*key), run.coins[rows], run.epoch
            )  # (B, C, H, W) uint8, (B, K)
            # Dropout, drop path and patch dropout draw from these, and differ between ranks.
            utils.seed_default_generators(utils.seed_for(*key, run.world.rank), run.device)
            # A short last batch goes uncompiled: its size would need a compilation of its own.
            model = forward if len(rows) == config.batch_size else run.parallel
            if config.compile == "graphs":
                torch.compiler.cudagraph_mark_step_begin()

            for part in run.parts(len(rows)):  # whose losses add up to the mean over the batch
                inputs = run.preprocessing.normalize(images[part])
                with devices.autocast(run.precision, run.device):
                    logits = model(inputs, patch_dropout).to(inputs.dtype)  # (B, K)
                loss = (1 / len(rows)) * F.cross_entropy(
                    logits,
                    targets[part],
                    run.class_weights,
                    label_smoothing=config.label_smoothing,
                    reduction="sum",
                )
                (loss * run.world.size).backward()  # the ranks' gradients are averaged, not added
                progress.losses[progress.steps] += loss.detach()
                progress.correct += (logits.argmax(dim=1) == targets[part].argmax(dim=1)).sum()
            if config.gradient_clip:
                nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_clip)
            set_learning_rates(run.optimizers, run.rate_factor(run.step))
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()

            progress.steps += 1
            progress.seconds = time.perf_counter() - started
            bar.update(len(rows))
            after_step(run, bar)
    losses = run.check_losses()  # which waits for the device
    progress.seconds = time.perf_counter() - started
    return EpochRecord(
        epoch=run.epoch + 1,
        step=run.step,
        learning_rate=config.learning_rate * run.rate_factor(run.step - 1),
        train_loss=losses.mean().item(),
        train_accuracy=run.world.sum(progress.correct).item() / len(train),
        seconds=progress.seconds,
        images_per_second=len(train) / progress.seconds,
    )


def after_step(run: Run, bar: tqdm) -> None:
    """Checks the losses, saves, or stops, if any rank asks for it.

    Raises:
        Diverged: a loss is not finite.
        Stopped: a signal has come; everything is saved.
    """
    now = time.perf_counter()
    within_epoch = run.progress.steps < run.steps_per_epoch
    look, save, stop = run.world.any(
        now - run.looked_at > 1,  # reading a loss waits for the device
        within_epoch and run.save_is_due(),
        bool(run.job.stop.received),
    )
    if look:
        losses, rate = run.check_losses(), run.optimizers[0].param_groups[0]["lr"]
        bar.set_postfix(loss=f"{losses[-1].item():.3f}", lr=f"{rate:.1e}", refresh=False)
        run.looked_at = now
    if save or stop:
        run.save(last=stop)
    if stop:
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


# ---------------------------------------------------------------------------- compiling

# Floating-point operations of a phase for which compiling pays: two minutes of a CPU that does 2e11
# a second, and, not measured yet, a minute of a GPU at 5e13.
WORTH_COMPILING = {"cpu": 2e13, "cuda": 3e15}
FOR_A_GPU = 5e15  # a quarter of a day of that CPU


def forward_for(run: Run, phase: Phase) -> Forward:
    """The model for the epochs of a phase, compiled where that pays.

    This does not depend on the progress, so that a resumed run computes exactly as before.
    """
    if run.epoch >= phase.epochs.stop or not compile_pays(run, phase):
        return run.parallel
    run.say("compiling the model ...")
    started = time.perf_counter()
    forward = compile_model(run, phase.patch_dropout)
    run.compile_seconds += time.perf_counter() - started
    return forward


def compile_pays(run: Run, phase: Phase) -> bool:
    """Whether compiling is worth its half minute."""
    if run.config.batch_size > len(run.dataset.train):
        return False  # every batch is a short one
    if run.config.compile != "auto":
        return run.config.compile != "off"
    return run.flops(phase) > WORTH_COMPILING.get(run.device.type, math.inf)


def compile_model(run: Run, patch_dropout: float) -> Forward:
    """The compiled model, warmed up on a batch of the size that this rank sees.

    If compiling fails, say without a C++ compiler, it reports that and returns the model.
    """
    rows = next(run.parts(run.config.batch_size))
    inputs = run.preprocessing.normalize(run.dataset.train.take(rows).images)
    mode = "reduce-overhead" if run.config.compile == "graphs" else None
    forward = torch.compile(run.parallel, dynamic=False, mode=mode)
    run.model.train()
    try:
        with without_averaging(run.parallel):
            with devices.autocast(run.precision, run.device):
                logits = forward(inputs, patch_dropout)
            logits.float().sum().backward()
    except Exception as error:  # whatever a compiler can raise, training can do without it
        if devices.is_out_of_memory(error):
            raise
        run.say(f"torch.compile is not available ({first_line(error)}); training without it")
        forward = run.parallel
    run.model.zero_grad()
    return forward


# ---------------------------------------------------------------------------- a run


def train(run: Run, command: str = "") -> dict[str, Any] | None:
    """Trains a run to its last epoch, tests it once, and writes its results.

    Args:
        command: what result.json states as its origin.

    Returns:
        The content of result.json; None on all ranks but the first, and where not all of it could
        be written.
    """
    announce(run)
    commit = code_commit()  # now, as it may change while the run trains
    phases = run.config.phases()
    forwards = [forward_for(run, phase) for phase in phases]
    began, resumed = time.perf_counter(), run.step > 0

    with run.job.stop.postponed():
        for phase, forward in zip(phases, forwards, strict=True):
            while run.epoch < phase.epochs.stop:
                run.end_epoch(train_epoch(run, forward, phase.patch_dropout))
                is_last = run.epoch == run.config.epochs
                if run.epoch % run.config.validate_every == 0 or is_last:
                    validate(run)
                if any(run.world.any(is_last, run.save_is_due())):
                    run.save()
                run.say(epoch_line(run.history[-1], run.config.epochs))
        if validate(run):  # the epoch that --epochs has now made the last
            run.save()

    started, test = time.perf_counter(), None
    if run.options.test and run.dataset.test:
        test = evaluate(run.model, run.dataset.test, run.preprocessing, run.world)
    ended = time.perf_counter()
    if any(run.world.any(run.save_failed)):
        run.save(last=True)
    first_step_to_end = None if resumed else ended - began
    seconds = {"evaluation": ended - started, "first_step_to_end": first_step_to_end}
    if not run.world.leads:
        return None
    return write_result(run, result_of(run, test, seconds, command, commit))


def fit(recipe: Recipe, options: RunOptions, *, name: str = "custom") -> dict[str, Any] | None:
    """Trains a recipe in this process, from Python: `fit(RECIPES["demo"], RunOptions())`.

    Args:
        recipe: where it starts from weights, they must agree with the fields of its model that
            differ from `ViTConfig()`, and they set the others.
        name: what checkpoints state as the recipe, and the folder where the options name none.

    Returns:
        The content of result.json, or None where it could not be written.

    Raises:
        UserError: an option or the data cannot be used.
        Diverged: the loss is not finite.
    """
    devices.keep_freed_memory()
    with joined_job(use_gpus=options.device != "cpu" and torch.cuda.is_available()) as job:
        device = devices.choose_device(options.device, job.world)
        chosen = recipe.model.changed()
        run = new_run(name, recipe.model, recipe.train, options, device, job, chosen)
        result = train(run)
        run.leave_others()
        return result


def announce(run: Run) -> None:
    """What is about to be trained, on what, in a line."""
    count = f"{run.world.size} x " * (run.world.size > 1)
    run.say(
        f"{run.folder}: ViT of {parameters_of(run.model):,} parameters on "
        f"{len(run.dataset.train):,} images of {run.config.dataset}, {run.precision} on "
        f"{count}{devices.device_name(run.device)}"
    )
    if run.device.type == "cpu" and sum(map(run.flops, run.config.phases())) > FOR_A_GPU:
        run.say("this recipe targets a GPU; expect hours or days here (--recipe cpu: ten minutes)")


def validate(run: Run) -> bool:
    """Adds the validation figures to the last record, and keeps the best epoch if asked to.

    Returns:
        Whether there are such images, and the record did not have their figures.

    Raises:
        Diverged: the loss is not finite.
    """
    record, split = run.history[-1], run.dataset.validation
    if not split or record.validation_loss is not None:
        return False
    result = evaluate(run.model, split, run.preprocessing, run.world, run.precision)
    if not math.isfinite(result.loss):
        raise run.diverged(f"the validation loss is {result.loss}", run.step - 1)
    figures = {"validation_loss": result.loss, "validation_accuracy": result.top1}
    run.history[-1] = replace(record, **figures)
    if run.options.keep_best:
        run.keep_best()
    return True


def epoch_line(record: EpochRecord, epochs: int) -> str:
    line = f"epoch {record.epoch:3}/{epochs}   train loss {record.train_loss:.4f}"
    if record.validation_loss is not None:
        line += f"   validation loss {record.validation_loss:.4f}"
        line += f"   accuracy {record.validation_accuracy:.2%}"
    return f"{line}   {record.seconds:.1f} s"


def result_of(
    run: Run,
    test: Evaluation | None,
    seconds: dict[str, float | None],
    command: str,
    commit: str | None,
) -> dict[str, Any]:
    """The content of result.json.

    Args:
        seconds: "evaluation", and "first_step_to_end": from the first training step to the end of
            the evaluation, saving and validating included; None for a resumed run.
    """
    training = sum(record.seconds for record in run.history)
    return {
        "command": command,
        "commit": commit,
        "recipe": run.recipe,
        "model": asdict(run.model.config),
        "training": asdict(run.config),
        "parameters": parameters_of(run.model),
        "epochs": run.config.epochs,
        "seed": run.config.seed,
        "device": run.device.type,
        "device_name": devices.device_name(run.device),
        "processes": run.world.size,
        "precision": run.precision,  # of training and validation; the test is in float32
        "torch": str(torch.__version__),
        "validation_accuracy": run.history[-1].validation_accuracy,
        "test_accuracy": test.top1 if test else None,
        "test_loss": test.loss if test else None,
        "seconds": {
            "training": training,
            **seconds,
            "compile": run.compile_seconds,
            "total": run.total_seconds(),
        },
        "images_per_second": len(run.dataset.train) * run.config.epochs / training,
        "training_flops": sum(map(run.flops, run.config.phases())),
        "peak_memory_bytes": devices.peak_memory_bytes(run.device),
    }


def write_result(run: Run, result: dict[str, Any]) -> dict[str, Any] | None:
    """curves.png, result.json and the last lines on the terminal; None if one is not written."""
    from curves import write_curves  # imports matplotlib, which training does not need

    outcome, seconds = "not tested", result["seconds"]
    if result["test_accuracy"] is not None:
        loss, accuracy = result["test_loss"], result["test_accuracy"]
        outcome = f"test loss {loss:.4f}   test accuracy {accuracy:.2%}"
    print(f"{outcome}   {seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all")
    try:
        title = f"{run.folder.name}: {outcome}"
        write_curves(run.folder / "curves.png", run.history, run.config, title)
        utils.write_json(run.folder / "result.json", result)
    except OSError as error:
        complain(f"cannot write the result to {run.folder}: {error.strerror or error}")
        return None
    if run.save_failed:
        complain(f"the last checkpoint could not be written to {run.folder}")
        return None
    print(f"wrote last.pt, metrics.csv, result.json and curves.png to {run.folder}")
    return result


def is_finished(run: Run) -> bool:
    """Whether a run has done all its epochs and written their result, with the test if wanted."""
    try:
        result = json.loads((run.folder / "result.json").read_text())
        untested = run.dataset.test and result["test_accuracy"] is None
        done = run.epoch == run.config.epochs == result["epochs"]
        return done and not (run.options.test and untested)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---------------------------------------------------------------------------- other tasks


def report(path: Path, options: RunOptions, device: torch.device, world: World) -> None:
    """--evaluate: loss, top-1, top-5 and the accuracy of each class on the test set."""
    path = checkpoint_file(path)
    model, checkpoint = load_model(path, device)
    training = replace(checkpoint.training, validation_images=0)
    dataset = dataset_for(training, checkpoint.preprocessing, options, device, world)
    check_fit(checkpoint, dataset)
    if not dataset.test:
        raise UserError(f"{dataset.name} has no test set")
    result = evaluate(model, dataset.test, checkpoint.preprocessing, world)
    if not world.leads:
        return
    print(f"{path}: {len(dataset.test):,} test images of {dataset.name}")
    print(f"{'loss':12}{result.loss:8.4f}")
    print(f"{'top-1':12}{result.top1:8.2%}")
    print(f"{'top-5':12}{result.top5:8.2%}")
    print(f"{'class mean':12}{statistics.fmean(filter(math.isfinite, result.of_class)):8.2%}")
    width = max(10, *map(len, dataset.classes))
    for label, accuracy in zip(dataset.classes, result.of_class, strict=True):
        print(f"  {label:{width}}{accuracy:8.2%}")


def export(path: Path, library: str | None, overwrite: bool) -> None:
    """--export: writes model.pt beside a checkpoint: weights only, for sharing.

    Args:
        library: "timm" or "torchvision" writes its state dict instead, to model_<library>.pth.
    """
    path = checkpoint_file(path)
    target = path.with_name(EXPORTED[library])
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it")
    checkpoint = load_checkpoint(path)
    try:
        if library:
            utils.write_torch(target, state_dict_for(library, checkpoint))
        else:
            save_model(target, checkpoint)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    then = f"{library} loads it strictly" if library else "--evaluate checks it"
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB; {then}")


# ---------------------------------------------------------------------------- main


def resume_hint(run: Run | None) -> str:
    """What to do about a run that stopped."""
    if run is None:
        return "nothing was written"
    if not run.saved_step:
        return "nothing is saved"
    unsaved = "the last steps could not be saved; " * run.save_failed
    flags = changed_flags(run.options, cli.TASK_FLAGS["resume"])
    return unsaved + " ".join(["resume with --resume", str(run.folder), *flags])


def out_of_memory_hint(run: Run | None) -> str:
    if run is None:
        return "out of memory"
    batch, parts = run.config.batch_size, run.config.accumulate
    more_parts = f"--accumulate {2 * parts} for the same batch in smaller parts, or "
    return (
        f"out of memory with --batch-size {batch} --accumulate {parts}; try "
        f"{more_parts * (2 * parts <= batch)}a smaller --batch-size{run.what_is_kept()}"
    )


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    command, run = cli.parse(argv, description=__doc__), None
    options = command.options
    devices.keep_freed_memory()
    try:
        with joined_job(use_gpus=options.device != "cpu" and torch.cuda.is_available()) as job:
            if command.task == "export":
                if job.world.leads:
                    export(command.path, options.library, options.overwrite)
                return 0
            device = devices.choose_device(options.device, job.world)
            if command.task == "evaluate":
                report(command.path, options, device, job.world)
                return 0
            if job.world.leads and (unusable := devices.unusable_gpu()):
                print(unusable)
            if command.task == "resume":
                run = resumed_run(command.path, command.training_changes, options, device, job)
            else:
                configs = command.model, command.training
                run = new_run(
                    command.recipe, *configs, options, device, job, tuple(command.model_changes)
                )
                if command.note:
                    run.say(command.note)
            if is_finished(run):
                run.say(f"{run.folder} already finished; raise --epochs to continue")
                run.leave_others()
                return 0
            result = train(run, shlex.join(["python", "src/trainer.py", *argv]))
            run.leave_others()
            return 1 if result is None and run.world.leads else 0
    except (Diverged, WorldError) as error:
        if run is None or run.world.leads or isinstance(error, WorldError):
            complain(str(error))
        return 1
    except Stopped as stop:
        if run is None or run.world.leads:
            complain(f"stopped by {stop}; {resume_hint(run)}")
        return stop.status
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        complain(out_of_memory_hint(run))
        return 1


if __name__ == "__main__":
    run_program(main)
