"""How weights move: the learning-rate schedule, and which optimizer moves which weights."""

import math

import torch

from recipes import TrainConfig
from ViT import ViT


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The learning rate of a step as a share of the highest: linear up, then down to 0.

    Args:
        step: 0 for the first; at `steps`, after the last one, the factor is 0.
        warmup: steps of linear warm-up; the last of them is the first at the full rate.
        schedule: "cosine" or "linear", the way down.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(model: ViT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and beside it Muon for the matrices of the blocks where the config says so.

    Weight decay is for matrices alone: not for biases, norms, the class token and positions. Muon
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes a matrix' update orthogonal.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    use_muon = config.optimizer == "muon"
    hidden = [w for name, w in named if use_muon and name.startswith("blocks.") and w.ndim == 2]
    rest = [w for name, w in named if not any(w is matrix for matrix in hidden)]
    groups = [
        {"params": [w for w in rest if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim != 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)]
    if use_muon:
        optimizers.append(
            torch.optim.Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["highest_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["highest_lr"] * factor
