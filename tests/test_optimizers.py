"""The schedule against torch's schedulers, Muon against torch's Muon, which moves which weight."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from optimizers import Muon, learning_rate_factor, make_optimizers, orthogonalize
from recipes import TrainConfig
from ViT import MODELS, ViT, ViTConfig

MICRO = ViTConfig(**MODELS["micro"])


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=90)),
        ("linear", lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=90)),
    ],
)
def test_the_decay_is_torchs(schedule, reference):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = reference(optimizer)
    for step in range(10, 101):
        factor = learning_rate_factor(step, steps=100, warmup=10, schedule=schedule)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_schedule_has_the_stated_end_points():
    factors = [learning_rate_factor(step, 100, 10, "cosine") for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(0, 100, 0, "linear") == 1


# ---------------------------------------------------------------------------- Muon


def test_muon_takes_the_steps_of_torchs_with_q_k_and_v_apart():
    """The steps are 0.02 times matrices with entries of about 1/4, in bfloat16."""
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 2  # qkv, proj, fc1, fc2
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    fused = [weight for weight in ours if weight.shape == (48, 16)]
    single = [weight for weight in ours if weight.shape != (48, 16)]

    def apart(weight):
        return weight.chunk(3 if weight.shape == (48, 16) else 1)

    torchs = [torch.nn.Parameter(part.detach().clone()) for w in ours for part in apart(w)]
    optimizer = Muon([{"params": fused, "parts": 3}, {"params": single}], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        for weight in ours:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for part, grad in zip(torchs, (g for w in ours for g in apart(w.grad)), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        reference.step()
    parts = [part for weight in ours for part in apart(weight)]
    for part, expected in zip(parts, torchs, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalizing_keeps_singular_vectors_and_brings_their_values_near_1(shape, dtype):
    random = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).double()
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    matrices = (U @ torch.diag(torch.linspace(0.1, 2, 16).double()) @ Vh).to(dtype)
    left = U.mT @ orthogonalize(matrices).double() @ Vh.mT  # diagonal: the new values
    values = left.diagonal(dim1=1, dim2=2)
    assert 0.6 < values.min() and values.max() < 1.3
    off_diagonal = left - torch.diag_embed(values)
    assert off_diagonal.abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


# ---------------------------------------------------------------------------- the model's


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_every_parameter_is_in_exactly_one_group_with_the_decay_of_its_kind(optimizer):
    model = ViT(MICRO)
    config = TrainConfig(optimizer=optimizer, weight_decay=0.3)
    optimizers = make_optimizers(model, config, "bf16")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay_of = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        free = (
            name.endswith("bias") or "norm" in name or name.startswith(("embed.cls", "embed.pos"))
        )
        assert decay_of[id(weight)] == (0 if free else 0.3), name


def test_muon_takes_all_matrices_but_the_heads_and_those_of_q_k_and_v_apart():
    model = ViT(MICRO)
    _, muon = make_optimizers(model, TrainConfig(optimizer="muon"), "bf16")
    parts = {id(w): group["parts"] for group in muon.param_groups for w in group["params"]}
    taken = {name: parts[id(w)] for name, w in model.named_parameters() if id(w) in parts}
    kinds = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    blocks = {f"blocks.{i}.{kind}.weight": n for i in range(4) for kind, n in kinds.items()}
    assert taken == {"embed.proj.weight": 1} | blocks


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_muon_computes_in_the_runs_precision(precision, dtype):
    _, muon = make_optimizers(ViT(MICRO), TrainConfig(optimizer="muon"), precision)
    assert muon.dtype == dtype


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_the_rate_of_a_layer_is_the_next_one_s_times_the_decay(optimizer):
    """The head and the last norm have the full rate, the embedding that times decay^(L + 1)."""
    model = ViT(MICRO)  # L = 4
    config = TrainConfig(optimizer=optimizer, learning_rate=1.0, layer_decay=0.5)
    optimizers = make_optimizers(model, config, "bf16")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate_of = {id(w): group["peak_lr"] for group in groups for w in group["params"]}
    for name, weight in model.named_parameters():
        part, number = [*name.split("."), "0"][:2]
        exponent = {"embed": 5, "blocks": 4 - int(number) if number.isdigit() else 0}.get(part, 0)
        fast = optimizer == "muon" and part != "head" and weight.ndim == 2
        full = config.muon_learning_rate if fast else 1.0
        assert rate_of[id(weight)] == pytest.approx(full * 0.5**exponent), name


def test_what_is_frozen_is_in_no_group():
    model = ViT(MICRO)
    for part in (model.embed, model.blocks):
        part.requires_grad_(False)
    optimizers = make_optimizers(model, TrainConfig(optimizer="muon"), "bf16")
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW"]
    (optimizer,) = optimizers
    found = {id(w) for group in optimizer.param_groups for w in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in found}
    assert names and not any(name.startswith(("embed.", "blocks.")) for name in names)
