"""A run: started in a folder, saved and resumed; its operations; fine-tuning."""

import dataclasses
import math
import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import datasets
import trainer
from checkpoint import RunFolder, load_checkpoint
from data import Preprocessing
from evaluation import Evaluation
from recipes import TrainConfig
from run import Place, Run, State, assemble, new_run, training_flops
from small import SHAPES, result_of, rows_of, weights_of
from ViT import ViT, ViTConfig

CPU = Place(device=torch.device("cpu"))
SAVE_IS_DUE = Run.save_is_due  # the fixture `train` replaces it


def test_a_sum_that_a_begun_epochs_checkpoint_lacks_is_not_begun_within_it():
    """A metric of newer code, in an epoch that older code started."""
    state = State(None, [], None)
    logits, targets = torch.eye(3), torch.eye(3)
    state.count(torch.tensor(0.5), logits, targets)
    assert {name: float(value) for name, value in state.sums.items()} == {"loss": 0.5, "correct": 3}
    state.sums = {"loss": torch.tensor(1.0)}
    state.count(torch.tensor(0.5), logits, targets)
    assert {name: float(value) for name, value in state.sums.items()} == {"loss": 1.5}


@pytest.mark.parametrize("whole_epochs, drops", [(0, [True] * 3), (1, [False, False, True])])
def test_drop_path_waits_for_the_whole_images(train, monkeypatch, whole_epochs, drops):
    seen, ready = [], Run.ready

    def spy(run, model, epoch):
        ready(run, model, epoch)
        seen.append(model.blocks[0].drop_path.training)

    monkeypatch.setattr(Run, "ready", spy)
    flags = "--epochs 3 --patch-dropout 0.5 --drop-path 0.5 --compile off --whole-epochs"
    assert train(f"{flags} {whole_epochs}") == 0
    assert seen == drops


def test_a_finished_run_may_see_the_test_set_and_more_epochs(train, tmp_path, capsys):
    assert train("--name a --epochs 1 --no-test") == 0
    assert train(f"--resume {tmp_path / 'a'} --no-test") == 0
    assert "already finished; raise --epochs" in capsys.readouterr().out
    assert result_of(tmp_path / "a")["test_accuracy"] is None
    assert train(f"--resume {tmp_path / 'a'}") == 0
    assert result_of(tmp_path / "a")["test_accuracy"] is not None
    assert train(f"--resume {tmp_path / 'a'} --epochs 2 --accumulate 2") == 0
    # Linear from 3e-3 over 10 steps, 2 of them warm-up; 5 are done.
    said = "the linear schedule now reaches 0 at epoch 2 instead of 1: "
    assert said + "the learning rate continues at 0.0019" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "a/metrics.csv")) == 2
    result = result_of(tmp_path / "a")
    assert result["epochs"] == 2 and result["seconds"]["first_step_to_end"] is None

    before = (tmp_path / "a/last.pt").read_bytes()
    assert train(f"--resume {tmp_path / 'a'} --epochs 1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--epochs 1 is too few: 2 epochs are done" in line
    assert (tmp_path / "a/last.pt").read_bytes() == before


def test_a_run_saves_by_the_minute_and_at_its_end(train, tmp_path, monkeypatch):
    """Each of the 25 steps counts as 18 seconds, so that four take more than a minute."""
    saved, save, after_step = [], Run.save, trainer.after_step

    def aged(run, state, bar):
        run.folder.saved_at -= 18
        after_step(run, state, bar)

    def noted(run, state, **how):
        saved.append(state.step)
        save(run, state, **how)

    monkeypatch.setattr(trainer, "after_step", aged)
    monkeypatch.setattr(Run, "save_is_due", SAVE_IS_DUE)
    monkeypatch.setattr(Run, "save", noted)
    assert train("--name a --epochs 5") == 0
    assert saved == [4, 8, 12, 16, 20, 24, 25]
    assert len(load_checkpoint(tmp_path / "a/last.pt").history) == 5


def test_the_best_epoch_is_kept(train, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.5, 0.5, 0.4])

    def validated(*_):
        return Evaluation(1.0, next(accuracies), 1.0, [], [], [])

    monkeypatch.setattr("trainer.evaluate", validated)
    assert train("--name a --epochs 4 --keep-best --no-test") == 0
    best = load_checkpoint(tmp_path / "a/best.pt")
    assert [row.validation_accuracy for row in best.history] == [0.2, 0.5, 0.5]
    accuracies = iter([0.5, 0.3, 0.4, 0.2])  # the first of a run that keeps none
    assert train("--name b --epochs 1 --no-test") == 0
    assert train(f"--resume {tmp_path}/b --epochs 4 --keep-best --no-test") == 0
    best = load_checkpoint(tmp_path / "b/best.pt")
    assert [row.validation_accuracy for row in best.history] == [0.5, 0.3, 0.4]
    assert best.optimizers is None and best.sums == {}
    assert len(load_checkpoint(tmp_path / "a/last.pt").history) == 4
    assert train("--name b --keep-best --validation-images 0") == 2


