"""A small version of the measurement: each part does its work once and reports its result."""

import json
import statistics

import pytest

import speedrun
from utils import status_of

DRY = speedrun.DRY_PLAN


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(part) runs a part of a dry run into tmp_path and returns its exit status."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would spin beside the other tests
    flags = ["--dry-run", "--device", "cpu", "--out", str(tmp_path)]
    return lambda part: status_of(speedrun.main, [part, *flags])


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.timeout(300)  # it trains in three processes, one after another
def test_seeds_are_as_long_as_fits_by_the_times_of_the_curve(measure, tmp_path, capsys):
    assert measure("curve") == 0
    curve = result_of(tmp_path / "curve")
    assert curve["test_accuracy"] is None and curve["validation_accuracy"] > 0
    curve["seconds"]["first_step_to_end"] = 2 * 0.98 / 3 * 2 * 0.99  # of two epochs
    (tmp_path / "curve/result.json").write_text(json.dumps(curve))

    assert measure("seeds") == 0
    results = [result_of(tmp_path / f"seed{seed}") for seed in (0, 1)]
    for seed, result in enumerate(results):
        seconds = result["seconds"]
        assert (result["epochs"], result["seed"]) == (3, seed)
        assert result["training"]["validation_images"] == 0
        steps_and_test = seconds["training"] + seconds["evaluation"]
        assert steps_and_test < seconds["first_step_to_end"] < seconds["total"]
    capsys.readouterr()

    assert measure("seeds") == 0 and measure("report") == 0
    assert results[1] == result_of(tmp_path / "seed1")  # with its seconds: not trained again
    mean = statistics.mean(result["test_accuracy"] for result in results)
    text = capsys.readouterr().out
    assert f"2 seeds: test accuracy {mean:.2%} ±" in text
    assert "94% on validation images was not reached" in text
    assert (tmp_path / "report.md").read_text().rstrip() in text


@pytest.mark.parametrize(("whole", "epochs"), [(40.0, 147), (None, 294)])
def test_after_a_resumed_curve_its_training_seconds_give_the_epochs(monkeypatch, whole, epochs):
    times = {"first_step_to_end": whole, "training": 20.0, "evaluation": 1.0}
    asked = []

    def trained(plan, part, setting, name="", more=""):
        asked.append((part, name, more))
        return {"seconds": times, "epochs": 100}

    monkeypatch.setattr(speedrun, "trained", trained)
    speedrun.seeds(DRY._replace(seconds=60), speedrun.Setting("cpu", "fp32", 1))
    runs = [("seeds", f"seed{seed}", f"--epochs {epochs} --seed {seed}") for seed in (0, 1)]
    assert asked == [("curve", "", ""), *runs]


def test_a_run_that_takes_too_long_is_stopped(measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speedrun, "DRY_PLAN", DRY._replace(limit=0.01))
    assert measure("best") == 0
    assert "best: stopped; the next call resumes it" in capsys.readouterr().out
    assert not (tmp_path / "best/result.json").exists()
    monkeypatch.setattr(speedrun, "DRY_PLAN", DRY)
    assert measure("best") == 0 and result_of(tmp_path / "best")["epochs"] == 2
    assert not (tmp_path / "best/unfinished").exists()


def test_the_time_to_an_accuracy_is_that_of_the_first_validation_there(tmp_path):
    rows = ["seconds,validation_accuracy", "2,", "3,0.93", "4,0.941", "1,0.95"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    found = speedrun.time_to(0.94, tmp_path / "metrics.csv")
    assert found == "94% on validation images after 9.0 s of training"


def test_throughput_has_a_row_for_each_mode_once(measure, tmp_path, capsys):
    for _ in range(2):
        assert measure("throughput") == 0
    rows = speedrun.rows_of(tmp_path / "throughput.csv")
    assert [(row["recipe"], row["mode"]) for row in rows] == [("demo", "eager"), ("demo", "plain")]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert capsys.readouterr().out.count("images/s") == 2


def test_a_mode_that_does_not_work_is_reported(measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speedrun, "DRY_PLAN", DRY._replace(steps={"demo": ("graphs",)}))
    assert measure("throughput") == 0 and measure("report") == 0
    text = capsys.readouterr().out
    assert "graphs does not work: --compile graphs needs one CUDA device" in text
    assert "- demo, graphs: does not work" in text


def test_without_a_gpu_it_names_the_dry_run(capsys, tmp_path):
    flags = ["--device", "cpu", "--out", str(tmp_path / "x")]
    assert status_of(speedrun.main, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dry-run" in line and not (tmp_path / "x").exists()
