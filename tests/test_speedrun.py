"""A small version of the speed run: every part does its work once and reports its result."""

import csv
import json
import statistics

import pytest

import cli
import speedrun


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure(part) runs a part of an even smaller dry run into tmp_path; its exit status."""
    flags = "--epochs 2 --patch-size 16 --width 16 --depth 1 --heads 1 --batch-size 500"
    small = {"widths": (64,), "depths": (1,), "batches": (4,), "flags": flags.split()}
    monkeypatch.setattr(speedrun, "DRY_PLAN", speedrun.DRY_PLAN._replace(**small))
    monkeypatch.setattr(speedrun, "ROUNDS", 1)
    flags = ["--dry-run", "--device", "cpu", "--out", str(tmp_path)]
    return lambda part, *more: cli.status_of(speedrun.main, [part, *flags, *more])


def test_all_seeds_are_reported_and_none_is_trained_twice(measure, tmp_path, capsys):
    assert measure("seeds") == 0 and measure("curve") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = [json.loads((tmp_path / f"seed{n}/result.json").read_text()) for n in (0, 1)]
    accuracies = [result["test_accuracy"] for result in results]
    assert summary["test_accuracy"] == accuracies and [r["seed"] for r in results] == [0, 1]
    assert summary["mean"] == pytest.approx(statistics.mean(accuracies))
    for result in results:
        seconds = result["seconds"]
        assert result["training"]["validation_images"] == 0
        steps_and_test = seconds["training"] + seconds["evaluation"]
        assert steps_and_test < seconds["first_step_to_end"] < seconds["total"]
    curve = json.loads((tmp_path / "curve/result.json").read_text())
    assert curve["test_accuracy"] is None and curve["validation_accuracy"] > 0

    before = (tmp_path / "seed1/result.json").stat().st_mtime_ns
    assert measure("seeds") == 0 and measure("plot") == 0
    assert (tmp_path / "seed1/result.json").stat().st_mtime_ns == before
    assert (tmp_path / "accuracy.png").stat().st_size > 20_000
    assert "over 2 seeds" in capsys.readouterr().out


def test_runs_are_as_long_as_fits_into_the_seconds(measure, tmp_path, capsys):
    assert measure("epochs", "--seconds", "60") == 0
    found = json.loads((tmp_path / "epochs.json").read_text())
    rows = speedrun.rows_of(tmp_path / "short/metrics.csv")
    assert len(rows) == 4 and found["whole_epoch"] == float(rows[3]["seconds"])
    planned = found["epochs"] * found["epoch"] + found["rest"]  # the demo has no whole epochs
    assert 0 <= 0.98 * 60 - planned < found["epoch"]

    (tmp_path / "epochs.json").write_text(json.dumps(found | {"epochs": 3}))
    assert measure("curve") == 0
    assert json.loads((tmp_path / "curve/result.json").read_text())["epochs"] == 3
    capsys.readouterr()
    assert measure("epochs", "--seconds", "90") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out" in line
    (tmp_path / "epochs.json").unlink()
    assert measure("epochs", "--seconds", "0.001") == 2
    assert "no epoch fits into 0.001 s" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "nan", "inf"])
def test_seconds_that_make_no_sense_are_refused(measure, capsys, seconds):
    with pytest.raises(SystemExit) as stop:
        measure("epochs", "--seconds", seconds)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "above 0" in line


def test_throughput_has_a_row_for_each_size_once(measure, tmp_path, capsys):
    for _ in range(2):
        assert measure("throughput") == 0
    with (tmp_path / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["width"], row["batch"], row["mode"]) for row in rows] == [
        ("64", "4", "eager"),
        ("64", "4", "compiled"),
    ]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert capsys.readouterr().out.count("of the matrix rate") == 2


def test_without_a_gpu_it_names_the_dry_run(capsys, tmp_path):
    flags = ["--device", "cpu", "--out", str(tmp_path / "x")]
    assert cli.status_of(speedrun.main, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dry-run" in line and not (tmp_path / "x").exists()
