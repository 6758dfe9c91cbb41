"""The Vision Transformer against PyTorch's attention, torchvision's ViT and formulas by hand."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

import ViT as vit_module
from ViT import (
    MLP,
    MODELS,
    EncoderBlock,
    MultiHeadSelfAttention,
    PatchEmbedding,
    ViT,
    ViTConfig,
    main,
    parameters_of,
    patchify,
    sincos_positions,
)

SCRIPT = Path(__file__).parent.parent / "src" / "ViT.py"
SMALL = {"image_size": 16, "width": 32, "depth": 3, "heads": 4}
PATHS = ["forward", "trace"]
DROPOUTS = ["dropout", "attention_dropout", "drop_path"]
poolings = pytest.mark.parametrize("pooling", ["class", "mean"])


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch):
    """Tests of `forward` are of the fused attention, which a CPU takes for long sequences alone."""
    monkeypatch.setattr(vit_module, "PLAIN_TOKENS", 0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**options):
    return ViTConfig(**SMALL | options)


@torch.no_grad()
def randomise(module):
    """Moves every parameter, so that none sits at the 0 or 1 of its initialisation."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def random_images(config, count=3, **options):
    return torch.randn(count, config.channels, *config.image_size, **options)


def gradients(output, inputs):
    """Of a fixed random sum of the output, so that nothing in it can cancel."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weights.to(output)).sum(), inputs)


def assert_all_close(ours, theirs, tolerance):
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    "options, named",
    [
        ({"width": 100, "heads": 3}, ["width 100", "heads 3"]),
        ({"patch_size": 5}, ["32x32", "patch_size 5"]),
        ({"image_size": (32, 30)}, ["32x30", "patch_size 4"]),
        ({"image_size": (30, 32)}, ["30x32", "patch_size 4"]),
        ({"patch_size": 64}, ["32x32", "patch_size 64"]),
        ({"image_size": 0}, ["image_size", "(0, 0)"]),
        ({"image_size": (32, -4)}, ["image_size", "(32, -4)"]),
        ({"image_size": (32, 32, 3)}, ["image_size", "(32, 32, 3)"]),
        ({"patch_size": 0}, ["patch_size", "0"]),
        ({"channels": 0}, ["channels", "0"]),
        ({"classes": -1}, ["classes", "-1"]),
        ({"width": 0}, ["width", "0"]),
        ({"depth": 0}, ["depth", "0"]),
        ({"heads": -3}, ["heads", "-3"]),
        ({"mlp_ratio": 0.0}, ["mlp_ratio 0.0", "192"]),
        ({"mlp_ratio": -4.0}, ["mlp_ratio -4.0"]),
        ({"mlp_ratio": math.inf}, ["mlp_ratio inf"]),
        *[({name: rate}, [name, str(rate)]) for name in DROPOUTS for rate in (1.0, -0.1)],
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"pooling": "max"}, ["pooling", "'max'", "class", "mean"]),
        ({"positions": "rotary"}, ["positions", "'rotary'", "learned", "sincos"]),
        ({"positions": "sincos", "width": 6}, ["sincos", "6"]),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused_by_the_values_at_fault(options, named):
    with pytest.raises(ValueError) as refusal:
        ViTConfig(**options)
    assert all(part in str(refusal.value) for part in named), refusal.value


def test_a_config_cannot_be_changed_nor_given_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ViTConfig().width = 64
    with pytest.raises(TypeError):
        ViTConfig(32)


@pytest.mark.parametrize(
    "size, pair, grid",
    [(32, (32, 32), (8, 8)), ([32, 48], (32, 48), (8, 12)), ((48, 32), (48, 32), (12, 8))],
)
def test_image_size_is_kept_as_height_and_width(size, pair, grid):
    config = ViTConfig(image_size=size)
    assert config.image_size == pair and config.grid == grid
    assert config == ViTConfig(image_size=pair)
    assert config.tokens == grid[0] * grid[1] + 1
    assert ViTConfig(image_size=size, pooling="mean").tokens == grid[0] * grid[1]


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


def test_patchify_cuts_row_by_row_and_flattens_channel_first():
    red = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    image = torch.stack([red, red + 100])[None]
    assert patchify(image, 2).tolist() == [
        [
            [0, 1, 6, 7, 100, 101, 106, 107],
            [2, 3, 8, 9, 102, 103, 108, 109],
            [4, 5, 10, 11, 104, 105, 110, 111],
        ]
    ]


@pytest.mark.parametrize("shape, patch_size", [((2, 3, 8, 12), 4), ((3, 1, 12, 6), 3)])
def test_patchify_equals_unfold(shape, patch_size):
    images = torch.randn(shape)
    assert torch.equal(
        patchify(images, patch_size), F.unfold(images, patch_size, stride=patch_size).mT
    )


@poolings
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_the_embedding_is_a_strided_convolution_plus_class_token_plus_positions(pooling, positions):
    config = small(image_size=(8, 12), pooling=pooling, positions=positions)
    embed = randomise(PatchEmbedding(config))
    with torch.no_grad():
        embed.positions.normal_()
    images = random_images(config)
    kernels = embed.projection.weight.reshape(32, 3, 4, 4)
    expected = F.conv2d(images, kernels, embed.projection.bias, stride=4).flatten(2).mT
    if pooling == "class":
        expected = torch.cat([embed.class_token.expand(3, 1, 32), expected], dim=1)
    torch.testing.assert_close(embed(images), expected + embed.positions)


@pytest.mark.parametrize("grid, width", [((3, 5), 16), ((4, 2), 8), ((2, 2), 4)])
def test_sincos_positions_follow_their_formula(grid, width):
    positions = sincos_positions(grid, width)
    quarter = width // 4
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            periods = [10_000 ** (i / (quarter - 1)) if quarter > 1 else 1 for i in range(quarter)]
            x, y = ([place / period for period in periods] for place in (column, row))
            expected.append(
                [f(a) for angles in (x, y) for f in (math.sin, math.cos) for a in angles]
            )
    torch.testing.assert_close(positions, torch.tensor(expected), rtol=0, atol=1e-6)


@poolings
def test_sincos_positions_are_fixed_and_the_class_token_has_none(pooling):
    model = ViT(small(pooling=pooling, positions="sincos"))
    positions = model.embed.positions[0]
    if pooling == "class":
        assert not positions[0].any()
    assert torch.equal(positions[-16:], sincos_positions((4, 4), 32)) and len(positions) in (16, 17)
    assert not any("positions" in name for name in model.state_dict())
    assert not any("positions" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_fast_attention_equals_the_written_out_one(dtype, tolerance):
    attention = randomise(MultiHeadSelfAttention(small())).to(dtype)
    z = torch.randn(3, 17, 32, dtype=dtype, requires_grad=True)
    inputs = [z, *attention.parameters()]
    fast, written = attention(z), attention.written_out(z)[0]
    assert fast.std() > 0.1
    assert_all_close([fast], [written], tolerance)
    assert_all_close(gradients(fast, inputs), gradients(written, inputs), tolerance)


def test_on_a_cpu_short_sequences_take_the_plain_products(monkeypatch):
    attention = MultiHeadSelfAttention(small())
    monkeypatch.setattr(vit_module, "PLAIN_TOKENS", 17)
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *rest, **options: calls.append(q.shape[2]) or fused(q, *rest, **options),
    )
    for tokens in (1, 17, 18, 40):
        attention(torch.randn(2, tokens, 32))
    assert calls == [18, 40]


@pytest.mark.parametrize("width, heads", [(32, 4), (48, 3), (16, 1)])
def test_attention_equals_that_of_torch(width, heads):
    ours = randomise(MultiHeadSelfAttention(small(width=width, heads=heads))).double()
    torchs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    torchs.load_state_dict(torch_names(ours))
    z = torch.randn(3, 17, width, dtype=torch.float64)
    expected = torchs(z, z, z, average_attn_weights=False)
    assert_all_close(ours.written_out(z), expected, 1e-10)
    assert_all_close([ours(z)], expected[:1], 1e-10)


def torch_names(attention):
    """The weights of a MultiHeadSelfAttention as nn.MultiheadAttention calls them."""
    return {
        "in_proj_weight": attention.qkv.weight,
        "in_proj_bias": attention.qkv.bias,
        "out_proj.weight": attention.output.weight,
        "out_proj.bias": attention.output.bias,
    }


def test_without_qkv_bias_attention_is_as_with_a_bias_of_zero():
    without = randomise(MultiHeadSelfAttention(small(qkv_bias=False)))
    biased = MultiHeadSelfAttention(small())
    biased.load_state_dict(without.state_dict() | {"qkv.bias": torch.zeros(96)})
    z = torch.randn(3, 17, 32)
    assert torch.equal(without(z), biased(z))


@pytest.mark.parametrize(
    "path", [MultiHeadSelfAttention.forward, lambda a, z: a.written_out(z)[0]], ids=PATHS
)
def test_attention_dropout_leaves_the_expected_output_alone(path):
    attention = randomise(MultiHeadSelfAttention(small(attention_dropout=0.5)))
    z = torch.randn(1, 5, 32)
    with torch.no_grad():
        drawn = path(attention, z.expand(4096, -1, -1))
        expected = attention.eval()(z)[0]
    error = (drawn.mean(0) - expected).abs() / (drawn.std(0) / 4096**0.5)
    assert drawn.std(0).min() > 0.01 and error.max() < 6


# ---------------------------------------------------------------------------- encoder


def test_the_block_equals_torchs_pre_norm_encoder_layer():
    ours = randomise(EncoderBlock(small(mlp_ratio=3.0), drop_path=0.0)).double()
    torchs = nn.TransformerEncoderLayer(
        32, 4, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    weights = prefixed("self_attn", torch_names(ours.attention))
    for name, module in {
        "norm1": ours.norm1,
        "norm2": ours.norm2,
        "linear1": ours.mlp.expand,
        "linear2": ours.mlp.contract,
    }.items():
        weights |= prefixed(name, module.state_dict())
    torchs.load_state_dict(weights)
    z = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    assert_all_close([ours(z), ours.trace(z)[0]], [torchs(z)] * 2, 1e-10)
    assert_all_close(gradients(ours(z), z), gradients(torchs(z), z), 1e-10)


def prefixed(prefix, weights):
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


def test_the_layer_norms_add_the_reference_codes_epsilon():
    block = EncoderBlock(small(), drop_path=0.0)
    z = 1e-3 * torch.randn(3, 17, 32)  # a variance of the size of the epsilon
    expected = (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_all_close([block.norm1(z), block.norm2(z), ViT(small()).norm(z)], [expected] * 3, 1e-5)


@pytest.mark.parametrize("path", [EncoderBlock.forward, lambda b, z: b.trace(z)[0]], ids=PATHS)
def test_drop_path_drops_each_branch_of_each_image_on_its_own(path):
    block = randomise(EncoderBlock(small(), drop_path=0.5))
    z = torch.randn(1, 17, 32)
    with torch.no_grad():
        outcomes = []
        for mixed in (z, z + 2 * block.attention(block.norm1(z))):
            outcomes += [mixed, mixed + 2 * block.mlp(block.norm2(mixed))]
        drawn = path(block, z.expand(64, -1, -1))
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
        "embedding": randomise(PatchEmbedding(config))(random_images(config, 64)),
        "attention": randomise(MultiHeadSelfAttention(config))(z),
        "MLP": randomise(MLP(config))(z),
    }
    for name, output in dropped.items():
        assert 0.45 < (output == 0).float().mean() < 0.55, name
    mlp = randomise(MLP(config))
    mlp.contract = nn.Identity()
    # Were there only one dropout for the two layers, half of the hidden units would be left.
    assert 0.7 < (mlp(z) == 0).float().mean() < 0.8


# ---------------------------------------------------------------------------- the model


def torchvisions(model):
    """torchvision's Vision Transformer with the size and the weights of ours."""
    c = model.config
    theirs = VisionTransformer(
        c.image_size[0],
        c.patch_size,
        c.depth,
        c.heads,
        c.width,
        int(c.width * c.mlp_ratio),
        num_classes=c.classes,
    )
    kernels = model.embed.projection.weight.reshape(c.width, 3, c.patch_size, c.patch_size)
    weights = {
        "class_token": model.embed.class_token,
        "conv_proj.weight": kernels,
        "conv_proj.bias": model.embed.projection.bias,
        "encoder.pos_embedding": model.embed.positions,
        **prefixed("encoder.ln", model.norm.state_dict()),
        **prefixed("heads.head", model.head.state_dict()),
    }
    for i, block in enumerate(model.blocks):
        parts = prefixed("self_attention", torch_names(block.attention))
        parts |= prefixed("ln_1", block.norm1.state_dict())
        parts |= prefixed("ln_2", block.norm2.state_dict())
        parts |= prefixed("mlp.0", block.mlp.expand.state_dict())
        parts |= prefixed("mlp.3", block.mlp.contract.state_dict())
        weights |= prefixed(f"encoder.layers.encoder_layer_{i}", parts)
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "patch_size": 4, "width": 64, "depth": 3, "heads": 4},
        {"image_size": 48, "patch_size": 8, "width": 48, "depth": 2, "heads": 3, "mlp_ratio": 2.5},
    ],
    ids=["32px/4", "48px/8"],
)
def test_the_model_equals_torchvisions(options):
    model = randomise(ViT(ViTConfig(**options)))
    theirs = torchvisions(model)
    images = random_images(model.config).requires_grad_()
    ours, expected = model(images), theirs(images)
    assert expected.std() > 0.1
    assert_all_close([ours], [expected], 1e-5)
    assert_all_close(gradients(ours, images), gradients(expected, images), 1e-5)


