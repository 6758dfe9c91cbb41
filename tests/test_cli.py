"""The command line: bad input in one line, help, flags that override a recipe."""

from pathlib import Path

import pytest

import cli
import small
from recipes import RECIPES, RunOptions
from utils import UserError, status_of
from ViT import MODELS

# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--epochs 0", "epochs must be in [1, inf), not 0"),
        ("--width 30 --heads 4", "30"),
        ("--library timm", "--library works only with --export"),
        ("--init-from nowhere.pth", "nowhere.pth"),
        ("--image-size 32x48x64", "32x48x64"),
        ("--classes 100", "unrecognized arguments: --classes"),
        ("--warmup-epochs 9", "9.0"),
        ("--accumulate 41", "41"),
        ("--flip sideways", "sideways"),
        ("--recipe nonsense", "nonsense"),
        ("--name ../outside", "../outside"),
        ("--device tpu", "tpu"),
        ("--epohcs 3", "--epochs"),
        ("--resume nowhere --epochs 3", "nowhere"),
        ("--evaluate nowhere.pt", "nowhere.pt"),
        ("--evaluate nowhere.pt --width 8", "--width"),
        ("--export nowhere.pt --seed=8", "--seed"),
        ("--resume nowhere --overwrite", "--overwrite cannot be used with --resume, which"),
        ("--evaluate nowhere --no-test", "--test cannot be used with --evaluate"),
        ("--export nowhere --data-dir x", "with --export, which takes --library, --overwrite"),
        ("--resume nowhere --evaluate nowhere", "not allowed with"),
        ("--evaluate", "expected one argument"),
        ("--seed 9223372036854775808", "2^63"),
        ("--compile graphs", "--compile graphs needs one CUDA device"),
        ("--compile graphs --accumulate 2", "accumulate 1"),
        ("--dataset imagenet", "no data set 'imagenet'; choose from cifar10, cifar100, "),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, capsys, flags, named):
    try:
        task = any(name in flags for name in ("--resume", "--evaluate", "--export"))
        status = small.status_of(flags if task else f"--name a --epochs 1 {flags}", tmp_path)
    except SystemExit as stop:
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("trainer.py: ") and named in line
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_user_is_one_line_with_the_program_and_the_rank(monkeypatch, capsys):
    def refusing(argv):
        raise UserError(f"{argv} cannot be done")

    def interrupted(argv):
        raise KeyboardInterrupt

    assert status_of(refusing, ["a"]) == 2
    assert capsys.readouterr().err == "trainer.py: ['a'] cannot be done\n"
    monkeypatch.setenv("RANK", "3")
    assert status_of(interrupted, []) == 130
    assert capsys.readouterr().err == "rank 3: trainer.py: stopped\n"


# ---------------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_a_flag_overrides_it(name):
    command = cli.parse(["--recipe", name, "--epochs", "7", "--flip", "off"], "")
    assert command.training_changes == {"epochs": 7, "flip": "off"}
    assert (command.training.epochs, command.training.flip) == (7, "off")
    assert command.training.batch_size == RECIPES[name].train.batch_size
    assert command.model == RECIPES[name].model
    assert (command.task, command.path, command.recipe, command.note) == ("train", None, name, "")


def test_flags_have_their_types_and_override_a_model_size():
    flags = "--recipe demo --model tiny --depth 5 --no-qkv-bias --image-size 32x48 "
    flags += "--name a --output-dir x --no-test --overwrite --save-minutes 2"
    command = cli.parse(flags.split(), "")
    model, tiny = command.model, MODELS["tiny"]
    assert (model.width, model.heads, model.depth) == (tiny["width"], tiny["heads"], 5)
    assert not model.qkv_bias and model.positions == "sincos" and model.image_size == (32, 48)
    assert command.options == RunOptions(
        name="a", output_dir=Path("x"), test=False, overwrite=True, save_minutes=2.0
    )
    assert cli.parse("--recipe demo --image-size 40".split(), "").model.image_size == (40, 40)


@pytest.mark.parametrize(
    ("best", "flags", "recipe", "why"),
    [
        ("cpu", "", "cpu", "made for a CPU"),
        ("cuda", "", "default", "a GPU such as this cuda device"),
        ("mps", "", "default", "a GPU such as this mps device"),
        ("cuda", "--device cpu", "cpu", "made for a CPU"),
        ("cpu", "--device cuda:1", "default", "a GPU such as this cuda device"),
    ],
)
def test_without_a_recipe_the_device_chooses_one_and_the_note_says_why(
    monkeypatch, best, flags, recipe, why
):
    monkeypatch.setattr(cli, "best_device", lambda: cli.argparse.Namespace(type=best))
    command = cli.parse(flags.split(), "")
    assert command.recipe == recipe and command.training == RECIPES[recipe].train
    assert f"recipe {recipe}, " in command.note and why in command.note


def test_a_path_is_looked_for_here_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = cli.parse(["--evaluate", "checkpoints/vit_cifar10.pt"], "")
    assert command.task == "evaluate"
    assert command.path == small.ROOT / "checkpoints/vit_cifar10.pt"
    (tmp_path / "checkpoints").mkdir()
    assert cli.parse(["--resume", "checkpoints"], "").path == Path("checkpoints/last.pt")


def test_help_shows_the_values_of_the_chosen_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(["--recipe", "demo", "--help"], "what it does")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "what it does" in text
    assert f"times each training image is seen ({RECIPES['demo'].train.epochs})" in text
    assert all(name in text for name in RECIPES)
    assert "are downloaded to (data/)" in text and "--classes" not in text
