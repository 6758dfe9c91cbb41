"""The logits of a split, and how good they are; the trainer and the pictures use it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Preprocessing, Split
from device import autocast
from distributed import ALONE, World
from ViT import ViT, ViTConfig

LARGEST_ACTIVATION = 2**25  # numbers, of a batch in evaluation; 128 MiB in float32


class Evaluation(NamedTuple):
    """How good a model's logits are; accuracies from 0 to 1."""

    loss: float  # cross-entropy in nats
    top1: float
    top5: float
    of_class: list[float]  # top-1 within each class; nan where a class has no images


def batch_size_for(config: ViTConfig) -> int:
    """Images per batch, at most 500, so that no activation is too large for memory."""
    return min(
        500, max(1, LARGEST_ACTIVATION // (config.tokens * max(config.hidden, config.width)))
    )


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
    batches = split.batches(rows.split(batch_size_for(model.config)))
    with autocast(precision, split.labels.device):
        logits = [model(preprocessing.normalize(batch.images)) for batch in batches]
    return torch.cat(logits).to(torch.get_default_dtype())


def evaluate(
    model: ViT,
    split: Split,
    preprocessing: Preprocessing,
    world: World = ALONE,
    precision: str = "fp32",
) -> Evaluation:
    """Evaluates a model on a split; each rank does its share of the images, each image once."""
    rows = world.share(torch.arange(len(split), device=split.labels.device))
    logits, labels = (
        predict(model, split, preprocessing, rows, precision).cpu(),
        split.labels[rows].cpu(),
    )
    best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
    hits = (best == labels[:, None]).double()  # (n, 5)
    classes = F.one_hot(labels, logits.shape[1]).double()  # (n, K)
    summed = world.sum(F.cross_entropy(logits.double(), labels, reduction="sum"))
    found = world.sum(hits.sum(dim=0))  # (5,): as the first answer, as the second, ...
    hits_of_class = world.sum(hits[:, 0] @ classes)  # (K,)
    images_of_class = world.sum(classes.sum(dim=0))
    return Evaluation(
        loss=summed.item() / len(split),
        top1=found[0].item() / len(split),
        top5=found.sum().item() / len(split),
        of_class=(hits_of_class / images_of_class).tolist(),
    )
