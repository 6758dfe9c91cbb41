"""The ablation's runs are the trainer's, and its table is made of what they left."""

import csv
import dataclasses
import json
import statistics

import pytest

import ablation


@pytest.fixture
def results(monkeypatch, tmp_path):
    base = "--recipe demo --epochs 1 --patch-size 16 --width 16 --depth 1 --heads 1 --no-test"
    monkeypatch.setattr(ablation, "BASE", base + " --device cpu")
    monkeypatch.setattr(ablation, "CHANGES", {"none": "", "wrong": "--heads 3"})
    monkeypatch.setattr(ablation, "SEEDS", (0,))
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    return tmp_path


def test_missing_runs_are_trained_and_a_failure_is_said(results, capsys, monkeypatch):
    assert ablation.main(["--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "wrong, seed 0: trainer.py: width 16 must be a multiple of heads 3" in printed
    assert "| none |  | 1 | " in printed and " ± " not in printed and "| wrong |" not in printed
    result = json.loads((results / "none/seed0/result.json").read_text())
    assert result["test_accuracy"] is None and result["seed"] == 0
    assert (results / "none/seed0/metrics.csv").exists() and not (results / "wrong").exists()
    assert [row["seeds"] for row in ablation.table()] == [1]
    monkeypatch.setattr(ablation, "BASE", ablation.BASE + " --label-smoothing 0.3")
    assert ablation.table() == []  # the run was of other options


def test_the_table_is_the_mean_and_deviation_over_seeds(results, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "CHANGES", {"none": ""})
    monkeypatch.setattr(ablation, "SEEDS", (0, 1, 2))
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        folder = results / f"none/seed{seed}"
        folder.mkdir(parents=True)
        configs = ablation.configs_from(ablation.parse_arguments(ablation.flags_of("none", seed)))
        content = dict(zip(("model", "training"), map(dataclasses.asdict, configs), strict=True))
        content |= {"validation_accuracy": accuracy, "seconds": {"training": 10.0 + seed}}
        (folder / "result.json").write_text(json.dumps(content))
    assert ablation.main(["--table"]) == 0
    assert "| none |  | 3 | 73.0 ± 3.6% | 10 s |" in capsys.readouterr().out
    with (results / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["seeds"] == "3" and float(row["validation_accuracy"]) == pytest.approx(73)
    assert float(row["deviation"]) == pytest.approx(statistics.stdev((70, 72, 77)), abs=0.01)


def test_bad_input_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--jobs", "0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line == "ablation.py: --jobs must be at least 1, not 0"
