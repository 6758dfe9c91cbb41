"""What the programs share: a clock, the training step of a recipe, and runs of the trainer."""

import csv
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import device as devices
import utils
from checkpoint import load_checkpoint, save_model
from data import CIFAR10_MEAN, CIFAR10_STD, Dataset, Preprocessing, Split
from device import autocast
from recipes import Recipe, RunOptions
from run import Place, Run, State, assemble
from trainer import Forward, compiled, update
from utils import UserError
from ViT import ViT

LONG_ENOUGH = 0.05  # seconds of work between two clock readings
PATIENCE = 60  # seconds that a run has to save and end
COMMAND = "python src/trainer.py {}"


class Setting(NamedTuple):
    """Where and how everything is measured."""

    device: torch.device
    precision: str  # "bf16" or "fp32"
    rounds: int
    peers: tuple[str, ...] = ()  # whose steps are timed beside this code's; empty: all

    @classmethod
    def of(cls, device: str | None, precision: str, rounds: int, *peers: str) -> "Setting":
        """Raises UserError where the device is not available."""
        chosen = devices.choose_device(device)
        return cls(chosen, devices.resolve_precision(precision, chosen), rounds, peers)


# ---------------------------------------------------------------------------- the clock


def seconds_of(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Mean seconds of a call."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    started = now()
    for _ in range(times):
        work()
    return (now() - started) / times


def time_alternating(
    works: dict[Any, Callable[[], Any]], setting: Setting
) -> dict[Any, list[float]]:
    """Seconds of a call of each function, once per round.

    Each round times all of them, starting with a different one, so that a machine whose speed
    drifts slows all of them alike. Short calls are repeated and averaged.
    """
    device, names = setting.device, list(works)
    once = {name: seconds_of(work, 2, device) for name, work in works.items()}
    times = {name: max(1, round(LONG_ENOUGH / seconds)) for name, seconds in once.items()}
    taken: dict[Any, list[float]] = {name: [] for name in works}
    for number in range(setting.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds_of(works[name], times[name], device))
    return taken


def ratio(seconds: list[float], others: list[float]) -> float:
    """The median over the rounds of the ratio of two functions' times."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def matrix_rate(device: torch.device, precision: str) -> float:
    """The rate of large square matrix products here, in floating-point operations per second."""
    size = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    warm = time.monotonic() + (3 if device.type == "cuda" else 0)  # a cold GPU is a slow one
    while seconds_of(lambda: a @ a, 5, device) and time.monotonic() < warm:
        pass
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ a, 1, device) for _ in range(20))


# ---------------------------------------------------------------------------- training steps


def random_dataset(count: int, device: torch.device) -> Dataset:
    """Random pixels in place of CIFAR-10's training images."""
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Split(pixels, torch.arange(count) % 10).to(device)
    preprocessing = Preprocessing(size=(32, 32), mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return Dataset("random", tuple("abcdefghij"), preprocessing, train, None, None)


def run_of(recipe: Recipe, setting: Setting, steps: int) -> tuple[Run, State]:
    """A run of a recipe on random images that has `steps` steps an epoch and saves nothing."""
    endless = {"epochs": 10_000, "steps": 0, "warmup_epochs": 1, "whole_epochs": 0}
    compiling = "graphs" if recipe.train.compile == "graphs" else "on"
    endless |= {"precision": setting.precision, "compile": compiling}
    config = replace(recipe.train, **endless)
    dataset = random_dataset(steps * config.batch_size, setting.device)
    place = Place(device=setting.device, options=RunOptions(save_minutes=1e6))
    return assemble(ViT(recipe.model), config, dataset, place)


def forward_of(run: Run, state: State, mode: str) -> Forward:
    """The model of a run, for training: "eager" or "compiled"."""
    state.model.train()
    return run.parallel if mode == "eager" else compiled(run, state)


def add_gradients(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, precision: str
) -> None:
    """The forward and backward pass of a batch."""
    with autocast(precision, inputs.device):
        logits = forward(inputs)
    F.cross_entropy(logits.float(), targets).backward()


def step_of(run: Run, state: State, forward: Forward, optimize: bool = True) -> Callable[[], None]:
    """A step of `train_epoch` without its input, on a batch of random images.

    Args:
        optimize: False leaves out the optimizers, and times only the forward and backward pass.
    """
    rows = torch.arange(run.config.batch_size, device=run.device)
    seen = run.augment(*run.dataset.train.take(rows), rows, 0, 0)

    def step() -> None:
        inputs = run.normalize(seen.images)
        add_gradients(lambda x: forward(x, seen.kept), inputs, seen.targets, run.precision)
        if optimize:
            update(run, state)
        else:
            state.model.zero_grad()

    return step


# -------------------------------------------------------------------------- runs and their tables


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def kept_result(kept: Path, *flags: str) -> dict[str, Any] | None:
    """The result.json in a folder, if its command has one of these flags.

    Nothing else is compared: a result outlives changes of recipes and options.
    """
    if not (path := kept / "result.json").exists():
        return None
    result = json.loads(path.read_text())
    return result if result["command"] in map(COMMAND.format, flags) else None


def train_and_keep(
    flags: str, kept: Path, environment: dict[str, str], limit: float = 3600, *where: str
) -> dict[str, Any] | None:
    """Trains in a separate process; keeps result.json, which it returns, metrics, output and model.

    What the flags mean is written beside the run before it begins. Only a run with the same
    meaning is resumed, even if a recipe has changed in between.

    Args:
        limit: seconds after which the run is stopped, and None returned; the next call resumes it.
        where: more flags, which are not recorded.

    Raises:
        UserError: the trainer failed; with its own message.
    """
    made, log = kept / "unfinished", kept / "output.txt"
    command = cli.parse(shlex.split(flags), description="")
    meaning, stated = repr(command), made / "meaning.txt"
    if (made / "last.pt").exists() and stated.exists() and stated.read_text() == meaning:
        program = ["--resume", str(made), *["--no-test"] * (not command.options.test)]
        program += ["--device", command.options.device] if command.options.device else []
    else:
        if made.exists():
            shutil.rmtree(made)  # first, or a kill could leave another run's checkpoint there
        utils.write_whole(stated, meaning.encode())
        program = [*shlex.split(flags), "--output-dir", str(kept), "--name", made.name]
    program = [sys.executable, str(utils.ROOT / "src/trainer.py"), *program, *where]
    options = {"env": os.environ | environment, "stderr": subprocess.PIPE, "text": True}
    with log.open("a") as out, subprocess.Popen(program, stdout=out, **options) as process:
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves first
            try:
                _, errors = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
        return None
    if process.returncode:
        raise UserError(errors.strip())
    result = json.loads((made / "result.json").read_text())
    result["command"] = COMMAND.format(flags)
    utils.write_whole(kept / "metrics.csv", (made / "metrics.csv").read_bytes())
    utils.write_json(kept / "result.json", result)
    save_model(kept / "model.pt", load_checkpoint(made / "last.pt"))
    shutil.rmtree(made)
    return result


def said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {said(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Prints a table in Markdown."""
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(said, row.values()))} |")