@poolings
@pytest.mark.parametrize("image_size", [(16, 16), (32, 48)], ids=str)
def test_trace_gives_forwards_logits_and_every_blocks_attention_and_tokens(pooling, image_size):
    model = randomise(ViT(small(image_size=image_size, pooling=pooling)))
    images = random_images(model.config)
    with torch.no_grad():
        logits, attention, tokens = model.trace(images)
        expected = [model.embed(images)]
        for block in model.blocks:
            expected.append(block(expected[-1]))
        assert_all_close([logits, *tokens], [model(images), *expected], 1e-5)
    T = image_size[0] // 4 * (image_size[1] // 4) + (pooling == "class")
    assert logits.shape == (3, 10) and tokens[0].shape == (3, T, 32)
    assert [A.shape for A in attention] == [(3, 4, T, T)] * 3


@pytest.mark.parametrize("training", [True, False])
def test_traced_attention_is_a_distribution_over_the_tokens(training):
    # Dropout must not show in it, or the pictures would.
    model = randomise(ViT(small(attention_dropout=0.5))).train(training)
    for A in model.trace(random_images(model.config)).attention:
        assert A.min() > 0
        torch.testing.assert_close(A.sum(-1), torch.ones(3, 4, 17))


def test_the_logits_have_gradients_by_every_traced_weight_and_token():
    model = randomise(ViT(small()))
    logits, attention, tokens = model.trace(random_images(model.config))
    for gradient in torch.autograd.grad(logits[:, 0].sum(), attention + tokens):
        assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()


