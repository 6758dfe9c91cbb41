"""Training: schedule, optimizers, evaluation, runs that repeat and go on, and the command line."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import trainer
import utils
from data import Split
from recipes import RECIPES, TrainConfig
from small import ROOT, rows_of, same_weights, weights_of
from trainer import evaluate
from ViT import EncoderBlock, ViT, ViTConfig

# ---------------------------------------------------------------------------- evaluation


def test_evaluation_counts_each_image_once_and_each_class_apart(small_shapes):
    """A model that answers from a table of logits; the figures are worked out by hand."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [5.0, 0.0, 1.0], [0.0, 0.0, 4.0]])
    labels = torch.tensor([0, 1, 1, 2])

    class Table(torch.nn.Module):
        def forward(self, images):
            return logits[images[:, 0, 0, 0].long()]

    rows = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    unscaled = trainer.Dataset("x", ("a", "b", "c"), (0.0,) * 3, (1 / 255,) * 3, *[None] * 3)
    result = evaluate(Table(), Split(rows, labels), unscaled)
    losses = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert result.loss == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert result.top1 == 0.75 and result.top5 == 1.0
    assert result.of_class == [1.0, 0.5, 1.0]


# ---------------------------------------------------------------------------- runs


def test_a_run_leaves_its_files_and_the_figures_agree(train, tmp_path, capsys):
    assert train("--name a --epochs 2") == 0
    folder = tmp_path / "a"
    names = {"last.pt", "metrics.csv", "result.json", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    result = json.loads((folder / "result.json").read_text())
    wanted = "command recipe model parameters epochs seed device torch validation_accuracy "
    wanted += "test_accuracy test_loss seconds images_per_second peak_memory_bytes"
    assert set(wanted.split()) <= result.keys()
    assert {"training", "evaluation", "compile", "total"} <= result["seconds"].keys()
    assert result["command"].startswith("python src/trainer.py --recipe demo --patch-size 8")

    capsys.readouterr()
    assert train(f"--evaluate {folder / 'last.pt'}") == 0
    printed = capsys.readouterr().out
    assert f"{result['test_accuracy']:.2%}" in printed and f"{result['test_loss']:.4f}" in printed
    rows = rows_of(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["validation_accuracy"]) == pytest.approx(result["validation_accuracy"])


def test_averaged_weights_follow_the_formula_and_are_what_is_evaluated(
    train, tmp_path, monkeypatch
):
    """The averages worked out again from the weights after each of the 10 steps."""
    seen, evaluated = [], []
    average, predict = trainer.Run.average_weights, trainer.predict

    def watched(run):
        average(run)
        seen.append([weight.detach().clone() for weight in run.model.parameters()])

    monkeypatch.setattr(trainer.Run, "average_weights", watched)
    monkeypatch.setattr(
        trainer, "predict", lambda model, *rest: evaluated.append(model) or predict(model, *rest)
    )
    assert train("--name a --epochs 2 --averaging 0.6 --seed 4") == 0
    checkpoint = utils.load_checkpoint(tmp_path / "a/last.pt")
    torch.manual_seed(4)
    start = ViT(ViTConfig(**checkpoint["model_config"]))
    averages = list(start.parameters())
    for step, weights in enumerate(seen):
        decay = min(0.6, (1 + step) / (10 + step))
        averages = [decay * a + (1 - decay) * w for a, w in zip(averages, weights, strict=True)]
    assert len(seen) == 10
    for (name, _), average in zip(start.named_parameters(), averages, strict=True):
        torch.testing.assert_close(checkpoint["averaged"][name], average.detach())
        assert not torch.equal(checkpoint["averaged"][name], checkpoint["weights"][name])
    model, _ = utils.load_model(tmp_path / "a/last.pt")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint["averaged"][name])
        assert torch.equal(weight, dict(evaluated[-1].named_parameters())[name])


