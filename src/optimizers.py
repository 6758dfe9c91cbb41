"""How weights move: the learning-rate schedule, Muon, and which optimizer moves which weights."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

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


# ---------------------------------------------------------------------------- Muon


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al., kellerjordan.github.io/posts/muon).

    Does what `torch.optim.Muon` does, with two differences: matrices of one shape go through the
    iteration as one batch, and a weight may hold several matrices one under the other, as q, k and
    v are, each of which is made orthogonal apart. A step of `cpu` on two Zen 4 cores takes 16 ms,
    torch's with three weights for q, k and v 25 ms (torch 2.14, medians of 15, in turns).

    Args:
        groups: of matrices; a group's `parts` says how many matrices one under the other each of
            its weights is.
        lr: the learning rate.
        weight_decay: decoupled, times the rate.
        momentum: of Nesterov's kind.
        dtype: what the iteration is computed in.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(groups, options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        alike = defaultdict(list)  # (shape, rate): pairs of a matrix and the direction it is to go
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            averages = [self._average(weight) for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, averages, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for weight, direction in zip(weights, directions, strict=True):
                for pair in zip(
                    *(x.chunk(group["parts"]) for x in (weight, direction)), strict=True
                ):
                    alike[pair[0].shape, group["lr"]].append(pair)
        for ((rows, columns), rate), pairs in alike.items():
            matrices, directions = zip(*pairs, strict=True)
            steps = orthogonalise(torch.stack(directions).to(self.dtype)).to(matrices[0].dtype)
            scale = max(1, rows / columns) ** 0.5
            torch._foreach_add_(matrices, steps.unbind(), alpha=-rate * scale)

    def _average(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonalise(matrices: Tensor) -> Tensor:
    """The orthogonal matrix next to each of a batch (B, n, m), up to singular values of 0.7 to 1.2.

    Five steps of the Newton-Schulz iteration with Jordan's coefficients, which move every singular
    value towards 1, quickly rather than closely.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT  # (B, n, n), n the shorter side
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X


# ---------------------------------------------------------------------------- the model's


def make_optimizers(model: ViT, config: TrainConfig, precision: str) -> list[torch.optim.Optimizer]:
    """AdamW, and beside it Muon for the matrices of the blocks where the config says so.

    Weight decay is for matrices alone: not for biases, norms, the class token and positions.

    Args:
        precision: "bf16" or "fp32", of Muon's iteration.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    use_muon = config.optimizer == "muon"
    hidden = {
        name: w for name, w in named if use_muon and name.startswith("blocks.") and w.ndim == 2
    }
    rest = [w for name, w in named if name not in hidden]
    groups = [
        {"params": [w for w in rest if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim != 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    ]
    if use_muon:
        fused = [w for name, w in hidden.items() if name.endswith("qkv.weight")]
        single = [w for name, w in hidden.items() if not name.endswith("qkv.weight")]
        groups = [{"params": fused, "parts": 3}, {"params": single}]
        optimizers.append(
            Muon(
                groups,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            )
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["highest_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["highest_lr"] * factor
