"""Runs that are stopped, killed, locked out, starved of disk or shared among processes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import small
import torch
import torch.nn.functional as F
from small import (
    ROOT,
    differing,
    finished,
    start,
)

import trainer
import utils

DROPOUT = "--dropout 0.2 --attention-dropout 0.1 --drop-path 0.2"


# ---------------------------------------------------------------------------- signals


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(number, step) sends a signal to this process in the middle of a step, from 1."""
    cross_entropy = F.cross_entropy

    def arrange(number, step):
        calls = []

        def interrupted(logits, labels, **options):
            if logits.requires_grad:  # not in evaluation
                calls.append(0)
                if len(calls) == step:
                    os.kill(os.getpid(), number)
            return cross_entropy(logits, labels, **options)

        monkeypatch.setattr(F, "cross_entropy", interrupted)

    return arrange


def stop_at_and_go_on(train, signal_at, tmp_path, flags, steps):
    """Runs to the end whole, and in parts that end with the given steps; returns the difference."""
    signal_at(signal.SIGTERM, -1)
    assert train(f"--name whole {flags}") == 0
    task = f"--name parts {flags}"
    for begun, step in zip([0, *steps], steps, strict=False):
        signal_at(signal.SIGTERM, step - begun)
        assert train(task) == 143
        saved = utils.load_checkpoint(tmp_path / "parts/last.pt")
        assert saved["epoch"] * 5 + saved["partial"]["steps"] == step
        task = f"--resume {tmp_path / 'parts'}"
    signal_at(signal.SIGTERM, -1)
    torch.manual_seed(12345)  # what the process drew before must not matter
    assert train(task) == 0
    return differing(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_within_epochs_goes_on_to_the_same_end(
    train, signal_at, tmp_path, optimizer, precision
):
    flags = f"--epochs 3 {DROPOUT} --optimizer {optimizer} --precision {precision}"
    # In the middle of epochs, with an epoch's first step, and with its last.
    assert stop_at_and_go_on(train, signal_at, tmp_path, flags, [3, 5, 6, 13, 15]) == 0


def test_accumulation_and_a_short_last_batch_go_on_to_the_same_end(train, signal_at, tmp_path):
    flags = f"--epochs 2 {DROPOUT} --batch-size 45 --accumulate 1"
    assert stop_at_and_go_on(train, signal_at, tmp_path, flags, [4, 9]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    train, signal_at, tmp_path, capsys, number, status
):
    signal_at(number, 7)
    assert train("--name a --epochs 3 --no-test") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert f"go on with --resume {tmp_path / 'a'} --no-test" in line
    saved = utils.load_checkpoint(tmp_path / "a/last.pt")
    assert (saved["epoch"], saved["partial"]["steps"]) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_before_the_first_step_says_that_nothing_is_saved(train, monkeypatch, capsys):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(trainer, "make_optimizers", terminated)
    assert train("--name a --epochs 1") == 143
    assert "nothing to save yet" in capsys.readouterr().err


def test_a_signal_in_the_final_test_leaves_only_that_to_do(train, tmp_path, monkeypatch):
    assert train("--name whole --epochs 1") == 0
    evaluate = trainer.evaluate

    def terminated_on_test_images(model, split, *rest):
        if len(split) == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, split, *rest)

    monkeypatch.setattr(trainer, "evaluate", terminated_on_test_images)
    assert train("--name parts --epochs 1") == 143
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert train(f"--resume {tmp_path / 'parts'}") == 0
    assert differing(tmp_path / "whole", tmp_path / "parts") == 0


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    source = "import os, signal, processes\n"
    source += "with processes.StopSignals() as stop, stop.postponed():\n"
    source += "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", source], env=environment)
    assert done.returncode == -signal.SIGTERM


# ---------------------------------------------------------------------------- SIGKILL


def test_killed_at_random_moments_and_at_every_point_of_a_save(tmp_path):
    """A run is killed and gone on with, again and again, and ends as one that never was."""
    flags = f"--epochs 3 {DROPOUT} --save-minutes 0"
    began = time.monotonic()
    assert finished(start(f"--name whole {flags}", tmp_path)) == 0
    length = time.monotonic() - began

    folder, task = tmp_path / "parts", f"--name parts {flags} --overwrite"
    chance = random.Random(0)
    # The odd files of a run are metrics.csv, the even ones last.pt.
    deaths = [(place, number) for place in small.PLACES for number in (2, 3)] + [None] * 5
    chance.shuffle(deaths)
    resumes = 0
    for death in deaths:
        process = start(task, tmp_path, death=death)
        if death is None:
            process.join(chance.uniform(0, length))
            process.kill()
        assert finished(process) in (-signal.SIGKILL, 0)
        if (folder / "last.pt").exists():
            utils.load_model(folder / "last.pt")
            task = f"--resume {folder} --save-minutes 0"
            resumes += 1
    assert finished(start(task, tmp_path)) == 0
    changed = differing(tmp_path / "whole", folder)
    print(f"{len(deaths)} kills, {resumes} resumes, {changed} differing numbers")
    assert changed == 0
    names = {"last.pt", "metrics.csv", "result.json", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_real_program_stopped_at_20_random_moments(tmp_path, number):
    recipe = "--recipe demo --patch-size 8 --epochs 2 --dropout 0.1 --drop-path 0.1".split()
    program = [sys.executable, str(ROOT / "src/trainer.py"), "--output-dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}
    began = time.monotonic()
    subprocess.run([*program, *recipe, "--name", "whole"], check=True, **quiet)
    length = time.monotonic() - began

    folder, resumes, stopped = tmp_path / "parts", 0, 0
    task = [*recipe, "--name", "parts", "--save-minutes", "0.001"]
    chance = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([*program, *task], **quiet)
        try:
            _, error = process.communicate(timeout=chance.uniform(0.2, 0.6) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, error = process.communicate(timeout=small.PATIENCE)
            stopped += 1
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert process.returncode in (0, expected), error.decode()
        if (folder / "last.pt").exists():
            utils.load_model(folder / "last.pt")
            task = ["--resume", str(folder), "--save-minutes", "0.001"]
            resumes += 1
    subprocess.run([*program, *task], check=True, **quiet)
    changed = differing(tmp_path / "whole", folder)
    print(f"{stopped} times {number.name}, {resumes} resumes, {changed} differing numbers")
    assert changed == 0
