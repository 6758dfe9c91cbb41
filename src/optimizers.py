"""How weights are updated: the schedule, Muon, and which optimizer updates which weights."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes import TrainConfig
from utils import UserError
from ViT import ViT


def learning_rate_factor(step: float, steps: float, warmup: float, schedule: str) -> float:
    """A step's learning rate as a share of the peak: linear warm-up, then decay to 0.

    The last step of the warm-up is the first at the full rate; the factor would reach 0 at
    `steps`, just after the last one. The `schedule` of the decay is "cosine" or "linear".
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------------------- Muon


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized steps (Jordan et al., kellerjordan.github.io/posts/muon).

    Does what `torch.optim.Muon` does (a test compares them), with two differences: matrices of
    the same shape are iterated as one batch, and a weight may stack several matrices by rows,
    as that of q, k and v does; each of them is orthogonalized separately.

    Args:
        groups: of matrices; a group's `parts` is the number of matrices stacked in each weight.
        weight_decay: decoupled, multiplied by the learning rate.
        momentum: Nesterov's.
        dtype: of the iteration.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(groups, options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        alike = defaultdict(list)  # (shape, rate): pairs of a matrix and its direction
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            momenta = [self._momentum(weight) for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for pair in zip(weights, directions, strict=True):
                for matrix, step in zip(*(x.chunk(group["parts"]) for x in pair), strict=True):
                    alike[matrix.shape, group["lr"]].append((matrix, step))
        for ((rows, columns), rate), pairs in alike.items():
            matrices, directions = zip(*pairs, strict=True)
            steps = orthogonalize(torch.stack(directions).to(self.dtype)).to(matrices[0].dtype)
            scale = max(1, rows / columns) ** 0.5
            torch._foreach_add_(matrices, steps.unbind(), alpha=-rate * scale)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly the orthogonal matrix nearest to each of (B, n, m): singular values 0.7 to 1.2.

    Five steps of the Newton-Schulz iteration with Jordan's coefficients, which quickly bring
    all singular values, except those near 0, close to 1, though not exactly to 1.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT  # (B, n, n), n the shorter side
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X


# ---------------------------------------------------------------------------- for a model


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # each takes parameter groups
    "adamw": partial(torch.optim.AdamW, fused=True),
    "muon": Muon,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


REMEMBERED = {  # the state of each weight, by the optimizer's class
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
    "SGD": ("momentum_buffer",),
}


class Rule(NamedTuple):
    """How to update the weights whose full name matches; the first matching rule wins."""

    pattern: str
    optimizer: str  # of `OPTIMIZERS`
    options: dict[str, Any]  # of the parameter group


def rules(config: TrainConfig) -> list[Rule]:
    """Only matrices have weight decay: not biases, norms, class token and positions."""
    muon = config.optimizer == "muon"
    others = "adamw" if muon else config.optimizer
    decay = {"weight_decay": config.weight_decay}
    of_muon, of_others = {"lr": config.muon_learning_rate} | decay, {"lr": config.learning_rate}
    matrices = r"(embed\.proj|blocks\.\d+\.(attn|mlp)\.\w+)\.weight"
    table = [
        Rule(r"blocks\.\d+\.attn\.qkv\.weight", "muon", of_muon | {"parts": 3}),
        Rule(matrices, "muon", of_muon),
        Rule(rf"{matrices}|head\.weight", others, of_others | decay),
        Rule(r".*", others, of_others | {"weight_decay": 0.0}),
    ]
    return table if muon else table[2:]


def layer_of(name: str, top: int) -> int:
    """A weight's layer, for `layer_decay`: 0 for the embedding, `top` for the head."""
    if name.startswith("embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else top


def make_optimizers(model: ViT, config: TrainConfig, precision: str) -> list[torch.optim.Optimizer]:
    """The optimizers that `rules` name, sorted by name, for all weights that are not frozen.

    A weight has the rate of its rule, times `layer_decay` for each layer above it (BEiT, arXiv
    2106.08254). Muon iterates in float32, or in bfloat16 if that is the precision.
    """
    top = model.config.depth + 1
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = defaultdict(list)  # by the optimizer's name
    for rule in rules(config):
        layers = defaultdict(list)
        for name in [name for name in weights if re.fullmatch(rule.pattern, name)]:
            layer = layer_of(name, top) if config.layer_decay < 1 else top
            layers[layer].append(weights.pop(name))
        for layer in sorted(layers):
            rate = rule.options["lr"] * config.layer_decay ** (top - layer)
            group = rule.options | {"params": layers[layer], "lr": rate, "peak_lr": rate}
            groups[rule.optimizer].append(group)
    in_float32 = {} if precision == "bf16" else {"muon": {"dtype": torch.float32}}
    return [OPTIMIZERS[name](groups[name], **in_float32.get(name, {})) for name in sorted(groups)]


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """Restores the optimizers' state of each parameter; their options stay."""
    if len(states) != len(optimizers):
        raise UserError(f"optimizers has {len(states)} entries, not {len(optimizers)}")
    for optimizer, state in zip(optimizers, states, strict=True):
        kind = type(optimizer).__name__
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        shapes = [
            {name: () if name == "step" else weight.shape for name in REMEMBERED[kind]}
            for weight in weights
        ]
        found = {n: {name: x.shape for name, x in kept.items()} for n, kept in state.items()}
        if found != dict(enumerate(shapes)):
            raise UserError(f"the state of {kind} is not that of {len(weights)} weights")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
