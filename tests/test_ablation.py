"""The runs of the studies are the trainer's, and the tables are those of their results."""

import csv
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict

import pytest

import ablation
import cli
import trainer
from ablation import STUDIES, Study
from common import kept_result, train_and_keep
from run import training_flops
from small import ROOT
from utils import status_of

TINY = "--recipe demo --epochs 1 --patch-size 16 --width 16 --depth 1 --heads 1 --no-test"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """study(changes, seeds) takes the place of the recipe study, with its folder in tmp_path."""

    def put(changes, seeds=(0,), base=f"{TINY} --device cpu"):
        made = Study(tmp_path, base, changes, seeds)
        monkeypatch.setitem(STUDIES, "recipe", made)
        return made

    return put


def test_missing_runs_are_trained_and_a_failure_is_reported(study, tmp_path, capsys):
    made = study({"none": "", "wrong": "--heads 3"})
    assert ablation.main(["--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "wrong, seed 0: trainer.py: width 16 must be a multiple of heads 3" in printed
    assert "| none |  | 1 | " in printed and " ± " not in printed and "| wrong |" not in printed
    result = json.loads((tmp_path / "none/seed0/result.json").read_text())
    assert result["test_accuracy"] is None and result["seed"] == 0
    assert result["command"] == f"python src/trainer.py {TINY} --device cpu --seed 0"
    assert (tmp_path / "none/seed0/metrics.csv").exists() and not (tmp_path / "wrong").exists()
    assert [row["seeds"] for row in ablation.table(made)] == [1]
    other = made._replace(base=f"{made.base} --label-smoothing 0.3")
    assert ablation.table(other) == []  # the run was of other options


def write_result(study, change, seed, accuracy, without=()):
    folder = study.folder / change / f"seed{seed}"
    folder.mkdir(parents=True)
    command = cli.parse(ablation.flags_of(study, change, seed), "")
    model, training = asdict(command.model), asdict(command.training)
    training = {name: value for name, value in training.items() if name not in without}
    content = {"model": model, "training": training, "validation_accuracy": accuracy}
    content["seconds"] = {"training": 10.0 + seed}
    (folder / "result.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("flags", "changed", "is_of"),
    [
        ("--recipe cpu --dataset cifar100", {"classes": 100}, True),
        ("--recipe cpu --dataset cifar100", {"width": 64}, False),
        ("--recipe finetune --init-from a.pt", {"width": 96, "depth": 4, "classes": 100}, True),
        ("--recipe finetune --init-from a.pt --dropout 0.1", {"dropout": 0.0}, False),
    ],
)
def test_a_result_is_recognized_whatever_the_data_and_weights_settle(
    tmp_path, flags, changed, is_of
):
    command = cli.parse(flags.split(), "")
    model = asdict(command.model) | changed
    content = {"model": model, "training": asdict(command.training)}
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert (kept_result(tmp_path, flags.split()) is not None) == is_of


def test_an_unfinished_run_of_other_flags_is_not_resumed(tmp_path):
    flags = f"{TINY} --device cpu".split()
    other = [*flags, "--label-smoothing", "0.3", "--output-dir", str(tmp_path)]
    assert status_of(trainer.main, [*other, "--name", "unfinished"]) == 0
    result = train_and_keep(flags, tmp_path, {})
    assert result["training"]["label_smoothing"] == 0
    assert kept_result(tmp_path, flags) == result


def test_the_table_is_the_mean_and_deviation_over_seeds(study, tmp_path, capsys):
    made = study({"none": ""}, seeds=(0, 1, 2))
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        write_result(made, "none", seed, accuracy)
    assert ablation.main(["--table"]) == 0
    assert "| none |  | 3 | 73.0 ± 3.6% | 10 s |" in capsys.readouterr().out
    with (tmp_path / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["seeds"] == "3" and float(row["validation_accuracy"]) == pytest.approx(73)
    assert float(row["deviation"]) == pytest.approx(statistics.stdev((70, 72, 77)), abs=0.01)


def test_an_option_added_after_a_run_had_its_default(study):
    made = study({"none": "", "policy": "--policy-epochs 0.5"})
    write_result(made, "none", 0, 0.7, without=["policy_epochs"])
    write_result(made, "policy", 0, 0.7, without=["policy_epochs"])
    assert [row["change"] for row in ablation.table(made)] == ["none"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_valid_flags_and_leaves_the_test_set_alone(name):
    for change in STUDIES[name].changes:
        command = cli.parse(ablation.flags_of(STUDIES[name], change, 0), "")
        assert not command.options.test


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shape", STUDIES["shape"].changes),
        ("size", STUDIES["size"].changes),
        ("speed94", ["none", "width-256", "width-384", "depth-12", "half"]),
    ],
)
def test_all_shapes_do_as_many_operations(name, changes):
    """As their results state; of a study without results, as its flags give."""
    done = {}
    for change in changes:
        command = cli.parse(ablation.flags_of(STUDIES[name], change, 0), "")
        planned = sum(
            training_flops(command.model, phase.patch_dropout) * len(phase.epochs)
            for phase in command.training.phases()
        )
        results = ablation.results_of(STUDIES[name], change)
        done[change] = results[0]["training_flops"] if results else planned
    for change, operations in done.items():
        assert operations == pytest.approx(done["none"], rel=0.04), change


def test_bad_input_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--jobs", "0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line == "ablation.py: --jobs must be at least 1, not 0"


def test_it_ends_silently_when_the_reader_of_its_output_is_gone():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "experiments/ablation.py"), "--table"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == ""