@poolings
def test_the_head_reads_the_normalised_class_token_or_mean_of_the_patches(pooling):
    model = randomise(ViT(small(pooling=pooling)))
    logits, _, tokens = model.trace(random_images(model.config))
    read = tokens[-1][:, 0] if pooling == "class" else tokens[-1].sum(1) / 16
    torch.testing.assert_close(model.pool(tokens[-1]), read)
    y = F.layer_norm(read, (32,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(logits, F.linear(y, model.head.weight, model.head.bias))


@poolings
def test_only_pooling_by_class_has_a_class_token(pooling):
    model = ViT(small(pooling=pooling))
    has_token = pooling == "class"
    assert ("embed.class_token" in model.state_dict()) == has_token
    assert model.embed.positions.shape == (1, 16 + has_token, 32)


@poolings
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_only_the_positions_tell_the_order_of_the_patches(pooling, positions):
    model = randomise(ViT(small(pooling=pooling, positions=positions)))
    images = random_images(model.config)
    patches = F.unfold(images, 4, stride=4)[..., torch.randperm(16)]
    permuted = F.fold(patches, (16, 16), 4, stride=4)
    with torch.no_grad():
        assert (model(images) - model(permuted)).abs().max() > 0.01
        model.embed.positions.zero_()
        assert_all_close([model(images)], [model(permuted)], 1e-5)


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_acts_in_training_and_not_in_evaluation(name):
    plain = randomise(ViT(small()))
    model = ViT(small(**{name: 0.5}))
    model.load_state_dict(plain.state_dict())
    images = random_images(model.config, 8)
    for path in (model, lambda images: model.trace(images).logits):
        model.train()
        assert not torch.allclose(path(images), path(images), atol=1e-3)
        model.eval()
        torch.testing.assert_close(path(images), plain(images))


@poolings
def test_dropped_patches_are_another_random_share_in_each_image(pooling):
    embed = ViT(small(pooling=pooling)).embed  # which sets its positions
    embed.patch_dropout = 0.75
    images = random_images(small(), 400)
    with torch.no_grad():
        whole, part = embed.eval()(images), embed.train()(images)
    first = int(pooling == "class")
    assert part.shape == (400, first + 4, 32)
    assert_all_close([part[:, :first]], [whole[:, :first]], 1e-6)
    apart = (part[:, first:, None] - whole[:, None, first:]).abs()
    same = apart.amax(dim=-1) < 1e-5  # (B, kept, N)
    assert (same.sum(dim=2) == 1).all() and same.sum(dim=1).max() == 1  # each once
    counts = same.sum(dim=(0, 1))  # each of 16 patches is kept in a quarter of 400 images
    assert 65 < counts.min() and counts.max() < 135  # 4 standard errors


# ---------------------------------------------------------------------------- initialisation


@pytest.fixture
def fresh():
    return ViT(ViTConfig(depth=2)).requires_grad_(False)


def test_the_patch_projection_starts_as_a_truncated_normal_that_keeps_the_variance(fresh):
    weight = fresh.embed.projection.weight
    deviation = 48**-0.5
    assert weight.std() == pytest.approx(deviation, rel=0.03)
    assert weight.mean() == pytest.approx(0, abs=0.05 * deviation)
    # A unit normal cut at 2 has the variance 1 - 4 phi(2) / (2 Phi(2) - 1).
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    cut = 2 * deviation / math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    assert 0.98 * cut < weight.abs().max() <= 1.0001 * cut


def test_every_matrix_of_a_block_starts_xavier_uniform(fresh):
    for block in fresh.blocks:
        linears = [block.attention.output, block.mlp.expand, block.mlp.contract]
        for matrix in [*block.attention.qkv.weight.chunk(3), *(each.weight for each in linears)]:
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.99 * bound < matrix.abs().max() <= bound
            assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_positions_and_mlp_biases_start_small_and_random_and_the_rest_at_zero_or_one(fresh):
    assert fresh.embed.positions.std() == pytest.approx(0.02, rel=0.05)
    random = {"embed.positions"}
    for name, parameter in fresh.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            assert parameter.std() == pytest.approx(1e-6, rel=0.2)
            random.add(name)
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name in ("embed.class_token", "head.weight"):
            assert not parameter.any(), name
    assert len(random) == 5


def test_mimetic_attention_has_the_products_of_the_paper():
    """Each product less its multiple of I is random, with the stated deviation."""
    model = ViT(small(width=96, heads=3)).requires_grad_(False)
    model.mimic_trained_attention()
    for block in model.blocks:
        q, k, v = (part.double() for part in block.attention.qkv.weight.chunk(3))
        output = block.attention.output.weight.double()
        rest = v.T @ output.T + 0.4 * torch.eye(96)
        assert rest.std() == pytest.approx(0.4 * 96**-0.5, rel=0.05)
        assert abs(rest.diagonal().mean()) < 0.02
        for q_h, k_h in zip(q.chunk(3), k.chunk(3), strict=True):
            product = q_h.T @ k_h  # (D, D), the best of rank D_h to a 0.7 Z + 0.7 I
            singular = torch.linalg.svdvals(product)
            assert (singular[32:] < 1e-5).all() and singular[31] > 0.5
            assert product.diagonal().mean() > 10 * product.mean().abs()
            torch.testing.assert_close(q_h.norm(), k_h.norm(), rtol=1e-4, atol=0)


def test_mimetic_products_of_whole_rank_are_exact():
    """With one head nothing is cut off: the same draws give 0.7 Z + 0.7 I."""
    model = ViT(small(width=16, heads=1, depth=1)).requires_grad_(False)
    torch.manual_seed(7)
    model.mimic_trained_attention()
    torch.manual_seed(7)
    similar, contrary = (torch.randn(16, 16) / 4 for _ in range(2))
    q, k, v = model.blocks[0].attention.qkv.weight.chunk(3)
    output = model.blocks[0].attention.output.weight
    torch.testing.assert_close(q.T @ k, 0.7 * similar + 0.7 * torch.eye(16))
    torch.testing.assert_close(v.T @ output.T, 0.4 * contrary - 0.4 * torch.eye(16))


# ---------------------------------------------------------------------------- as a whole


def test_a_tiny_model_memorises_a_batch_of_random_images():
    model = ViT(small(width=64, depth=2))
    images, labels = random_images(model.config, 16), torch.randint(10, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


# 16 patches of 3 x 8 x 8 numbers and a class token, 4 heads of 16, an MLP of 256: by hand.
MICRO_STAGES = """\
stage shape equation parameters
image (1, 3, 32, 32)
patches x_p (1, 16, 192) 1
tokens z_0 (1, 17, 64) 1 13,504
block 1: LN(z) (1, 17, 64) 2 128
q, k, v, each (1, 4, 17, 16) 5 12,480
attention A (1, 4, 17, 17) 6
heads A v (1, 4, 17, 16) 7
MSA, added to z (1, 17, 64) 8, 2 4,160
LN(z') (1, 17, 64) 3 128
GELU in the MLP (1, 17, 256) 3 16,640
MLP, added to z' (1, 17, 64) 3 16,448
blocks 2 to 4 (1, 17, 64) 2-3 149,952
y = LN(pooled z_L) (1, 64) 4 128
logits (1, 7) 455
total"""


def test_the_script_prints_every_stage_and_the_true_total_from_any_folder(tmp_path):
    arguments = ["--model", "micro", "--patch-size", "8", "--classes", "7"]
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    theirs = VisionTransformer(32, 8, 4, 4, 64, 256, num_classes=7)
    expected = f"{MICRO_STAGES} {parameters_of(theirs):,}".splitlines()
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--patch-size", "5"], ["32x32", "patch_size 5"]),
        (["--patch-size", "x"], ["--patch-size", "'x'"]),
        (["--model", "giant"], ["'giant'", "tiny"]),
    ],
    ids=str,
)
def test_the_script_refuses_a_bad_flag_in_one_line(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, error = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert error.startswith("ViT.py: ") and error.count("\n") == 1 and error.endswith("\n")
    assert all(part in error for part in named)


@pytest.mark.parametrize("shape", [(3, 48, 32), (3, 16, 96), (1, 32, 48), (3, 34, 48)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape):
    model = ViT(small(image_size=(32, 48)))
    with pytest.raises(ValueError, match=re.escape(f"{shape}, not (3, 32, 48)")):
        model(torch.zeros(2, *shape))