def test_a_recipe_sets_the_models_start_and_the_patches_it_trains_on(train, tmp_path, monkeypatch):
    """With a learning rate of 0 the weights stay as they began."""
    tokens = []
    forward = EncoderBlock.forward
    monkeypatch.setattr(
        EncoderBlock, "forward", lambda block, z: tokens.append(z.shape[1]) or forward(block, z)
    )
    still = "--epochs 1 --learning-rate 0 --weight-decay 0 --optimizer adamw --seed 4"
    for initialisation in ("paper", "mimetic"):
        flags = f"--initialisation {initialisation} --patch-dropout 0.75 --name {initialisation}"
        assert train(f"{flags} {still}") == 0
        saved = utils.load_checkpoint(tmp_path / initialisation / "last.pt")
        torch.manual_seed(4)
        model = ViT(ViTConfig(**saved["model_config"]))
        if initialisation == "mimetic":
            model.mimic_trained_attention()
        assert same_weights(saved["weights"], model.state_dict())
    assert set(tokens) == {4, 16}  # of training and of evaluation


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(train, tmp_path, optimizer):
    assert train(f"--name a --epochs 10 --optimizer {optimizer} --learning-rate 3e-3") == 0
    losses = [float(row["train_loss"]) for row in rows_of(tmp_path / "a/metrics.csv")]
    assert losses[-1] < losses[0] - 0.1


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(f"--name {name} --epochs 1 --seed {seed} --dropout 0.2 --drop-path 0.2") == 0
    a, b, c = (weights_of(tmp_path / name / "last.pt") for name in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


def test_a_finished_run_says_so_and_trains_on_when_epochs_are_raised(train, tmp_path, capsys):
    assert train("--name a --epochs 1") == 0
    assert train(f"--resume {tmp_path / 'a'}") == 0
    assert "raise --epochs" in capsys.readouterr().out
    assert train(f"--resume {tmp_path / 'a'} --epochs 2 --accumulate 2") == 0
    # Linear from 3e-3 over 10 steps with 2 of warm-up, 5 of them done.
    said = "the linear schedule now reaches 0 at epoch 2 instead of 1: "
    assert said + "the learning rate goes on at 0.0019" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "a/metrics.csv")) == 2
    assert json.loads((tmp_path / "a/result.json").read_text())["epochs"] == 2


def test_epochs_cannot_be_fewer_than_are_done(train, tmp_path, capsys):
    assert train("--name a --epochs 2") == 0
    before = (tmp_path / "a/last.pt").read_bytes()
    assert train(f"--resume {tmp_path / 'a'} --epochs 1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--epochs 1 is less than" in line and "epoch 2" in line
    assert (tmp_path / "a/last.pt").read_bytes() == before


def test_deterministic_asks_cuda_for_kernels_that_repeat(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        trainer.only_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(("flags", "looks"), [("", [50, 50, 60]), ("--no-test", [50, 50])])
def test_the_test_images_are_looked_at_once_or_not_at_all(
    train, tmp_path, monkeypatch, flags, looks
):
    looked_at = []
    predict = trainer.predict

    def watched(model, split, dataset):
        looked_at.append(len(split))
        return predict(model, split, dataset)

    monkeypatch.setattr(trainer, "predict", watched)
    assert train(f"--name a --epochs 2 {flags}") == 0
    assert looked_at == looks
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert (result["test_accuracy"] is None) == (flags == "--no-test")


def test_validation_may_skip_epochs_but_not_the_last(train, tmp_path):
    assert train("--name a --epochs 5 --validate-every 2") == 0
    rows = rows_of(tmp_path / "a/metrics.csv")
    assert [row["validation_loss"] != "" for row in rows] == [False, True, False, True, True]
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert float(rows[4]["validation_accuracy"]) == pytest.approx(result["validation_accuracy"])
    assert train(f"--evaluate {tmp_path / 'a'}") == 0  # its checkpoint is a good one


def test_an_epoch_that_becomes_the_last_is_validated(train, tmp_path, monkeypatch):
    validate = trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda run: False)
    assert train("--name a --epochs 3 --validate-every 4") == 0
    monkeypatch.setattr(trainer, "validate", validate)
    (tmp_path / "a/result.json").unlink()
    assert train(f"--resume {tmp_path / 'a'}") == 0
    assert json.loads((tmp_path / "a/result.json").read_text())["validation_accuracy"] is not None
    assert rows_of(tmp_path / "a/metrics.csv")[2]["validation_accuracy"] != ""


def test_the_last_epochs_see_whole_images_and_work_of_each_kind_is_compiled_where_it_pays(
    train, tmp_path, monkeypatch
):
    tokens, compiled = [], []
    forward, compile_model = EncoderBlock.forward, trainer.compile_model
    monkeypatch.setattr(
        EncoderBlock, "forward", lambda block, z: tokens.append(z.shape[1]) or forward(block, z)
    )

    def watched(model, *rest):
        compiled.append(model.embed.patch_dropout)
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)
        return compile_model(model, *rest)

    monkeypatch.setattr(trainer, "compile_model", watched)
    monkeypatch.setattr(
        trainer, "compile_pays", lambda run, work: work == max(run.operations().values())
    )
    flags = "--name a --epochs 5 --whole-epochs 1 --patch-dropout 0.5 --validation-images 0"
    assert train(flags + " --no-test") == 0
    assert compiled == [0.5]
    assert tokens[:2] == [8, 8] and tokens[2:] == [8] * 40 + [16] * 10  # 2 blocks, 5 steps an epoch


