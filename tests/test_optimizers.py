"""The schedule and Muon against torch's own; which optimizer moves which weight."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from optimizers import Muon, learning_rate_factor, make_optimizers, orthogonalize
from recipes import TrainConfig
from small import generator
from ViT import MODELS, ViT, ViTConfig

MICRO = ViTConfig(**MODELS["micro"])


def settings(model, optimizers, name):
    """A setting of each weight's parameter group, by the name of the weight."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = [(names[id(weight)], group[name]) for group in groups for weight in group["params"]]
    assert len(dict(found)) == len(found)  # each weight is in one group
    return dict(found)


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=90)),
        ("linear", lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=90)),
    ],
)
def test_the_warmup_is_linear_and_the_decay_torchs(schedule, reference):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = reference(optimizer)
    warmup = [learning_rate_factor(step, 100, 10, schedule) for step in range(10)]
    assert warmup == pytest.approx([number / 10 for number in range(1, 11)])
    assert learning_rate_factor(0, 100, 0, schedule) == 1
    for step in range(10, 101):
        factor = learning_rate_factor(step, steps=100, warmup=10, schedule=schedule)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


# ---------------------------------------------------------------------------- Muon


def test_muon_takes_the_steps_of_torchs_with_q_k_and_v_apart():
    """The steps are 0.02 times matrices with entries of about 1/4, in bfloat16."""
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 2  # qkv, proj, fc1, fc2
    draws = generator(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]
    fused = [weight for weight in ours if weight.shape == (48, 16)]
    single = [weight for weight in ours if weight.shape != (48, 16)]

    def apart(weight):
        return weight.chunk(3 if weight.shape == (48, 16) else 1)

    torchs = [torch.nn.Parameter(part.detach().clone()) for w in ours for part in apart(w)]
    optimizer = Muon([{"params": fused, "parts": 3}, {"params": single}], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        for weight in ours:
            weight.grad = torch.randn(weight.shape, generator=draws)
        for part, grad in zip(torchs, (g for w in ours for g in apart(w.grad)), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        reference.step()
    parts = [part for weight in ours for part in apart(weight)]
    torch.testing.assert_close(parts, torchs, rtol=0, atol=3e-4)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalizing_keeps_singular_vectors_and_brings_their_values_near_1(shape, dtype):
    random = torch.randn(5, *shape, generator=generator(0)).double()
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    matrices = (U @ torch.diag(torch.linspace(0.1, 2, 16).double()) @ Vh).to(dtype)
    left = U.mT @ orthogonalize(matrices).double() @ Vh.mT  # diagonal: the new values
    values = left.diagonal(dim1=1, dim2=2)
    assert 0.6 < values.min() and values.max() < 1.3
    off_diagonal = left - torch.diag_embed(values)
    assert off_diagonal.abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


# ---------------------------------------------------------------------------- the model's


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_takes_all_matrices_but_the_heads_and_those_of_q_k_and_v_apart(precision):
    model = ViT(MICRO)
    _, muon = make_optimizers(model, TrainConfig(optimizer="muon"), precision)
    assert muon.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    taken = settings(model, [muon], "parts")
    kinds = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    blocks = {f"blocks.{i}.{kind}.weight": n for i in range(4) for kind, n in kinds.items()}
    assert taken == {"embed.proj.weight": 1} | blocks


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_a_weight_has_the_decay_of_its_kind_and_the_rate_of_its_layer(optimizer, layer_decay):
    """The head and the last norm have the full rate, the embedding decay^(L + 1) of it."""
    model = ViT(MICRO)  # L = 4
    settled = {"learning_rate": 1.0, "layer_decay": layer_decay, "weight_decay": 0.3}
    config = TrainConfig(optimizer=optimizer, **settled)
    optimizers = make_optimizers(model, config, "bf16")
    decays, rates = (settings(model, optimizers, key) for key in ("weight_decay", "peak_lr"))
    for name, weight in model.named_parameters():
        free = (
            name.endswith("bias") or "norm" in name or name.startswith(("embed.cls", "embed.pos"))
        )
        assert decays[name] == (0 if free else 0.3), name
        part, number = [*name.split("."), "0"][:2]
        exponent = {"embed": 5, "blocks": 4 - int(number) if number.isdigit() else 0}.get(part, 0)
        fast = optimizer == "muon" and part != "head" and weight.ndim == 2
        full = config.muon_learning_rate if fast else 1.0
        assert rates[name] == pytest.approx(full * layer_decay**exponent), name
