"""A split's logits, their metrics, and a table of the metrics."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
from checkpoint import check_fit, load_model
from data import Preprocessing, Split
from device import autocast
from distributed import ALONE, World
from recipes import RunOptions
from utils import UserError, print_result, printable
from ViT import ViT, ViTConfig

LARGEST_ACTIVATION = 2**25  # numbers in an evaluation batch's activation; 128 MiB in float32


class Evaluation(NamedTuple):
    """How good a model's logits are; accuracies from 0 to 1."""

    loss: float  # cross-entropy in nats
    top1: float
    top5: float
    of_class: list[float]  # top-1 within each class, its recall; nan if it has no images
    precision: list[float]  # share of right answers among a class's answers; nan if it has none
    f1: list[float]  # 2 right / (images + answers) of each class; nan if it has neither


def batch_size_for(config: ViTConfig, kind: str = "cpu") -> int:
    """Images per batch, at most 500, so that no activation is too large for a kind of device."""
    H, W = config.image_size
    of_an_image = max(config.channels * H * W, config.tokens * max(config.hidden, config.width))
    largest = LARGEST_ACTIVATION * (4 if kind == "cuda" else 1)  # small batches leave a GPU idle
    return min(500, max(1, largest // of_an_image))


@torch.inference_mode()
def predict(
    model: ViT,
    split: Split,
    preprocessing: Preprocessing,
    rows: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Logits (n, K) of a split, or of some of its rows."""
    model.eval()
    if rows is None:
        rows = torch.arange(len(split), device=split.labels.device)
    batches = split.batches(rows.split(batch_size_for(model.config, rows.device.type)))
    with autocast(precision, split.labels.device):
        logits = [model(preprocessing.normalize(batch.images)) for batch in batches]
    return torch.cat(logits).to(torch.get_default_dtype())


def features_of(model: ViT, split: Split, preprocessing: Preprocessing) -> Tensor:
    """The head's inputs (n, D) for a split."""
    head, model.head = model.head, nn.Identity()
    try:
        return predict(model, split, preprocessing)
    finally:
        model.head = head


def evaluate(
    model: ViT,
    split: Split,
    preprocessing: Preprocessing,
    world: World = ALONE,
    precision: str = "fp32",
) -> Evaluation:
    """Evaluates a model on a split; the ranks share the images, each of which counts once."""
    rows = world.share(torch.arange(len(split), device=split.labels.device))
    logits = torch.empty(0, model.config.classes)  # for a rank without a share
    if len(rows):
        logits = predict(model, split, preprocessing, rows, precision).cpu()
    labels = split.labels[rows].cpu()
    K = logits.shape[1]
    best = logits.topk(min(5, K)).indices  # (n, 5)
    hits = best == labels[:, None]  # (n, 5)
    counted = (labels[hits[:, 0]], labels, best[:, 0])  # right answers, images, answers
    counts = world.sum(torch.stack([each.bincount(minlength=K) for each in counted]))
    right, images, answers = counts.double()  # (K,) each
    summed = world.sum(F.cross_entropy(logits.double(), labels, reduction="sum"))
    found = world.sum(hits.sum(dim=0))  # (5,): right as the first answer, second, ...
    return Evaluation(
        loss=summed.item() / len(split),
        top1=found[0].item() / len(split),
        top5=found.sum().item() / len(split),
        of_class=(right / images).tolist(),
        precision=(right / answers).tolist(),
        f1=(2 * right / (images + answers)).tolist(),
    )


def report(
    path: Path,
    options: RunOptions,
    device: torch.device,
    world: World = ALONE,
    name: str | None = None,
) -> None:
    """--evaluate: prints loss, accuracy and the metrics of each class on a split.

    The split is of the data set that the model was trained on, or of the one called `name`.
    """
    model, checkpoint = load_model(path, device)
    part = {"test": "test", "val": "validation"}[options.split]
    dataset = datasets.load_dataset(
        name or checkpoint.training.dataset,
        checkpoint.preprocessing,
        validation_images=checkpoint.training.validation_images * (part == "validation"),
        device=device,
        data_dir=options.data_dir,
        world=world,
    )
    check_fit(checkpoint, dataset)
    if not (split := getattr(dataset, part)):
        hint = "" if options.split == "val" else "; --split val takes those held out for validation"
        raise UserError(f"{dataset.name} has no {part} images{hint}")
    result = evaluate(model, split, checkpoint.preprocessing, world)
    if world.leads:
        head = f"{path}: {len(split):,} {part} images of {dataset.name}"
        for line in (*dataset.notes, head, *table(result, dataset.classes)):
            print_result(printable(line))


def table(result: Evaluation, classes: Sequence[str]) -> list[str]:
    """The metrics of an evaluation, as lines of text."""
    columns = {"recall": result.of_class, "precision": result.precision, "F1": result.f1}
    means = [statistics.fmean(filter(math.isfinite, column)) for column in columns.values()]
    of_class = zip((f"  {name}" for name in classes), *columns.values(), strict=True)
    width = max(12, *(len(name) + 2 for name in classes))
    lines = [f"{'loss':{width}}{result.loss:8.4f}"]
    lines += [f"{'top-1':{width}}{result.top1:8.2%}", f"{'top-5':{width}}{result.top5:8.2%}"]
    lines.append(" " * width + "".join(f"{name:>11}" for name in columns))
    for name, *shares in (("class mean", *means), *of_class):
        lines.append(f"{name:{width}}" + "".join(f"{share:11.2%}" for share in shares))
    return [line.replace("nan%", "   -") for line in lines]