def test_a_run_can_save_more_rarely_and_saves_its_end(train, tmp_path, monkeypatch):
    saved, save = [], trainer.Run.save
    monkeypatch.setattr(
        trainer.Run, "save", lambda run, **how: saved.append(run.epoch) or save(run, **how)
    )
    assert train("--name a --epochs 5 --save-epochs 2") == 0
    assert saved == [2, 4, 5]
    assert utils.load_checkpoint(tmp_path / "a/last.pt")["epoch"] == 5


def test_the_measured_seconds_hold_the_steps_the_validation_and_the_test(train, tmp_path):
    assert train("--name a --epochs 2") == 0
    seconds = json.loads((tmp_path / "a/result.json").read_text())["seconds"]
    assert seconds["training"] + seconds["evaluation"] < seconds["first_step_to_end"]
    assert seconds["first_step_to_end"] < seconds["total"]
    assert train(f"--resume {tmp_path / 'a'} --epochs 3") == 0
    seconds = json.loads((tmp_path / "a/result.json").read_text())["seconds"]
    assert seconds["first_step_to_end"] is None


def test_training_on_all_images_leaves_validation_empty(train, tmp_path):
    assert train("--name a --epochs 1 --validation-images 0") == 0
    assert json.loads((tmp_path / "a/result.json").read_text())["validation_accuracy"] is None
    assert rows_of(tmp_path / "a/metrics.csv")[0]["validation_loss"] == ""


