"""The studies run the trainer, and their tables match the results."""

import json
import statistics

import pytest

import cli
import common
import study as studies
import trainer
from common import kept_result, train_and_keep
from small import result_of
from study import STUDIES, Study
from utils import status_of

TINY = "--recipe demo --epochs 1 --patch-size 16 --width 16 --depth 1 --heads 1 --no-test"
TINY += " --device cpu"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """study(changes, seeds) takes the place of the recipe study, with its folder in tmp_path."""

    def put(changes, seeds=(0,), base=TINY):
        made = Study(tmp_path, base, changes, {}, seeds)
        monkeypatch.setitem(STUDIES, "recipe", made)
        return made

    return put


def test_missing_runs_are_trained_and_a_failure_is_reported(study, tmp_path, capsys):
    made = study({"none": "", "wrong": "--init-from nowhere.pt"})
    assert studies.main(["--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "wrong, seed 0: trainer.py: cannot read " in printed and "nowhere.pt" in printed
    assert "| none |  | 1 | " in printed and "| wrong |" not in printed
    result = result_of(tmp_path / "none/seed0")
    assert result["test_accuracy"] is None and result["seed"] == 0
    assert result["command"] == f"python src/trainer.py {TINY} --seed 0"
    assert (tmp_path / "none/seed0/metrics.csv").exists()
    assert not (tmp_path / "wrong/seed0/result.json").exists()
    assert [row["seeds"] for row in studies.table(made)] == [1]
    other = made._replace(base=f"{made.base} --label-smoothing 0.3")
    assert studies.table(other) == []  # the run had other options


def write_result(folder, command, accuracy=0.5, seconds=10.0):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": f"python src/trainer.py {command}", "validation_accuracy": accuracy}
    (folder / "result.json").write_text(json.dumps(content | {"seconds": {"training": seconds}}))


def test_a_changed_recipe_or_option_leaves_older_results_known(study):
    made = study({"none": "--old 1"}, (0, 1), "--recipe cpu --no-test")
    made = made._replace(now={"--recipe cpu": "--recipe cpu --width 64", "--old 1": "--epochs 2"})
    recorded, now = studies.flags_of(made, "none", 1)
    assert recorded == "--recipe cpu --no-test --seed 1 --old 1"
    assert now == "--recipe cpu --width 64 --no-test --seed 1 --epochs 2"
    write_result(made.folder / "none/seed0", recorded.replace("seed 1", "seed 0"))
    write_result(made.folder / "none/seed1", now)  # the flags that train a missing run
    for seed, known in ((0, True), (1, True), (2, False)):
        assert (studies.result_of(made, "none", seed) is not None) == known
    assert kept_result(made.folder / "none/seed0", now, f"{recorded} --width 8") is None


@pytest.mark.parametrize("case", ["the same", "another recipe", "other flags"])
def test_only_a_run_of_the_same_meaning_is_resumed(tmp_path, case):
    """A run stopped at its end keeps its seconds if resumed; if started anew, they change."""
    made, smoothing = tmp_path / "unfinished", ["--label-smoothing", "0.3"] * (case != "the same")
    command = [*TINY.split(), *smoothing, "--output-dir", str(tmp_path), "--name", made.name]
    assert status_of(trainer.main, command) == 0
    before = result_of(made)
    meaning = repr(cli.parse(TINY.split(), ""))
    if case != "other flags":
        old = meaning.replace("label_smoothing=0.0", "label_smoothing=0.3")
        (made / "meaning.txt").write_text(meaning if case == "the same" else old)
    after = train_and_keep(TINY, tmp_path, {"OMP_NUM_THREADS": "1"})
    assert (after["seconds"]["training"] == before["seconds"]["training"]) == (case == "the same")
    assert after["training"]["label_smoothing"] == 0 and not made.exists()
    assert kept_result(tmp_path, TINY) == after


def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    (tmp_path / "src/trainer.py").write_text(deaf)
    monkeypatch.setattr(common.utils, "ROOT", tmp_path)
    monkeypatch.setattr(common, "PATIENCE", 0.1)
    assert train_and_keep(TINY, tmp_path, {}, limit=1) is None


def test_the_table_is_the_mean_and_deviation_over_seeds(study, tmp_path, capsys):
    made = study({"none": ""}, seeds=(0, 1, 2))
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        _, command = studies.flags_of(made, "none", seed)
        write_result(tmp_path / f"none/seed{seed}", command, accuracy, 10.0 + seed)
    assert studies.main(["--table"]) == 0
    assert "| none |  | 3 | 73 | 3.61 | 10 |" in capsys.readouterr().out
    (row,) = common.rows_of(tmp_path / "table.csv")
    assert row["seeds"] == "3" and float(row["validation_accuracy"]) == pytest.approx(73)
    assert float(row["deviation"]) == pytest.approx(statistics.stdev((70, 72, 77)), abs=0.01)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_valid_flags_and_leaves_the_test_set_alone(name):
    for change in STUDIES[name].changes:
        _, flags = studies.flags_of(STUDIES[name], change, 0)
        command = cli.parse(flags.split(), "")
        assert not command.options.test and command.options.device == "cpu"


@pytest.mark.parametrize("name", ["shape", "size"])
def test_all_shapes_do_as_many_operations(name):
    results = [studies.result_of(STUDIES[name], change, 0) for change in STUDIES[name].changes]
    first, *others = (result["training_flops"] for result in results)
    assert others == pytest.approx([first] * len(others), rel=0.04)
