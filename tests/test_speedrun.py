"""A small version of the measurement: each part does its work once and reports its result."""

import statistics
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import common
import speedrun
import trainer
from checkpoint import load_model
from small import result_of
from utils import status_of
from ViT import ViTConfig

DRY = speedrun.DRY_PLAN
TINY = ViTConfig(patch_size=16, width=16, depth=1, heads=1)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Replaces torch.compile, which takes half a minute and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *images: model(*images))
    monkeypatch.setitem(speedrun.RECIPES, "demo", replace(speedrun.RECIPES["demo"], model=TINY))


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure("seeds --minutes 6") dry-runs a part into tmp_path; returns its exit status."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would compete with the other tests
    flags = ["--dry-run", "--device", "cpu", "--out", str(tmp_path), "--data-dir", str(tmp_path)]
    return lambda part: status_of(speedrun.main, [*part.split(), *flags])


class Here:
    """Replaces `subprocess.Popen`: runs the trainer in this process."""

    def __init__(self, program, stdout, **_):
        with redirect_stdout(stdout):
            self.returncode = trainer.main(program[2:])
        self.communicate = lambda timeout: (None, "")

    __enter__, __exit__ = lambda self: self, lambda *_: None


@pytest.mark.timeout(300)
def test_the_sequence_of_the_half_hour(measure, monkeypatch, tmp_path, capsys):
    """Each part runs in order, with its output and model; a second call measures nothing."""
    module = SimpleNamespace(Popen=Here, PIPE=None, TimeoutExpired=TimeoutError)
    monkeypatch.setattr(common, "subprocess", module)
    assert measure("--seeds 2 --minutes 9") == 0
    printed = capsys.readouterr().out.splitlines()
    begins = [line.split(":")[0] for line in printed[: printed.index("")]]
    runs = ["default", "curve", "seed0", "seed1", "baseline"]
    said = ["demo, eager", "compiling the model ...", "demo, plain"]
    assert begins == ["default", *said, "curve", *runs[1:]]
    for name in runs:
        assert "epoch   1/" in (tmp_path / name / "output.txt").read_text()
        assert str(tmp_path) not in result_of(tmp_path / name)["command"]
        load_model(tmp_path / name / "model.pt")
        assert not (tmp_path / name / "unfinished").exists()
    results = [result_of(tmp_path / name) for name in runs]
    assert results[1]["test_accuracy"] is None and results[1]["validation_accuracy"] > 0
    assert [each["seed"] for each in results[2:4]] == [0, 1]
    assert [each["training"]["validation_images"] for each in results[2:4]] == [0, 0]
    mean = statistics.mean(each["test_accuracy"] for each in results[2:4])
    text = (tmp_path / "report.md").read_text()
    assert text.count("of the matrix rate") == len(runs)
    assert f"2 seeds: test accuracy {mean:.2%} ±" in text
    assert "94% on validation images was not reached" in text
    assert measure("--seeds 2 --minutes 9") == 0  # the same seconds: not trained again
    assert [result_of(tmp_path / name) for name in runs] == results
    assert capsys.readouterr().out.count("images/s") == 2  # in the report


def test_a_part_that_fails_does_not_end_the_others(measure, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setitem(speedrun.NOT_A_RUN, "throughput", broken)
    monkeypatch.setattr(speedrun, "PARTS", ("throughput", "report", "best"))
    assert measure("") == 1
    out, error = capsys.readouterr()
    assert "throughput has failed: CUDA error" in error and out


@pytest.mark.timeout(300)
def test_a_kernel_of_attention_is_the_one_that_runs(measure, monkeypatch, tmp_path, capsys):
    """A CPU has one fused kernel, flash."""
    monkeypatch.setattr(speedrun, "DRY_PLAN", DRY._replace(steps={"demo": speedrun.MODES[2:]}))
    assert measure("throughput") == 0 and measure("report") == 0
    text = capsys.readouterr().out
    assert "graphs does not work: --compile graphs needs one CUDA device" in text
    assert "- demo, cudnn: does not work" in text
    rows = speedrun.rows_of(tmp_path / "throughput.csv")
    found = {row["mode"]: bool(row["images_per_second"]) for row in rows}
    assert [mode for mode, works in found.items() if works] == ["flash", "plain"]


@pytest.mark.parametrize(("whole", "epochs"), [(40.0, 132), (None, 264)])
def test_after_a_resumed_curve_its_training_seconds_give_the_epochs(monkeypatch, whole, epochs):
    times = {"first_step_to_end": whole, "training": 20.0, "evaluation": 1.0}
    asked = []

    def trained(plan, setting, part, name="", more=""):
        asked.append((part, name, more))
        return {"seconds": times, "epochs": 100, "training": {"validation_images": 0.1}}

    monkeypatch.setattr(speedrun, "trained", trained)
    speedrun.seeds(DRY._replace(seconds=60), speedrun.Setting("cpu", "fp32", 1))
    runs = [("seeds", f"seed{seed}", f"--epochs {epochs} --seed {seed}") for seed in (0, 1)]
    assert asked == [("curve", "", ""), *runs]


def test_a_run_that_takes_too_long_is_stopped(measure, monkeypatch, tmp_path, capsys):
    assert measure("best --minutes 0.0002") == 0
    assert "best: stopped; the next call resumes it" in capsys.readouterr().out
    assert not (tmp_path / "best/result.json").exists()


def test_the_time_to_an_accuracy_is_that_of_the_first_validation_there(tmp_path):
    rows = ["seconds,validation_accuracy", "2,", "3,0.93", "4,0.941", "1,0.95"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    found = speedrun.time_to(0.94, tmp_path / "metrics.csv")
    assert found == "94% on validation images after 9.0 s of training"
