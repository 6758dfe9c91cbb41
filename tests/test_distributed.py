"""Runs that are stopped, killed, locked out, starved of disk or shared among processes."""

import errno
import itertools
import math
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

import checkpoint
import distributed
import run
import small
import trainer
from augment import Augmentation
from checkpoint import RunFolder, load_checkpoint, load_model
from run import Run
from small import ROOT, differing, finished, result_of, rows_of, start, start_ranks, wait_for

ON_FEATURES = "--freeze --flip off --crop-padding 0"
DROPOUT = "--dropout 0.2 --attention-dropout 0.1 --drop-path 0.2"


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "flags",
    [
        f"{DROPOUT} --optimizer adamw --precision fp32",
        f"{DROPOUT} --optimizer adamw --precision bf16",
        f"{DROPOUT} --optimizer muon --precision fp32",
        f"{DROPOUT} --optimizer muon --precision bf16",
        f"{DROPOUT} --optimizer muon --precision fp16",
        ON_FEATURES,
        f"{DROPOUT} --batch-size 45 --accumulate 2",  # with a short last batch
        "--flip alternating --policy trivial --resized-crop 0.5 "
        "--mixup 0.4 --cutmix 1 --mixing-off-epochs 1",
    ],
)
def test_a_run_stopped_within_epochs_resumes_to_the_same_end(train, signal_at, tmp_path, flags):
    signal_at(signal.SIGTERM, -1)
    assert train(f"--name whole --epochs 3 {flags}") == 0
    task, calls = f"--name parts --epochs 3 {flags}", 2 if "--accumulate" in flags else 1
    # Epochs have 5 steps: stop in the middle, after the first step, and after the last.
    for begun, step in itertools.pairwise([0, 3, 5, 6, 13, 15]):
        signal_at(signal.SIGTERM, calls * (step - begun))
        assert train(task) == 143
        saved = load_checkpoint(tmp_path / "parts/last.pt")
        assert saved.step == step
        task = f"--resume {tmp_path / 'parts'}"
    signal_at(signal.SIGTERM, -1)
    torch.manual_seed(12345)  # earlier draws of the process must not matter
    assert train(task) == 0
    assert differing(tmp_path / "whole", tmp_path / "parts") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    train, signal_at, tmp_path, capsys, number
):
    before = signal.getsignal(number)
    signal_at(number, 7)
    assert train("--name a --epochs 3 --no-test --save-minutes 5") == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    hint = f"resume with --resume {tmp_path / 'a'} --no-test --save-minutes 5.0 --device cpu"
    assert line.endswith(hint)
    saved = load_checkpoint(tmp_path / "a/last.pt")
    assert (len(saved.history), saved.step) == (1, 7)
    assert signal.getsignal(number) is before


def test_ctrl_c_before_the_first_step_ends_at_once(train, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "make_optimizers", interrupted)
    assert train("--name a --epochs 1") == 130
    assert capsys.readouterr().err == "trainer.py: stopped\n" and not list(tmp_path.iterdir())


def test_a_signal_in_the_final_test_leaves_only_that_to_do(train, tmp_path, monkeypatch):
    assert train("--name whole --epochs 1") == 0
    evaluate = trainer.evaluate

    def interrupted_on_test_images(model, split, *rest):
        if len(split) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(model, split, *rest)

    parts = tmp_path / "parts"
    # Once in a new run, and once in a resumed one that still has the result of fewer epochs.
    for task in ("--name parts --epochs 1", f"--resume {parts} --epochs 2"):
        monkeypatch.setattr(trainer, "evaluate", interrupted_on_test_images)
        assert train(task) == 130
        monkeypatch.setattr(trainer, "evaluate", evaluate)
        assert train(f"--resume {parts}") == 0
        assert differing(tmp_path / "whole", parts) == 0
        assert train(f"--resume {tmp_path / 'whole'} --epochs 2") == 0


