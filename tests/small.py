"""The trainer on a small data set, also in separate processes: to kill, or to train together.

The processes are real, but forked from a server that has already imported torch, so that a test
can afford dozens of them.
"""

import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import data
import datasets
import run
import shapes
import trainer
import utils
from checkpoint import load_checkpoint

TINY = "--patch-size 8 --width 16 --depth 2 --heads 2 --batch-size 40 --warmup-epochs 0.5".split()
PROGRAM = ["src/trainer.py"]  # sys.argv: error messages name the program
PATIENCE = 90  # seconds until a process counts as hung: less than pytest's limit for a test

ROOT = Path(__file__).parent.parent
CIFAR10 = ROOT / "data"  # the real one, where it is there
needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason="the real CIFAR-10 is not in data/"
)


# The Shapes data set with 200 training, 50 validation and 60 test images.
SHAPES = data.Dataset(
    "shapes",
    tuple(shapes.SHAPES),
    data.Preprocessing(size=(32, 32), mean=(0.31,) * 3, std=(0.247,) * 3),
    *(data.Split(*shapes.draw_shapes(n, seed)[:2]) for seed, n in enumerate((200, 50, 60))),
)


def load_small(name, preprocessing=None, *, validation_images, **_):
    """Replaces `datasets.load_dataset`."""
    validation = SHAPES.validation if validation_images else None
    expected = preprocessing or SHAPES.preprocessing
    return dataclasses.replace(SHAPES, validation=validation, preprocessing=expected)


def after_each_epoch(run, state):
    """Replaces `Run.save_is_due`, since no epoch of a test takes a minute."""
    done = run.steps_done(state)
    return done == 0 or (run.options.save_minutes == 0 and done < run.steps_per_epoch)


def arguments(flags, folder):
    """A command line of the trainer; on the CPU even where there is a GPU."""
    if "--device" not in flags and "--export" not in flags:
        flags += " --device cpu"
    if any(task in flags for task in ("--resume", "--evaluate", "--export")):
        return flags.split()
    return ["--recipe", "demo", *TINY, "--output-dir", str(folder), *flags.split()]


def images_of(split):
    return split.take(torch.arange(len(split))).images


def generator(seed):
    return torch.Generator().manual_seed(seed)


DAMAGES = ("text", "empty", "cut off", "folder", "pipe", "gone")


def damage(path, kind):
    """Puts one of `DAMAGES` in place of a file."""
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        other = {"text": b"of another kind", "empty": b"", "cut off": content[: len(content) // 2]}
        path.write_bytes(other[kind])


# ---------------------------------------------------------------------------- the results of a run


def rows_of(path):
    """metrics.csv without its times."""
    timed = ("seconds", "images_per_second")
    with path.open() as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights_of(path):
    return load_checkpoint(path).weights


def same_weights(first, second):
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def differing(first, second):
    """How many numbers differ at the end of two runs: weights, optimizers, metrics, result."""
    ends = [load_checkpoint(folder / "last.pt") for folder in (first, second)]
    a, b = map(tensors_of, ends)
    count = sum(int((x[key] != y[key]).sum()) for x, y in zip(a, b, strict=True) for key in x)
    count += rows_of(first / "metrics.csv") != rows_of(second / "metrics.csv")
    one, other = map(result_of, (first, second))
    of_a_process = {"seconds", "images_per_second", "peak_memory_bytes", "command", "commit"}
    keys = (one.keys() | other.keys()) - of_a_process
    return count + sum(one[key] != other[key] for key in keys)


def tensors_of(checkpoint):
    """A checkpoint's weights, and the optimizer state of each weight."""
    return [
        checkpoint.weights,
        *(state for each in checkpoint.optimizers for state in each.values()),
    ]


# ---------------------------------------------------------------------------- processes


def die_in_save(place, number):
    """Makes this process kill itself "before" or "after" its nth rename, counted from 1."""
    replace, numbers = os.replace, itertools.count(1)

    def deadly(*paths):
        due = next(numbers) == number
        if due and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def status_of(flags, folder):
    """The exit status of the trainer; its errors are one line on standard error."""
    return utils.status_of(trainer.main, arguments(flags, folder))


def work(flags, folder, log, environment, death, double):
    """The body of a process: the trainer, as `python src/trainer.py` starts it."""
    sys.argv = PROGRAM
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaks
    if double:
        torch.set_default_dtype(torch.float64)
    if death:
        die_in_save(*death)
    datasets.load_dataset = load_small
    run.Run.save_is_due = after_each_epoch
    sys.exit(status_of(flags, folder))


def start(flags, folder, *, log="log", environment=None, death=None, double=False):
    """Starts the trainer with flags; what it prints goes to the file `log` in the folder."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small"])
    parts = (flags, folder, folder / log, environment or {}, death, double)
    process = context.Process(target=work, args=parts, daemon=True)  # a failed test leaves none
    process.start()
    return process


def ran(*command, **options):
    """Runs a program to its end; returns what it printed and its status."""
    pipes = {"capture_output": True, "text": True, "timeout": PATIENCE}
    return subprocess.run(command, **pipes | options)


def finished(process):
    """The exit status of a started process; one that hangs fails the test."""
    process.join(PATIENCE)
    if process.exitcode is None:
        kill_all()
        raise TimeoutError(f"still running after {PATIENCE} s")
    return process.exitcode


def wait_for(condition, is_running):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert is_running() and time.monotonic() < until
        time.sleep(0.02)


def kill_all():
    """Kills what is still running; Python would otherwise wait for it forever at exit."""
    for process in multiprocessing.active_children():
        process.kill()


def start_ranks(flags, folder, size, **options):
    """Starts what torchrun would, on this host's CPU; each rank may have flags of its own."""
    each = [flags] * size if isinstance(flags, str) else flags
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [
        start(each[rank], folder, log=f"log{rank}", environment=environment, **options)
        for rank, environment in enumerate(ranks)
    ]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
