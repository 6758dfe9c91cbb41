"""What several tests need: a small data set in place of the real one, and runs of the trainer."""

import itertools
import os
import sys

import pytest
import torch
import torch.nn.functional as F

import datasets
import device
import run
import small


@pytest.fixture(autouse=True)
def one_thread():
    """The number of threads changes how sums are split; with one, all machines agree."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """Error messages start with the name of the program."""
    monkeypatch.setattr(sys, "argv", small.PROGRAM)


@pytest.fixture(autouse=True)
def no_gpu_chosen(monkeypatch):
    """A test must name its device, or it would train on a GPU where there is one."""

    def chosen():
        pytest.fail("the device is left to the machine; pass --device cpu")

    monkeypatch.setattr(device, "best_device", chosen)


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    small.kill_all()


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train("--epochs 2 ...") runs a tiny demo recipe into tmp_path and returns its exit status."""
    monkeypatch.setattr(datasets, "load_dataset", small.load_small)
    monkeypatch.setattr(run.Run, "save_is_due", small.after_each_epoch)
    return lambda flags: small.status_of(flags, tmp_path)


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(number, call) signals this process within a step, at that call of the loss."""
    cross_entropy = F.cross_entropy

    def arrange(number, call):
        calls = itertools.count(1)

        def interrupted(logits, labels, *weights, **options):
            if logits.requires_grad and next(calls) == call:  # not in evaluation
                os.kill(os.getpid(), number)
            return cross_entropy(logits, labels, *weights, **options)

        monkeypatch.setattr(F, "cross_entropy", interrupted)

    return arrange