def test_a_signal_that_was_ignored_stays_ignored():
    """As nohup and shells' background jobs do with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with distributed.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_second_signal_ends_the_process_at_once_but_not_within_a_second(monkeypatch):
    ended, clock = [], itertools.count()
    monkeypatch.setattr(signal, "raise_signal", lambda number: ended.append(number))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * 0.9)
    with pytest.raises(distributed.Stopped) as stopped, distributed.StopSignals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            assert ended == []
            os.kill(os.getpid(), number)
    assert ended == [signal.SIGTERM] and stopped.value.status == 130


# ---------------------------------------------------------------------------- SIGKILL


def test_killed_around_the_renames_of_a_save_and_at_random_moments(tmp_path):
    """A run that is killed and resumed again and again ends like one that was never killed."""
    flags = f"--epochs 5 {DROPOUT} --save-minutes 0"
    assert finished(start("--evaluate nowhere", tmp_path)) == 2  # the server of processes is up
    began = time.monotonic()
    assert finished(start(f"--name whole {flags}", tmp_path)) == 0
    length = time.monotonic() - began

    folder, task = tmp_path / "parts", f"--name parts {flags} --overwrite"
    chance = random.Random(0)
    # A run alternates between two files: the odd ones are metrics.csv, the even ones last.pt.
    deaths = [(place, number) for place in ("before", "after") for number in (2, 3)] + [None] * 6
    for death in deaths:
        process = start(task, tmp_path, death=death)
        if death is None:
            process.join(chance.uniform(0, length))
            process.kill()
        killed = finished(process) == -signal.SIGKILL
        assert killed or (death is None and process.exitcode == 0)
        if (folder / "last.pt").exists():
            load_model(folder / "last.pt")
            task = f"--resume {folder} --save-minutes 0"
    assert finished(start(task, tmp_path)) == 0
    assert differing(tmp_path / "whole", folder) == 0
    names = {"last.pt", "metrics.csv", "result.json", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names


# ---------------------------------------------------------------------------- one run, one folder


def test_a_second_run_is_refused_until_the_first_is_killed(train, tmp_path, capsys):
    folder = tmp_path / "a"
    first = start("--name a --epochs 5000 --save-minutes 0", tmp_path)
    wait_for((folder / "last.pt").exists, first.is_alive)
    for flags in (f"--resume {folder} --epochs 1", "--name a --epochs 1 --overwrite"):
        assert train(flags) == 2
        assert capsys.readouterr().err == (
            f"trainer.py: {folder} is in use by another run; wait for it, or stop it\n"
        )
    assert first.is_alive() and (folder / "last.pt").exists()
    first.kill()
    finished(first)
    stray = folder / ".last.pt.part"
    stray.write_bytes(b"half a checkpoint")
    done = len(load_checkpoint(folder / "last.pt").history)
    assert train(f"--resume {folder} --epochs {done + 1}") == 0
    assert not stray.exists()


def test_a_run_whose_folder_was_removed_makes_it_again_unless_another_has(
    train, tmp_path, capsys, monkeypatch
):
    save, other = Run.save, RunFolder(tmp_path / "a")

    def replacing(run, state, **options):
        if state.epoch == 2:
            shutil.rmtree(run.folder.path)
            other.make(overwrite=False)
        save(run, state, **options)

    monkeypatch.setattr(Run, "save", replacing)
    with other:
        assert train("--name a --epochs 3") == 1
    out, error = capsys.readouterr()
    assert "cannot save step 10" in out and "in use by another run" in out + error
    assert list((tmp_path / "a").iterdir()) == []
    monkeypatch.setattr(other, "make", lambda **_: None)  # nobody makes another
    assert train("--name a --epochs 3 --overwrite") == 0
    assert len(load_checkpoint(tmp_path / "a/last.pt").history) == 3


def test_a_folder_that_cannot_be_written_to_is_not_resumed(train, tmp_path, monkeypatch, capsys):
    assert train("--name a --epochs 1") == 0

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", read_only)
    assert train(f"--resume {tmp_path / 'a'} --epochs 2") == 2
    said = f"cannot write to {tmp_path / 'a'}: Read-only file system"
    assert capsys.readouterr().err == f"trainer.py: {said}\n"


def test_where_there_are_no_locks_a_run_says_so_and_trains(train, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    assert train("--name a --epochs 1") == 0
    assert "cannot lock" in capsys.readouterr().out
    monkeypatch.setattr(checkpoint, "fcntl", None)  # as on Windows
    assert train("--name b --epochs 1") == 0
    assert "cannot lock" in capsys.readouterr().out


# ---------------------------------------------------------------------------- saves that fail


@pytest.fixture
def failing_saves(monkeypatch):
    """failing_saves(first, last) makes the disk full for the files of these numbers."""
    replace = os.replace

    def arrange(first, last=math.inf):
        calls = itertools.count(1)

        def failing(*arguments):
            if first <= next(calls) <= last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(*arguments)

        monkeypatch.setattr(os, "replace", failing)

    return arrange


def test_a_full_disk_is_said_and_training_resumes_to_the_same_end(
    train, tmp_path, failing_saves, capsys
):
    assert train("--name whole --epochs 3") == 0
    failing_saves(first=3, last=3)  # the second epoch's metrics.csv
    assert train("--name a --epochs 3") == 0
    assert "cannot save step 10" in (printed := capsys.readouterr().out)
    said = "No space left on device; training continues, and the next checkpoint tries again"
    assert said in printed
    assert differing(tmp_path / "whole", tmp_path / "a") == 0


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint_and_ends_the_run_with_1(
    train, tmp_path, failing_saves, capsys
):
    failing_saves(first=4)  # the second epoch's last.pt, and everything after it
    assert train("--name a --epochs 3") == 1
    out, error = capsys.readouterr()
    assert "test accuracy" in out  # the numbers are not lost with the files
    assert "cannot write the result" in error and len(error.splitlines()) == 1
    assert len(load_checkpoint(tmp_path / "a/last.pt").history) == 1
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"last.pt", "metrics.csv"}


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_with_1(
    train, tmp_path, failing_saves, capsys
):
    failing_saves(first=1, last=2)  # the one epoch's save, and the second try
    assert train("--name a --epochs 1") == 1
    assert "last checkpoint could not be written" in capsys.readouterr().err
    assert not (tmp_path / "a/last.pt").exists()


def test_a_run_is_overwritten_only_on_request_and_whole_until_the_new_one_is_saved(
    train, tmp_path, failing_saves, capsys
):
    folder, other = tmp_path / "a", "--name a --epochs 1 --seed 3 --keep-best"
    assert train("--name a --epochs 2 --keep-best") == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"last.pt", "best.pt", "result.json", "curves.png"} <= before.keys()
    assert train(other) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    failing_saves(first=2)  # the first last.pt, and everything after it
    assert train(f"{other} --overwrite") == 1
    assert "still has the earlier run" in capsys.readouterr().err
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(now[name] == before[name] for name in before.keys() - {"metrics.csv"})
    failing_saves(first=math.inf)
    assert train(f"{other} --overwrite") == 0
    assert load_checkpoint(folder / "last.pt").training.seed == 3


def test_a_stop_that_cannot_save_says_so(train, signal_at, failing_saves, capsys):
    signal_at(signal.SIGTERM, 7)
    failing_saves(first=3)
    assert train("--name a --epochs 3") == 143
    out, error = capsys.readouterr()
    assert "training continues" not in out
    assert "the last steps could not be saved; resume with --resume" in error


# ---------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nand a long story"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        None,
    ],
)
@pytest.mark.parametrize("compile", ["off", "on"])
def test_out_of_memory_is_one_line_that_says_what_to_try(
    train, monkeypatch, capsys, error, compile
):
    """In a compiled model it is not mistaken for a missing compiler."""

    def greedy(*_, **__):
        if error:
            raise error
        torch.empty(2**55)  # the CPU's own error

    if compile == "on":
        monkeypatch.setattr(torch, "compile", lambda *_, **__: greedy)
    else:
        monkeypatch.setattr(Augmentation, "__call__", greedy)
    assert train(f"--name a --epochs 1 --accumulate 2 --compile {compile}") == 1
    out, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert "not available" not in out
    assert "out of memory; instead of --batch-size 40 --accumulate 2, try" in line
    assert "--accumulate 4" in line and "smaller --batch-size" in line and "holds" not in line


# ---------------------------------------------------------------------------- accumulation


def test_accumulated_gradients_are_those_of_the_whole_batch(train, tmp_path):
    """In float64 no rounding hides a part's wrong weight; 45 images make no 4 equal parts."""
    with small.default_dtype(torch.float64):
        for name, parts in (("whole", 1), ("parts", 4), ("singles", 45)):
            flags = f"--name {name} --epochs 4 --batch-size 45 --accumulate {parts}"
            assert train(f"{flags} --precision fp32 --optimizer muon") == 0
    for name in ("parts", "singles"):
        assert greatest_difference(tmp_path / "whole", tmp_path / name) < 1e-9


