"""Evaluation: numbers worked out by hand, and batches that fit into memory."""

import math

import pytest
import torch

import evaluation
from data import Preprocessing, Split, StreamedSplit
from distributed import World
from evaluation import batch_size_for, evaluate, predict
from ViT import MODELS, ViT, ViTConfig


class Table(torch.nn.Module):
    """A model whose logits for image n are row n of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.config = logits, ViTConfig(classes=logits.shape[1])

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


UNSCALED = Preprocessing(size=(2, 2), mean=(0.0,) * 3, std=(1 / 255,) * 3)


def numbered(labels):
    """A split whose image n has the value n."""
    rows = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(rows.expand(-1, 3, 2, 2), labels)


def test_evaluation_counts_each_image_once_and_each_class_apart():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [5.0, 0.0, 1.0], [0.0, 0.0, 4.0]])
    labels = torch.tensor([0, 1, 1, 2])
    result = evaluate(Table(logits), numbered(labels), UNSCALED)
    losses = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert result.loss == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert result.top1 == 0.75 and result.top5 == 1.0
    assert result.of_class == [1.0, 0.5, 1.0]
    assert result.precision == [0.5, 1.0, 1.0]
    assert result.f1 == pytest.approx([2 / 3, 2 / 3, 1.0])  # 2 right / (images + answers)


def test_ranks_without_a_share_of_a_small_split_add_nothing(monkeypatch):
    """With two images on three ranks, the last rank has none."""
    read, summed = lambda n: torch.full((3, 2, 2), n, dtype=torch.uint8), []
    split = StreamedSplit(range(2), read, torch.tensor([0, 1]))
    monkeypatch.setattr(World, "sum", lambda world, value: summed.append(value) or value)
    evaluate(Table(torch.eye(3)), split, UNSCALED, World(rank=2, size=3))
    assert summed and all((value == 0).all() for value in summed)


def test_top5_is_of_the_first_five_answers_and_a_class_without_images_has_no_accuracy():
    logits, labels = torch.arange(8.0).expand(4, 8), torch.tensor([7, 3, 2, 4])
    result = evaluate(Table(logits), numbered(labels), UNSCALED)
    assert (result.top1, result.top5) == (0.25, 0.75)
    assert [share for share in result.of_class if not math.isnan(share)] == [0, 0, 0, 1]
    assert [share for share in result.precision if not math.isnan(share)] == [0.25]
    assert [share for share in result.f1 if not math.isnan(share)] == [0, 0, 0, 0.4]
    lines = [line.split() for line in evaluation.table(result, "abcdefgh")]
    assert lines[3:6] == [
        ["recall", "precision", "F1"],
        ["class", "mean", "25.00%", "25.00%", "10.00%"],  # over the classes that have one
        ["a", "-", "-", "-"],
    ]
    assert lines[7:9] == [["c", "0.00%", "-", "0.00%"], ["d", "0.00%", "-", "0.00%"]]
    assert lines[-1] == ["h", "100.00%", "25.00%", "40.00%"]


def test_predict_gives_the_logits_of_the_wanted_rows_whatever_the_batches(monkeypatch):
    logits = torch.randn(7, 10)
    split, model = numbered(torch.zeros(7, dtype=torch.int64)), Table(logits)
    rows = torch.tensor([5, 0, 6, 5])
    for size in (1, 3, 500):
        monkeypatch.setattr(evaluation, "batch_size_for", lambda *_, size=size: size)
        assert torch.equal(predict(model, split, UNSCALED), logits)
        assert torch.equal(predict(model, split, UNSCALED, rows), logits[rows])
    assert not model.training


def test_evaluation_can_run_in_the_precision_of_the_training():
    torch.manual_seed(0)
    model = ViT(ViTConfig(patch_size=16, width=32, depth=1, heads=2))
    torch.nn.init.normal_(model.head.weight)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.zeros(6, dtype=torch.int64))
    preprocessing = Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    full, half = (predict(model, split, preprocessing, precision=p) for p in ("fp32", "bf16"))
    assert full.dtype == half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.1)
    assert evaluate(model, split, preprocessing, precision="bf16").loss != pytest.approx(
        evaluate(model, split, preprocessing).loss, rel=1e-6
    )


def test_a_batch_of_an_evaluation_is_smaller_where_activations_are_large():
    sizes = [batch_size_for(ViTConfig(patch_size=p, **MODELS["small"])) for p in (8, 2, 1)]
    assert sizes[0] == 500 and sizes[1] * 257 * 1536 <= 2**25 < (sizes[1] + 1) * 257 * 1536
    assert sizes[2] * 1025 * 1536 <= 2**25
    best = ViTConfig(patch_size=2, pooling="mean", **MODELS["small"])
    assert [batch_size_for(best, kind) for kind in ("cpu", "cuda")] == [85, 341]
    assert batch_size_for(ViTConfig(image_size=256, patch_size=1)) == 1
