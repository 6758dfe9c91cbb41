"""Command lines: one-line errors of all programs, help, flags that override a recipe."""

import os
import shlex
from pathlib import Path

import pytest
import torch

import benchmark
import cli
import datasets
import predict
import shapes
import small
import speedrun
import study
import trainer
import vis
from recipes import RECIPES, RunOptions
from utils import status_of
from ViT import MODELS

# ---------------------------------------------------------------------------- bad input


# The program, its flags, and part of its one-line error. `brought` makes the paths in braces.
BAD_INPUT = [
    (trainer, "--epochs 0", "give epochs or steps, not 0 and 0"),
    (trainer, "--steps 9", "give epochs or steps, not 1 and 9"),
    (trainer, "--freeze 3", "--freeze 3 is above the model's 2 blocks"),
    (predict, "{deer} --features {deer}", "deer.png must end in .npz"),
    (trainer, "--width 30 --heads 4", "30"),
    (trainer, "--library timm", "--library works only with --export"),
    (trainer, "--init-from nowhere.pth", "nowhere.pth"),
    (trainer, "--image-size 32x48x64", "32x48x64"),
    (trainer, "--classes 100", "unrecognized arguments: --classes"),
    (trainer, "--warmup-epochs 9", "9.0"),
    (trainer, "--accumulate 41", "41"),
    (trainer, "--flip sideways", "sideways"),
    (trainer, "--recipe nonsense", "nonsense"),
    (trainer, "--name ../outside", "--name '../outside' must be letters"),
    (trainer, "--name .", "--name '.' must be letters"),
    (trainer, "--name 'a b'", "--name 'a b' must be letters"),
    (trainer, "--device tpu", "tpu"),
    (trainer, "--epohcs 3", "--epochs"),
    (trainer, "--resume nowhere --epochs 3", "nowhere"),
    (trainer, "--evaluate nowhere.pt", "nowhere.pt"),
    (trainer, "--evaluate nowhere.pt --width 8", "--width"),
    (trainer, "--export nowhere.pt --seed=8", "--seed"),
    (trainer, "--resume nowhere --overwrite", "--overwrite cannot be used with --resume, which"),
    (trainer, "--evaluate nowhere --no-test", "--test cannot be used with --evaluate"),
    (trainer, "--export nowhere --data-dir x", "with --export, which takes --library, --overwrite"),
    (trainer, "--resume nowhere --evaluate nowhere", "not allowed with"),
    (trainer, "--seed 9223372036854775808", "seed must be in [0, 1e18]"),
    (trainer, "--compile graphs", "--compile graphs needs one CUDA device"),
    (trainer, "--compile graphs --accumulate 2", "accumulate 1"),
    (trainer, "--dataset imagenet", "no data set 'imagenet'; choose from cifar10, cifar100, "),
    # Sizes beyond any machine.
    (trainer, "--image-size 100000 --patch-size 8", "100000x100000 is above 8192"),
    (trainer, "--width 32768 --depth 1024", "13,194,139,533,312 weights"),
    # Empty values.
    (trainer, "''", "unrecognized arguments: ''"),
    (trainer, "--init-from ''", "init_from must not be empty"),
    (trainer, "--name ''", "name must not be empty"),
    (trainer, "--resume ''", "it is empty"),
    (predict, "''", "it is empty"),
    (vis, "model --checkpoint ''", "it is empty"),
    # Paths that lead nowhere, or to something that is not a file.
    (trainer, "--resume {long}", "File name too long"),
    (trainer, "--output-dir {long}", "File name too long"),
    (trainer, "--name {stem}", "File name too long"),
    (trainer, "--output-dir {text}", "cannot write to {text}"),
    (trainer, "--init-from ~nosuch/x", "Could not determine home directory"),
    (trainer, "--init-from {loop}", "Too many levels of symbolic links"),
    (trainer, "--init-from {pipe}.safetensors", "not a regular file"),
    (trainer, "--dataset folder:~nosuch", "Could not determine home directory"),
    (trainer, "--dataset folder:{dangling}", "No such file or directory"),
    (trainer, "--evaluate {text}/last.pt", "Not a directory"),
    (predict, "{long}", "File name too long"),
    (predict, "{pipe}.safetensors", "not a regular file"),
    (predict, "{deer} --checkpoint {long}", "File name too long"),
    (predict, "{deer} --checkpoint nowhere.pt", "nowhere.pt"),
    (predict, "{deer} --top 0", "--top must be at least 1, not 0"),
    (predict, "nowhere.png", "nowhere.png"),
    (predict, "{lines}", "two\\nlines\\x1b[0m"),
    (predict, "{empty}", "holds no image files"),
    (vis, "image --dir {loop}", "Too many levels of symbolic links"),
    (vis, "model --checkpoint {long}", "File name too long"),
    (vis, "model --out {long}", "File name too long"),
    # The experiments.
    (benchmark, "--rounds 0", "--rounds must be at least 1, not 0"),
    (benchmark, "--peers x", "--peers x must be some of torchvision,timm"),
    (benchmark, "--device tpu", "tpu"),
    (benchmark, "--json b.txt", "--json b.txt must end in .json"),
    (benchmark, "--device cpu --json {text}/b.json", "cannot write {text}/b.json"),
    (study, "--jobs 0", "--jobs must be at least 1, not 0"),
    (speedrun, "--device cpu --out {empty}", "--dry-run"),
]


@pytest.fixture
def brought(tmp_path):
    """The files and folders that `BAD_INPUT` names."""
    folder = tmp_path / "brought"
    names = ("long", "loop", "dangling", "text", "pipe", "empty", "lines")
    there = {name: folder / name for name in names}
    there |= {"long": folder / ("x" * 300), "lines": folder / "two\nlines\x1b[0m"}
    there["empty"].mkdir(parents=True)
    there["loop"].symlink_to(there["loop"])
    there["dangling"].symlink_to(folder / "nowhere")
    there["text"].write_text("of another kind")
    os.mkfifo(f"{there['pipe']}.safetensors")
    return {name: shlex.quote(str(path)) for name, path in there.items()} | {
        "deer": small.ROOT / "docs/deer.png",
        "stem": "x" * 300,
    }


@pytest.mark.parametrize(
    ("program", "flags", "named"), BAD_INPUT, ids=lambda value: getattr(value, "__name__", value)
)
def test_bad_input_is_one_line_and_exit_status_2(
    tmp_path, brought, capsys, monkeypatch, program, flags, named
):
    monkeypatch.setattr(datasets, "draw_shapes", lambda n, seed: shapes.draw_shapes(200, seed))
    argv = shlex.split(flags.format(**brought))
    if program is predict or flags.startswith(("--resume", "--evaluate")):
        argv += ["--device", "cpu"]
    if program is trainer and not flags.startswith(("--resume", "--evaluate", "--export")):
        argv = [*small.arguments("--name a --epochs 1", tmp_path), *argv]
    try:
        status = status_of(program.main, argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert status == 2 and line.isprintable() and named.format(**brought) in line
    assert captured.out == "" and [each.name for each in tmp_path.iterdir()] == ["brought"]


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
    of_weights = cli.parse("--recipe finetune --image-size 518".split(), "")  # of patches of 14
    assert of_weights.model_changes == {"image_size": (518, 518)}
    by_steps = cli.parse("--recipe demo --steps 9 --freeze".split(), "").training
    assert (by_steps.epochs, by_steps.steps, by_steps.freeze) == (0, 9, True)
    assert cli.parse("--recipe demo --freeze 3".split(), "").training.freeze == 3


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
    monkeypatch.setattr(cli, "best_device", lambda: torch.device(best))
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
