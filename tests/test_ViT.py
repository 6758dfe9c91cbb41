"""The Vision Transformer against PyTorch's attention and the ViTs of torchvision and timm."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import benchmark
import ViT as vit_module
from export import state_dict_for
from utils import UserError
from ViT import (
    MLP,
    MODELS,
    EncoderBlock,
    MultiHeadSelfAttention,
    PatchEmbedding,
    ViT,
    ViTConfig,
    parameters_of,
    sincos_positions,
)

poolings = pytest.mark.parametrize("pooling", ["class", "mean"])


@pytest.fixture(autouse=True)
def seeded_and_fused(monkeypatch):
    """Tests of `forward` use fused attention, which a CPU takes only for long sequences."""
    torch.manual_seed(0)
    monkeypatch.setattr(vit_module, "PLAIN_TOKENS", 0)


def small(**options):
    return ViTConfig(**{"image_size": 16, "width": 32, "depth": 3, "heads": 4} | options)


@torch.no_grad()
def randomize(module):
    """Moves every parameter, so that none sits at the 0 or 1 of its initialization."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def random_images(config, count=3):
    return torch.randn(count, config.channels, *config.image_size)


def gradients(output, inputs):
    """Gradients of a randomly weighted sum of the output, in which nothing can cancel."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weights.to(output)).sum(), inputs)


def assert_all_close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    "options, named",
    [
        ({"width": 100, "heads": 3}, ["width 100", "heads 3"]),
        ({"patch_size": 5}, ["32x32", "patch_size 5"]),
        ({"image_size": (32, 30)}, ["32x30", "patch_size 4"]),
        ({"image_size": (30, 32)}, ["30x32", "patch_size 4"]),
        ({"image_size": 0}, ["image_size 0x0"]),
        ({"image_size": (32, -4)}, ["image_size 32x-4"]),
        ({"mlp_ratio": 1e-3}, ["mlp_ratio 0.001", "192"]),
        ({"positions": "sincos", "width": 6}, ["sincos", "6"]),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused_by_the_values_at_fault(options, named):
    with pytest.raises(UserError) as refusal:
        ViTConfig(**options)
    assert all(part in str(refusal.value) for part in named), refusal.value


def test_image_size_is_kept_as_height_and_width():
    assert ViTConfig(image_size=32) == ViTConfig(image_size=(32, 32))
    wide = ViTConfig(image_size=(32, 48))
    assert (wide.image_size, wide.grid, wide.tokens) == ((32, 48), (8, 12), 97)
    assert ViTConfig(image_size=(48, 32), pooling="mean").tokens == 96


@pytest.mark.parametrize(
    "name, patch_size, total",
    [
        ("tiny", 16, 5_717_416),
        ("small", 16, 22_050_664),
        ("base", 16, 86_567_656),
        ("large", 16, 304_326_632),
        ("huge", 14, 632_045_800),
    ],
)
def test_the_named_sizes_have_the_published_numbers_of_parameters(name, patch_size, total):
    config = ViTConfig(image_size=224, patch_size=patch_size, classes=1000, **MODELS[name])
    with torch.device("meta"):
        assert parameters_of(ViT(config)) == total


# ---------------------------------------------------------------------------- patches


@poolings
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_the_embedding_is_a_strided_convolution_plus_class_token_plus_positions(pooling, positions):
    config = small(image_size=(8, 12), pooling=pooling, positions=positions)
    embed = randomize(PatchEmbedding(config))
    with torch.no_grad():
        embed.pos_embed.normal_()
    images = random_images(config)
    kernels = embed.proj.weight.reshape(32, 3, 4, 4)
    expected = F.conv2d(images, kernels, embed.proj.bias, stride=4).flatten(2).mT
    if pooling == "class":
        expected = torch.cat([embed.cls_token.expand(3, 1, 32), expected], dim=1)
    torch.testing.assert_close(embed(images), expected + embed.pos_embed)


@pytest.mark.parametrize("grid, width", [((3, 5), 16), ((4, 2), 8), ((2, 2), 4)])
def test_sincos_positions_follow_their_formula(grid, width):
    row, column = np.indices(grid).reshape(2, -1, 1)
    period = 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    angles = (column / period, row / period)
    expected = np.concatenate([f(each) for each in angles for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(sincos_positions(grid, width), expected, rtol=0, atol=1e-6)


@poolings
def test_sincos_positions_are_fixed_and_the_class_token_has_none(pooling):
    model = ViT(small(pooling=pooling, positions="sincos"))
    positions = model.embed.pos_embed[0]
    if pooling == "class":
        assert not positions[0].any()
    assert torch.equal(positions[-16:], sincos_positions((4, 4), 32)) and len(positions) in (16, 17)
    assert not any("pos_embed" in name for name in model.state_dict())
    assert not any("pos_embed" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_fast_attention_equals_the_written_out_one(dtype, tolerance):
    attention = randomize(MultiHeadSelfAttention(small())).to(dtype)
    z = torch.randn(3, 17, 32, dtype=dtype, requires_grad=True)
    inputs = [z, *attention.parameters()]
    fast = attention(z)
    attention.implementation = "plain"
    written = attention(z)
    assert fast.std() > 0.1
    assert_all_close([fast], [written], tolerance)
    assert_all_close(gradients(fast, inputs), gradients(written, inputs), tolerance)


@pytest.mark.parametrize(
    ("kind", "plain_for"), [("auto", [1, 17]), ("plain", [1, 17, 18, 40]), ("fused", [])]
)
def test_which_attention_is_written_out_on_a_cpu(monkeypatch, kind, plain_for):
    attention = MultiHeadSelfAttention(small(attention=kind))
    monkeypatch.setattr(vit_module, "PLAIN_TOKENS", 17)
    written_out = []
    attention.softmax.register_forward_hook(lambda *call: written_out.append(call[-1].shape[-1]))
    for tokens in (1, 17, 18, 40):
        attention(torch.randn(2, tokens, 32))
    assert written_out == plain_for


@pytest.mark.parametrize("width, heads", [(32, 4), (48, 3), (16, 1)])
def test_attention_equals_that_of_torch(width, heads):
    ours = randomize(MultiHeadSelfAttention(small(width=width, heads=heads))).double()
    torchs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    weights = ours.state_dict().values()  # q, k and v stacked, then the projection, as in torch
    torchs.load_state_dict(dict(zip(torchs.state_dict(), weights, strict=True)))
    z = torch.randn(3, 17, width, dtype=torch.float64)
    expected = torchs(z, z, z, average_attn_weights=False)
    assert_all_close([ours(z)], expected[:1], 1e-10)
    A, ours.implementation = [], "plain"
    ours.softmax.register_forward_hook(lambda *call: A.append(call[-1]))
    assert_all_close([ours(z), *A], expected, 1e-10)


def test_without_qkv_bias_attention_is_as_with_a_bias_of_zero():
    without = randomize(MultiHeadSelfAttention(small(qkv_bias=False)))
    biased = MultiHeadSelfAttention(small())
    biased.load_state_dict(without.state_dict() | {"qkv.bias": torch.zeros(96)})
    z = torch.randn(3, 17, 32)
    assert torch.equal(without(z), biased(z))


# ---------------------------------------------------------------------------- encoder


def test_the_layer_norms_add_the_reference_codes_epsilon():
    block = EncoderBlock(small(), drop_path=0.0)
    z = 1e-3 * torch.randn(3, 17, 32)  # a variance of the size of the epsilon
    expected = (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_all_close([block.norm1(z), block.norm2(z), ViT(small()).norm(z)], [expected] * 3, 1e-5)


def test_drop_path_drops_each_branch_of_each_image_on_its_own():
    block = randomize(EncoderBlock(small(), drop_path=0.5))
    z = torch.randn(1, 17, 32)
    with torch.no_grad():
        outcomes = []
        for mixed in (z, z + 2 * block.attn(block.norm1(z))):
            outcomes += [mixed, mixed + 2 * block.mlp(block.norm2(mixed))]
        drawn = block(z.expand(64, -1, -1))
    matches = [(drawn - outcome).abs().amax((1, 2)) < 1e-4 for outcome in outcomes]
    matches = torch.stack(matches).long()  # (4, 64)
    assert matches.sum(0).eq(1).all() and matches.sum(1).min() > 5


def test_drop_path_rates_rise_linearly_to_the_configs():
    model = ViT(small(depth=5, drop_path=0.2))
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_dropout_follows_the_embedding_the_attention_and_both_layers_of_the_mlp():
    config = small(dropout=0.5)
    z = torch.randn(64, 17, 32)
    dropped = {
        "embedding": randomize(PatchEmbedding(config))(random_images(config, 64)),
        "attention": randomize(MultiHeadSelfAttention(config))(z),
        "MLP": randomize(MLP(config))(z),
    }
    for name, output in dropped.items():
        assert 0.45 < (output == 0).float().mean() < 0.55, name
    mlp = randomize(MLP(config))
    mlp.fc2 = nn.Identity()
    # If there were only one dropout for the two layers, half of the hidden units would be left.
    assert 0.7 < (mlp(z) == 0).float().mean() < 0.8


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "patch_size": 4, "width": 64, "depth": 3, "heads": 4},
        {"image_size": 48, "patch_size": 8, "width": 48, "depth": 2, "heads": 3, "mlp_ratio": 2.5},
    ],
)
def test_the_model_equals_torchvisions(options):
    model = randomize(ViT(ViTConfig(**options)))
    theirs = next(benchmark.of_torchvision(model.config)).model
    content = SimpleNamespace(model=model.config, weights=model.state_dict())
    theirs.load_state_dict(state_dict_for("torchvision", content))
    images = random_images(model.config).requires_grad_()
    ours, expected = model(images), theirs(images)
    assert expected.std() > 0.1
    assert_all_close([ours], [expected], 1e-5)
    assert_all_close(gradients(ours, images), gradients(expected, images), 1e-5)


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "drop_path"])
def test_each_dropout_acts_in_training_and_not_in_evaluation(name, kind):
    without = randomize(ViT(small()))
    model = ViT(small(attention=kind, **{name: 0.5}))
    model.load_state_dict(without.state_dict())
    images = random_images(model.config, 8)
    assert not torch.allclose(model(images), model(images), atol=1e-3)
    torch.testing.assert_close(model.eval()(images), without(images))


@poolings
def test_kept_patches_are_the_tokens_of_these_numbers_and_the_class_token_stays(pooling):
    embed = ViT(small(pooling=pooling)).embed  # which sets its positions
    images, first = random_images(small(), 3), int(pooling == "class")
    kept = torch.tensor([[0, 5, 15, 2], [3, 1, 2, 0], [9, 8, 7, 14]])
    with torch.no_grad():
        whole, part = embed(images), embed(images, kept)
    assert part.shape == (3, first + 4, 32)
    torch.testing.assert_close(part[:, :first], whole[:, :first])
    for row, numbers in enumerate(kept.tolist()):
        expected = torch.stack([whole[row, first + number] for number in numbers])
        torch.testing.assert_close(part[row, first:], expected)


# ---------------------------------------------------------------------------- initialization


@pytest.fixture
def fresh():
    return ViT(ViTConfig(depth=2)).requires_grad_(False)


def test_the_patch_projection_starts_as_a_truncated_normal_that_keeps_the_variance(fresh):
    weight = fresh.embed.proj.weight
    deviation = 48**-0.5
    assert weight.std() == pytest.approx(deviation, rel=0.03)
    assert weight.mean() == pytest.approx(0, abs=0.05 * deviation)
    # A unit normal cut at 2 has the variance 1 - 4 phi(2) / (2 Phi(2) - 1).
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    cut = 2 * deviation / math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    assert 0.98 * cut < weight.abs().max() <= 1.0001 * cut


def test_every_matrix_of_a_block_starts_xavier_uniform(fresh):
    for block in fresh.blocks:
        linears = [block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        for matrix in [*block.attn.qkv.weight.chunk(3), *(each.weight for each in linears)]:
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.99 * bound < matrix.abs().max() <= bound
            assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_positions_and_mlp_biases_start_small_and_random_and_the_rest_at_zero_or_one(fresh):
    assert fresh.embed.pos_embed.std() == pytest.approx(0.02, rel=0.05)
    random = {"embed.pos_embed"}
    for name, parameter in fresh.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            assert parameter.std() == pytest.approx(1e-6, rel=0.2)
            random.add(name)
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name in ("embed.cls_token", "head.weight"):
            assert not parameter.any(), name
    assert len(random) == 5


# ---------------------------------------------------------------------------- as a whole


@pytest.mark.parametrize("shape", [(3, 48, 32), (3, 16, 96), (1, 32, 48), (3, 34, 48)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape):
    model = ViT(small(image_size=(32, 48)))
    with pytest.raises(ValueError, match=re.escape(f"{shape}, not (3, 32, 48)")):
        model(torch.zeros(2, *shape))


def test_recomputed_activations_change_memory_and_not_gradients():
    images = torch.randn(8, 3, 16, 16)

    def gradients_and_saved(recompute):
        torch.manual_seed(0)
        model = randomize(ViT(small(depth=6, checkpoint_activations=recompute))).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            loss = model(images).sum()
        loss.backward()
        return [weight.grad for weight in model.parameters()], sum(sizes)

    plain, kept = gradients_and_saved(False)
    recomputed, few = gradients_and_saved(True)
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))
    assert few < kept / 4