def test_without_a_compiler_the_run_says_so_and_is_the_same(train, tmp_path, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler found\nand a long story")

    assert train("--name plain --epochs 1 --dropout 0.2") == 0
    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    assert train("--name fallback --epochs 1 --dropout 0.2 --compile on") == 0
    assert (
        "not available here (no C++ compiler found); training without it" in capsys.readouterr().out
    )
    plain, fallback = (weights_of(tmp_path / name / "last.pt") for name in ("plain", "fallback"))
    assert same_weights(plain, fallback)


def test_bf16_is_close_to_fp32(train, tmp_path):
    for precision in ("fp32", "bf16"):
        assert train(f"--name {precision} --epochs 1 --precision {precision}") == 0
    fp32, bf16 = (rows_of(tmp_path / name / "metrics.csv")[0] for name in ("fp32", "bf16"))
    assert float(bf16["train_loss"]) == pytest.approx(float(fp32["train_loss"]), rel=0.02)
    assert bf16["train_loss"] != fp32["train_loss"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(
    train, tmp_path, monkeypatch, capsys
):
    cross_entropy = F.cross_entropy
    calls = []

    def broken_in_the_second_epoch(logits, labels, **options):
        calls.append(0)
        loss = cross_entropy(logits, labels, **options)
        return loss * math.nan if len(calls) == 9 else loss

    monkeypatch.setattr(F, "cross_entropy", broken_in_the_second_epoch)
    assert train("--name a --epochs 2 --validation-images 0") == 1
    (line,) = capsys.readouterr().err.splitlines()
    # Linear decay over 10 steps with 2 (half an epoch of 5, rounded to even) of warm-up.
    assert "loss is nan at step 9 (epoch 2, learning rate 0.00075)" in line
    assert "--learning-rate" in line and "holds step 5" in line
    assert utils.load_checkpoint(tmp_path / "a/last.pt")["epoch"] == 1


# ---------------------------------------------------------------------------- the command line


def test_a_name_that_exists_is_refused_and_overwritten_only_on_request(train, tmp_path, capsys):
    assert train("--name a --epochs 1") == 0
    before = (tmp_path / "a/last.pt").read_bytes()
    assert train("--name a --epochs 1 --seed 3") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "a/last.pt").read_bytes() == before
    assert train("--name a --epochs 1 --seed 3 --overwrite") == 0
    assert utils.load_checkpoint(tmp_path / "a/last.pt")["train_config"]["seed"] == 3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--epochs 0", "0"),
        ("--epochs many", "many"),
        ("--width 30 --heads 4", "30"),
        ("--patch-size 7", "7"),
        ("--image-size 64", "64"),
        ("--image-size 3by4", "3by4"),
        ("--classes 100", "100"),
        ("--dropout 1", "1.0"),
        ("--learning-rate nan", "nan"),
        ("--label-smoothing 1", "1.0"),
        ("--warmup-epochs 9", "9.0"),
        ("--accumulate 41", "41"),
        ("--flip sideways", "sideways"),
        ("--erase 1.5", "1.5"),
        ("--magnitude 31", "31"),
        ("--cutmix -1", "-1.0"),
        ("--averaging 1", "1.0"),
        ("--patch-dropout 1", "1.0"),
        ("--validate-every 0", "0"),
        ("--save-minutes -1", "-1"),
        ("--precision fp8", "fp8"),
        ("--recipe nonsense", "nonsense"),
        ("--name ../outside", "../outside"),
        ("--device tpu", "tpu"),
        ("--epohcs 3", "--epochs"),
        ("--resume nowhere --epochs 3", "nowhere"),
        ("--evaluate nowhere.pt", "nowhere.pt"),
        ("--evaluate nowhere.pt --width 8", "--width"),
        ("--export nowhere.pt --seed=8", "--seed"),
        ("--resume nowhere --recipe cpu", "--recipe"),
        ("--resume nowhere --name b", "--name"),
        ("--policy-epochs 2", "2.0"),
        ("--save-epochs 0", "'0'"),
        ("--seed 9223372036854775808", "2^63"),
        ("--device meta", "meta"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(train, tmp_path, capsys, flags, named):
    try:
        task = any(name in flags for name in ("--resume", "--evaluate", "--export"))
        status = train(flags if task else f"--name a --epochs 1 {flags}")
    except SystemExit as stop:
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("trainer.py: ") and named in line
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_training(train, tmp_path, capsys):
    (tmp_path / "a").write_text("a file is in the way")
    assert train("--name a --epochs 1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "a") in line


def test_only_epochs_can_change_when_a_run_goes_on(train, tmp_path, capsys):
    assert train("--name a --epochs 1") == 0
    assert train(f"--resume {tmp_path / 'a'} --batch-size 7") == 2
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_a_flag_beats_it(name):
    arguments = trainer.parse_arguments(["--recipe", name, "--epochs", "7", "--flip", "off"])
    assert utils.given(arguments, TrainConfig) == {"epochs": 7, "flip": "off"}
    assert ViT(RECIPES[name].model)


def test_help_shows_the_values_of_the_chosen_recipe(capsys):
    with pytest.raises(SystemExit):
        trainer.parse_arguments(["--recipe", "demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"times each training image is seen ({RECIPES['demo'].train.epochs})" in text
    assert all(name in text for name in RECIPES)


def test_the_program_runs_from_any_folder(tmp_path):
    """The real program, on the real Shapes, as small as its flags allow."""
    flags = "--recipe demo --epochs 1 --patch-size 16 --width 16 --depth 1 --heads 1"
    command = [sys.executable, str(ROOT / "src/trainer.py"), *flags.split(), "--name", "a"]
    command += ["--output-dir", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["epochs"] == 1