def greatest_difference(*folders):
    first, second = (small.weights_of(folder / "last.pt") for folder in folders)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---------------------------------------------------------------------------- many processes

JOINT = "--epochs 4 --batch-size 45 --precision fp32 --optimizer adamw --gradient-clip 1"


@pytest.mark.parametrize("flags", ["", "--accumulate 3", "--mixup 0.8 --cutmix 1", ON_FEATURES])
def test_two_ranks_train_as_one_does(train, tmp_path, flags):
    """20 steps in float64; batches of 45, the last 20 and 50 images do not divide evenly."""
    with small.default_dtype(torch.float64):
        assert train(f"--name one {JOINT} {flags}") == 0
    ranks = start_ranks(f"--name two {JOINT} {flags}", tmp_path, 2, double=True)
    assert [finished(rank) for rank in ranks] == [0, 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert greatest_difference(one, two) < 1e-9
    assert rows_of(one / "metrics.csv") == rows_of(two / "metrics.csv")
    counted = ("validation_accuracy", "test_accuracy")
    results = [result_of(folder) for folder in (one, two)]
    assert [results[0][name] for name in counted] == [results[1][name] for name in counted]
    assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], abs=1e-9)
    assert (tmp_path / "log1").read_text() == ""  # only rank 0 prints
    assert "epoch   4/4" in (tmp_path / "log0").read_text()


