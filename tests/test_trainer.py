"""Training: what a run writes, sees, reproduces and compiles."""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._inductor import config as inductor
from torch._inductor.exc import InvalidCxxCompiler

import datasets
import evaluation
import small
import trainer
from checkpoint import load_checkpoint
from initialization import mimetic, whiten_patches
from recipes import Recipe, RunOptions, TrainConfig
from run import Place, Run, assemble
from small import ROOT, result_of, rows_of, same_weights, weights_of
from utils import Diverged, UserError
from ViT import EncoderBlock, ViT, ViTConfig


def test_a_run_leaves_its_files_and_the_figures_agree(train, tmp_path, capsys):
    assert train("--name a --epochs 2") == 0
    folder = tmp_path / "a"
    names = {"last.pt", "metrics.csv", "result.json", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    result = result_of(folder)
    wanted = "command commit recipe model parameters epochs seed device torch validation_accuracy "
    wanted += "test_accuracy test_loss seconds images_per_second training_flops peak_memory_bytes"
    assert set(wanted.split()) <= result.keys()
    seconds = result["seconds"]
    assert seconds["training"] + seconds["evaluation"] < seconds["first_step_to_end"]
    assert seconds["first_step_to_end"] + seconds["compile"] < seconds["total"]
    assert result["command"].startswith("python src/trainer.py --recipe demo --patch-size 8")

    capsys.readouterr()
    assert train(f"--evaluate {folder / 'last.pt'}") == 0
    printed = capsys.readouterr().out
    assert f"{result['test_accuracy']:.2%}" in printed and f"{result['test_loss']:.4f}" in printed
    rows = rows_of(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["validation_accuracy"]) == pytest.approx(result["validation_accuracy"])


def test_a_result_is_written_even_if_its_picture_cannot_be_drawn(
    train, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise ValueError("a label\nthat no one can draw")

    monkeypatch.setattr("curves.changes", fail)
    assert train("--name a --epochs 1") == 1
    assert "a: curves.png: a label that no one can draw\n" in capsys.readouterr().err
    assert result_of(tmp_path / "a")["epochs"] == 1


def watch_tokens(monkeypatch):
    """A list that receives the number of tokens at each call of a block."""
    tokens, forward = [], EncoderBlock.forward

    def watched(block, z):
        tokens.append(z.shape[1])
        return forward(block, z)

    monkeypatch.setattr(EncoderBlock, "forward", watched)
    return tokens


def test_a_recipe_sets_the_initialization_and_the_patches_it_trains_on(
    train, tmp_path, monkeypatch
):
    """With a learning rate of 0, the weights stay at their initialization."""
    tokens = watch_tokens(monkeypatch)
    still = "--epochs 1 --learning-rate 0 --weight-decay 0 --optimizer adamw --seed 4"
    initializations = {
        "paper": "--initialization paper",
        "mimetic": "--initialization mimetic",
        "white": "--initialization mimetic --whiten-patches",
    }
    for name, flags in initializations.items():
        assert train(f"{flags} --patch-dropout 0.75 --name {name} {still}") == 0
        saved = load_checkpoint(tmp_path / name / "last.pt")
        torch.manual_seed(4)
        model = ViT(saved.model)
        if name != "paper":
            mimetic(model)
        if name == "white":
            whiten_patches(model, small.SHAPES.train, saved.preprocessing)
        assert same_weights(saved.weights, model.state_dict())
    assert set(tokens) == {4, 16}  # in training and in evaluation


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(train, tmp_path, optimizer):
    assert train(f"--name a --epochs 10 --optimizer {optimizer} --learning-rate 3e-3") == 0
    losses = [float(row["train_loss"]) for row in rows_of(tmp_path / "a/metrics.csv")]
    assert losses[-1] < losses[0] - 0.1


def test_compiling_pays_by_operations_steps_and_the_kind_of_device(monkeypatch):
    """The runs only name a device; none is used."""
    config = TrainConfig(epochs=10, warmup_epochs=0, batch_size=50)
    run, _ = assemble(ViT(ViTConfig()), config, small.SHAPES, Place(device=torch.device("cpu")))
    (operations,) = run.flops().values()

    def pays(kind, share):
        epochs = round(10 * share * {"cpu": 2e13, "cuda": 3e15, "mps": 1e17}[kind] / operations)
        longer = dataclasses.replace(config, epochs=epochs)
        there = dataclasses.replace(run, config=longer, device=torch.device(kind))
        return trainer.compile_pays(there, 0.0)

    assert pays("cpu", 1.1) and not pays("cpu", 0.9)
    assert pays("cuda", 1.1) and not pays("cuda", 0.9)
    assert not pays("mps", 1)
    on_a_gpu = dataclasses.replace(run, device=torch.device("cuda"))  # 10 epochs of 4 steps
    for least, few in ((39, False), (40, True)):
        monkeypatch.setitem(trainer.WORTH_COMPILING, "cuda", (0, least))
        assert trainer.compile_pays(on_a_gpu, 0.0) != few


@pytest.mark.parametrize(
    ("flags", "looks"),
    [("", [50, 50, 60]), ("--no-test", [50, 50]), ("--validation-images 0", [60])],
)
def test_the_test_images_are_looked_at_once_or_not_at_all(
    train, tmp_path, monkeypatch, flags, looks
):
    looked_at = []
    predict = evaluation.predict

    def watched(model, split, *rest):
        looked_at.append(len(split))
        return predict(model, split, *rest)

    monkeypatch.setattr(evaluation, "predict", watched)
    assert train(f"--name a --epochs 2 {flags}") == 0
    assert looked_at == looks
    result = result_of(tmp_path / "a")
    assert (result["test_accuracy"] is None) == (60 not in looks)
    assert (result["validation_accuracy"] is None) == (50 not in looks)
    assert (rows_of(tmp_path / "a/metrics.csv")[0]["validation_loss"] == "") == (50 not in looks)


def test_validation_may_skip_epochs_but_not_the_last(train, tmp_path):
    assert train("--name a --epochs 5 --validate-every 2") == 0
    rows = rows_of(tmp_path / "a/metrics.csv")
    assert [row["validation_loss"] != "" for row in rows] == [False, True, False, True, True]
    result = result_of(tmp_path / "a")
    assert float(rows[4]["validation_accuracy"]) == pytest.approx(result["validation_accuracy"])
    assert train(f"--evaluate {tmp_path / 'a'}") == 0  # its checkpoint is a good one


def test_an_epoch_that_becomes_the_last_is_validated(train, tmp_path, monkeypatch):
    validate = trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda run, state: False)
    assert train("--name a --epochs 3 --validate-every 4") == 0
    monkeypatch.setattr(trainer, "validate", validate)
    (tmp_path / "a/result.json").unlink()
    assert train(f"--resume {tmp_path / 'a'}") == 0
    assert result_of(tmp_path / "a")["validation_accuracy"] is not None
    assert rows_of(tmp_path / "a/metrics.csv")[2]["validation_accuracy"] != ""


def test_the_last_epochs_see_whole_images_and_compiling_is_for_what_pays(
    train, tmp_path, monkeypatch
):
    tokens, fast = watch_tokens(monkeypatch), []

    def compile(model, **_):
        return lambda images, kept: fast.append(kept.shape[1]) or model(images, kept)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(trainer, "compile_pays", lambda run, dropout: dropout == 0.5)
    flags = "--name a --epochs 5 --whole-epochs 1 --patch-dropout 0.5 --validation-images 0"
    assert train(flags + " --no-test") == 0
    assert fast == [8] * 21  # a warm-up call, and 4 epochs of 5 steps
    assert tokens[:2] == [8, 8] and tokens[2:] == [8] * 40 + [16] * 10  # each in 2 blocks


def no_compiler(*_, **__):
    raise InvalidCxxCompiler


@pytest.mark.parametrize(
    ("batch_size", "compiler", "compiled"),
    [(45, None, 1), (200, None, 1), (500, None, 0), (40, no_compiler, 1)],
)
def test_a_compiled_run_is_the_same_also_with_short_batches_or_without_a_compiler(
    train, tmp_path, monkeypatch, capsys, batch_size, compiler, compiled
):
    """Counts what torch.compile gets; a batch size above the data set makes one short batch."""
    calls = []
    flags = f"--epochs 1 --dropout 0.2 --batch-size {batch_size} --patch-dropout 0.5"
    assert train(f"--name plain {flags}") == 0
    monkeypatch.setattr(torch, "compile", lambda model, **_: calls.append(0) or compiler or model)
    assert train(f"--name compiled {flags} --compile on") == 0
    assert len(calls) == compiled
    said = "torch.compile is not available (No working C++ compiler found"
    assert (said in capsys.readouterr().out) == (compiler is no_compiler)
    result = result_of(tmp_path / "compiled")
    assert result["compiled"] == ("default" if compiled and not compiler else False)
    plain, compiled = (weights_of(tmp_path / name / "last.pt") for name in ("plain", "compiled"))
    assert same_weights(plain, compiled)


@inductor.patch({"cpp.cxx": (None, "nowhere"), "force_disable_caches": True})
def test_only_a_missing_compiler_is_done_without(train, monkeypatch, capsys):
    assert train("--name a --epochs 1 --compile on --no-test") == 0
    assert "not available (InvalidCxxCompiler: No working C++" in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        train("--name b --epochs 1 --compile on --no-test")
    assert caught.value.__notes__ == ["--compile off trains without torch.compile"]


def test_attention_is_written_out_where_its_kernel_fails(train, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("cuDNN error: no execution plan\nand a long story")

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    assert train("--name a --epochs 1 --attention fused --no-test") == 0
    said = "fused attention fails here (cuDNN error: no execution plan); using plain attention"
    assert said in capsys.readouterr().out.splitlines()


def test_every_size_of_a_part_is_compiled_for(train, monkeypatch):
    """Four parts of 45 images: 12, 11, 11, 11. The last 20 make 5 each, which are short."""
    seen = []

    def compile(model, **_):
        return lambda images, kept: seen.append(len(images)) or model(images, kept)

    monkeypatch.setattr(torch, "compile", compile)
    assert train("--name a --epochs 1 --batch-size 45 --accumulate 4 --compile on --no-test") == 0
    assert seen == [12, 11] + 4 * [12, 11, 11, 11]


def test_bf16_is_close_to_fp32(train, tmp_path):
    for precision in ("fp32", "bf16"):
        assert train(f"--name {precision} --epochs 1 --precision {precision}") == 0
    fp32, bf16 = (rows_of(tmp_path / name / "metrics.csv")[0] for name in ("fp32", "bf16"))
    assert float(bf16["train_loss"]) == pytest.approx(float(fp32["train_loss"]), rel=0.02)
    assert bf16["train_loss"] != fp32["train_loss"]


NAN = math.nan


def break_weight(_, optimizer):
    optimizer.param_groups[0]["params"][0].data.flatten()[3] = NAN


@pytest.mark.parametrize(
    ("place", "name", "broken", "call", "images", "named"),
    [
        (F, "cross_entropy", lambda loss, *_: loss * NAN, 9, 0, "the loss is nan"),
        (trainer, "evaluate", lambda e, *_: e._replace(loss=NAN), 2, 50, "validation loss is nan"),
        # The last step of the second epoch: no loss has been computed with these weights.
        (torch.optim.AdamW, "step", break_weight, 10, 0, "the weights are not finite"),
    ],
)
def test_what_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(
    train, tmp_path, monkeypatch, capsys, place, name, broken, call, images, named
):
    whole, calls = getattr(place, name), itertools.count(1)

    def breaking(*arguments, **options):
        result = whole(*arguments, **options)
        return broken(result, *arguments) if next(calls) == call else result

    monkeypatch.setattr(place, name, breaking)
    assert train(f"--name a --epochs 2 --validation-images {images}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    # The loss is checked at the end of the epoch, at the last step of the linear decay over 10.
    assert f"{named} by step 10 (epoch 2, learning rate 0.00038, Muon's 0.0025)" in line
    assert "a lower --muon-learning-rate or --learning-rate" in line and "holds step 5" in line
    assert len(load_checkpoint(tmp_path / "a/last.pt").history) == 1


# ---------------------------------------------------------------------------- ways to start a run


def test_a_run_in_a_thread_is_that_of_the_command_line(train, tmp_path, monkeypatch):
    assert train("--name a --epochs 2") == 0
    saved = load_checkpoint(tmp_path / "a/last.pt")
    recipe = Recipe("from Python", saved.model, saved.training)
    options = RunOptions(output_dir=tmp_path, device="cpu")
    began = time.perf_counter()
    result = ThreadPoolExecutor().submit(trainer.fit, recipe, options, name="mine").result()
    assert result["seconds"]["total"] <= time.perf_counter() - began  # not the process's
    written = result_of(tmp_path / "mine")
    assert written == json.loads(json.dumps(result))
    assert result["recipe"] == "mine" and result["command"] == ""
    assert same_weights(saved.weights, weights_of(tmp_path / "mine/last.pt"))
    with pytest.raises(UserError, match="mine exists"):
        trainer.fit(recipe, options, name="mine")
    whole = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **b: math.nan * whole(*a, **b))
    with pytest.raises(Diverged, match="the loss is"):
        trainer.fit(recipe, dataclasses.replace(options, name="b"))


def test_without_a_recipe_the_machine_chooses_one_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load_dataset", small.load_small)
    flags = [*small.TINY, "--epochs", "1", "--output-dir", str(tmp_path), "--patch-dropout", "0"]
    assert trainer.main([*flags, "--device", "cpu"]) == 0
    assert "recipe cpu, made for a CPU" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "cpu/last.pt").recipe == "cpu"


def test_the_program_runs_from_any_folder(tmp_path):
    """Runs the real program on the real Shapes, as small as its flags allow."""
    flags = "--recipe demo --epochs 1 --patch-size 16 --width 16 --depth 1 --heads 1 --name a"
    flags += " --output-dir runs --device cpu"
    program = [sys.executable, ROOT / "src/trainer.py", *flags.split()]
    done = small.ran(*program, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert result_of(tmp_path / "runs/a")["epochs"] == 1


def test_balanced_classes_weigh_alike(train, monkeypatch):
    """An image of a class with 3 times as many images counts a third as much."""
    seen, cross_entropy = [], F.cross_entropy

    def watched(logits, targets, weights=None, **options):
        seen.append(weights)
        return cross_entropy(logits, targets, weights, **options)

    labels = small.SHAPES.train.labels
    monkeypatch.setattr(F, "cross_entropy", watched)
    assert train("--name a --epochs 1 --balance --no-test") == 0
    weights = seen[0]
    assert (weights * labels.bincount()).std() < 1e-3 * weights.sum()
    assert weights[labels].mean().item() == pytest.approx(1)
    assert train("--name b --epochs 1 --no-test") == 0
    assert seen[-2] is None


def test_a_streamed_folder_trains_resumes_bit_for_bit_and_is_evaluated(
    signal_at, tmp_path, monkeypatch, capsys
):
    for name in ("b10", "b2", "a"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range({"a": 24, "b2": 18, "b10": 15}[name]):
            noise = torch.randint(256, (9, 11, 3), generator=small.generator(number))
            image = Image.fromarray(noise.to(torch.uint8).numpy())
            image.save(tmp_path / "pets" / name / f"{number}.png")
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1000)
    monkeypatch.setattr(Run, "save_is_due", small.after_each_epoch)
    flags = f"--recipe demo --dataset folder:{tmp_path}/pets --epochs 3 --name"
    assert small.status_of(f"{flags} whole", tmp_path) == 0
    signal_at(signal.SIGTERM, 3)  # within the second of three epochs of two steps
    assert small.status_of(f"{flags} cut", tmp_path) == 128 + signal.SIGTERM
    signal_at(signal.SIGTERM, -1)
    assert small.status_of(f"--resume {tmp_path}/cut", tmp_path) == 0
    assert small.differing(tmp_path / "whole", tmp_path / "cut") == 0
    capsys.readouterr()

    there, aside = tmp_path / "pets/b10", tmp_path / "aside"

    def vanishes(run, state):
        if state.epoch == 1 and there.exists():
            there.rename(aside)
        return False

    monkeypatch.setattr(Run, "save_is_due", vanishes)
    assert small.status_of(f"{flags} gone", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{there}/" in error and f"resume with --resume {tmp_path}/gone" in error
    aside.rename(there)
    monkeypatch.setattr(Run, "save_is_due", small.after_each_epoch)
    assert small.status_of(f"--resume {tmp_path}/gone", tmp_path) == 0
    assert small.differing(tmp_path / "whole", tmp_path / "gone") == 0
    capsys.readouterr()
    assert small.status_of(f"--evaluate {tmp_path}/whole", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["a", "b2", "b10"]
    assert any(line.startswith("class mean") for line in lines)
    image.save(tmp_path / "pets/a/new.png")  # moves no other image to another split
    for task in ("--evaluate", "--resume"):
        assert small.status_of(f"{task} {tmp_path}/whole", tmp_path) == 0