def test_the_model_has_the_channels_and_classes_of_the_data_set(tmp_path, monkeypatch):
    expected = Preprocessing(size=(32, 32), mean=(0.5,), std=(0.2,))
    gray = dataclasses.replace(SHAPES, classes=("a", "b"), preprocessing=expected)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: gray)
    place = Place(device=torch.device("cpu"), folder=RunFolder(tmp_path / "a"))
    begun, state = new_run("demo", ViTConfig(), TrainConfig(), place)
    config = begun.model_config
    assert config is state.model.config
    assert (config.channels, config.classes, config.image_size) == (1, 2, (32, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------------------- its operations


@pytest.mark.parametrize("frozen", [False, 1, 2, True])
@pytest.mark.parametrize(
    ("pooling", "dropped", "kept"), [("class", 0.0, 16), ("mean", 0.0, 16), ("class", 0.7, 5)]
)
def test_the_operations_of_a_step_are_those_that_torch_counts(pooling, dropped, kept, frozen):
    config = ViTConfig(patch_size=8, width=32, depth=3, heads=4, pooling=pooling, mlp_ratio=3)
    numbers = torch.arange(kept).expand(2, kept) if dropped else None
    free, model = TrainConfig(freeze=frozen), ViT(config)
    assemble(model, free, SHAPES, CPU)  # freezes it
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32), numbers).sum().backward()
    # The input of the first trained layer needs no gradient, so its third product is skipped.
    first = {False: 2 * kept * 3 * 8**2 * 32, True: 2 * 32 * 10}
    first = 0 if type(frozen) is int else first[frozen]  # a block's first layer is a norm
    assert counter.get_total_flops() == 2 * (training_flops(config, dropped, frozen=frozen) - first)


def test_the_operations_of_a_run_are_those_of_its_epochs():
    config = TrainConfig(epochs=10, patch_dropout=0.5, whole_epochs=2, batch_size=50)
    begun, _ = assemble(ViT(ViTConfig()), config, SHAPES, CPU)
    half, whole = (training_flops(ViTConfig(), share) for share in (0.5, 0.0))
    assert begun.flops() == {0.5: 8 * 200 * half, 0.0: 2 * 200 * whole}


def test_over_operations_a_step_on_whole_images_counts_for_what_it_costs():
    flags = {"epochs": 4, "patch_dropout": 0.75, "whole_epochs": 2, "batch_size": 50}
    config = TrainConfig(**flags, warmup_epochs=0.5, schedule="linear")
    over_steps, _ = assemble(ViT(ViTConfig()), config, SHAPES, CPU)
    config = dataclasses.replace(config, schedule_over="operations")
    over_operations, _ = assemble(ViT(ViTConfig()), config, SHAPES, CPU)
    # 16 steps: 2 of warm-up, 6 more on a quarter of the patches, then 8 on whole images.
    expected = [0.5, 1.0] + [1 - step / 14 for step in range(15)]
    assert [over_steps.rate_factor(step) for step in range(17)] == pytest.approx(expected)
    cost = training_flops(ViTConfig()) / training_flops(ViTConfig(), 0.75)
    done = [0, 1, 2, 3, 4, 5, 6, *(6 + cost * step for step in range(1, 9))]
    expected = [0.5, 1.0] + [1 - each / (6 + 8 * cost) for each in done]
    assert [over_operations.rate_factor(step) for step in range(17)] == pytest.approx(expected)
    assert cost > 3 and over_operations.rate_factor(8) > 1.3 * over_steps.rate_factor(8)