def test_ranks_stop_together_and_the_run_resumes_with_another_number_of_them(train, tmp_path):
    flags = f"{JOINT} --epochs 20"
    folder = tmp_path / "two"
    ranks = start_ranks(f"--name two {flags} --save-minutes 0", tmp_path, 2, double=True)
    wait_for((folder / "last.pt").exists, ranks[0].is_alive)
    os.kill(ranks[1].pid, signal.SIGTERM)  # one gets the signal, both stop
    assert [finished(rank) for rank in ranks] == [143, 143]
    with small.default_dtype(torch.float64):
        assert train(f"--resume {folder}") == train(f"--name one {flags}") == 0
    assert greatest_difference(tmp_path / "one", folder) < 1e-9
    assert rows_of(tmp_path / "one/metrics.csv") == rows_of(folder / "metrics.csv")


def test_a_rank_that_dies_ends_the_job_and_leaves_a_checkpoint(train, tmp_path):
    folder = tmp_path / "a"
    ranks = start_ranks("--name a --epochs 5000 --save-minutes 0", tmp_path, 2)
    wait_for((folder / "last.pt").exists, ranks[0].is_alive)
    ranks[1].kill()
    assert finished(ranks[0]) == 1
    assert "another process of this job has ended" in (tmp_path / "log0").read_text()
    assert "Traceback" not in (tmp_path / "log0").read_text()
    done = len(load_checkpoint(folder / "last.pt").history)
    assert train(f"--resume {folder} --epochs {done + 1}") == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--name a --init-from nowhere.pth", "nowhere.pth"),
        # 200 images in batches of 199: rank 1 would have no share of the second batch.
        ("--name a --batch-size 199", "the last batch of an epoch has 1 images, too few for 2"),
        # The data may be in a different place on each host.
        (
            ["--name a --data-dir here", "--name a --seed 3 --data-dir=there"],
            "--name a --seed 3 --device cpu, rank 0 with --recipe demo",
        ),
    ],
)
def test_bad_input_ends_every_rank_with_2_and_its_line(tmp_path, flags, named):
    ranks = start_ranks(flags, tmp_path, 2)
    assert [finished(rank) for rank in ranks] == [2, 2]
    for rank, prefix in enumerate(("trainer.py: ", "rank 1: trainer.py: ")):
        (line,) = (tmp_path / f"log{rank}").read_text().splitlines()
        assert line.startswith(prefix) and named in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0", "LOCAL_RANK": "0"}, "'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2"}, "'RANK'"),
    ],
)
def test_a_world_that_cannot_be_is_a_line(train, tmp_path, monkeypatch, capsys, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train("--name a --epochs 1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and not list(tmp_path.iterdir())


def test_a_rank_waits_for_absent_ones_as_long_as_it_was_told(tmp_path):
    rank, _ = start_ranks(["--epochs 1 --wait-minutes 0.02", "--help"], tmp_path, 2)
    assert finished(rank) == 1
    assert "Timed out" in (tmp_path / "log0").read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_trains_and_evaluates_with_2_processes_and_resumes_with_3(tmp_path):
    recipe = "--recipe demo --patch-size 8 --epochs 1 --compile on --accumulate 2".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def torchrun(size, *flags):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [f"--nproc-per-node={size}", ROOT / "src/trainer.py", "--device", "cpu"]
        return small.ran(*launcher, *program, *flags, env=environment, timeout=300)

    done = torchrun(2, *recipe, "--name", "a", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/1") == 1 and "not available" not in done.stdout
    done = torchrun(3, "--resume", str(tmp_path / "a"), "--epochs", "2")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "a")
    assert result["processes"] == 3 and result["epochs"] == 2
    done = torchrun(2, "--evaluate", str(tmp_path / "a/last.pt"))
    assert f"{result['test_accuracy']:.2%}" in done.stdout, done.stderr