# ---------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs"),
    [(1, 1, 200), (200, 40, 40), (500, 50, 20), (20_000, 50, 5), (999, 50, 10)],
)
def test_a_recipe_by_steps_suits_the_number_of_images(images, batch_size, epochs):
    recipe = TrainConfig(epochs=0, steps=200, batch_size=0, warmup_epochs=0.0)
    assert recipe.for_images(images) == TrainConfig(
        epochs=epochs, batch_size=batch_size, warmup_epochs=0.0
    )
    own = TrainConfig(epochs=7, batch_size=500)
    assert own.for_images(images) == own


def test_a_step_whose_gradients_overflow_in_float16_is_left_out():
    options = {"optimizer": "sgd", "gradient_clip": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0}
    config = TrainConfig(precision="fp16", learning_rate=1.0, **options)
    begun, state = assemble(ViT(ViTConfig(depth=1)), config, SHAPES, CPU)
    before = state.model.head.weight.detach().clone()
    scale = state.scaler.scale(torch.ones(())).item()
    for gradient in (math.inf, 2.0):
        for weight in state.model.parameters():
            weight.grad = torch.full_like(weight, gradient)
        trainer.update(begun, state)
        assert torch.equal(before, state.model.head.weight) == (gradient == math.inf)
    assert state.scaler.get_scale() == scale / 2 and state.step == 2
    moved = before - state.model.head.weight  # by a gradient of 2 over the scale
    expected = torch.full_like(moved, 4 / scale * begun.rate_factor(1))
    torch.testing.assert_close(moved, expected)


def test_tensorboard_has_the_rows_and_a_batch_or_is_asked_for(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    assert train("--name a --epochs 1 --tensorboard") == 2
    assert "--tensorboard needs tensorboard: pip install tensorboard" in capsys.readouterr().err
    library = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    assert train("--name a --epochs 2 --tensorboard --no-test") == 0
    library.SummaryWriter.assert_called_once_with(tmp_path / "a", purge_step=1)
    writer = library.SummaryWriter.return_value
    (_, images, epoch), _ = writer.add_images.call_args
    assert (images.shape, images.dtype, epoch) == ((64, 3, 32, 32), torch.uint8, 1)
    calls = [call.args for call in writer.add_scalar.call_args_list]
    written = {(name, f"{value:.6g}", str(epoch)) for name, value, epoch in calls}
    rows = rows_of(tmp_path / "a/metrics.csv")
    assert {(n, value, row["epoch"]) for row in rows for n, value in row.items()} <= written


@pytest.mark.parametrize("flags", ["--freeze 1", "--freeze 2", "--freeze", "--freeze 0"])
def test_frozen_blocks_stay_as_they_are(flags, train, tmp_path):
    for epochs in (1, 2):  # with the same seed
        assert train(f"--name e{epochs} --epochs {epochs} --positions learned {flags}") == 0
    before, after = (weights_of(tmp_path / f"e{epochs}/last.pt") for epochs in (1, 2))
    moved = {".".join(n.split(".")[:2]) for n in before if not before[n].equal(after[n])}
    blocks = {"--freeze 1": {"blocks.1"}, "--freeze 0": {"blocks.0", "blocks.1"}}.get(flags, set())
    top = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    embed = {"embed.proj", "embed.pos_embed"} if flags == "--freeze 0" else set()
    assert moved == blocks | embed | ({"head.weight", "head.bias"} if flags == "--freeze" else top)


def test_a_head_on_features_that_are_computed_once_is_that_on_images(train, tmp_path, monkeypatch):
    flags = "--freeze --flip off --crop-padding 0 --epochs 2 --precision fp32"
    assert train(f"--name once {flags}") == 0
    monkeypatch.setattr(Run, "features_once", False)
    assert train(f"--name each {flags}") == 0
    once, each = (weights_of(tmp_path / name / "last.pt") for name in ("once", "each"))
    torch.testing.assert_close(once, each, rtol=0, atol=1e-5)
    once, each = (result_of(tmp_path / name)["training_flops"] for name in ("once", "each"))
    assert once < 0.6 * each
