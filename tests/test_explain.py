"""The math of the figures against matrices worked out by hand, and against known truths."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import explain
import shapes
from data import Preprocessing
from optimizers import learning_rate_factor, make_optimizers
from recipes import TrainConfig
from run import State
from ViT import ViT, ViTConfig, patchify

A1, A2 = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])


def small_vit(pooling="class", **options) -> ViT:
    torch.manual_seed(0)
    size = {"image_size": (16, 24), "patch_size": 8, "width": 16, "depth": 3, "heads": 2} | options
    model = ViT(ViTConfig(**size, classes=5, pooling=pooling)).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


# ---------------------------------------------------------------------------- a recorded model


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_a_record_has_the_models_logits_and_every_blocks_tokens_and_attention(pooling, kind):
    model = small_vit(pooling, attention=kind)
    images = torch.randn(3, 3, 16, 24)
    record = explain.record(model, images)
    tokens = [model.embed(images)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    torch.testing.assert_close(record.tokens, tokens)
    torch.testing.assert_close(record.logits, model(images))
    lens = explain.logit_lens(model, record.tokens)
    torch.testing.assert_close(lens[-1], record.logits.softmax(dim=1))
    assert not torch.allclose(lens[0], lens[-1], atol=1e-3)
    T = model.config.tokens
    assert [A.shape for A in record.attention] == [(3, 2, T, T)] * 3
    # Nothing of the recording is left in the model.
    assert {block.attn.implementation for block in model.blocks} == {kind}
    # Dropout must not show in the attention, or it would show in the figures.
    for A in explain.record(small_vit(pooling, attention_dropout=0.5).train(), images).attention:
        assert A.min() > 0
        torch.testing.assert_close(A.sum(-1), torch.ones(3, 2, T))


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_attention_gradients_are_what_a_small_change_of_each_images_attention_does(pooling):
    model = small_vit(pooling).double()
    images, targets = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.tensor([4, 1])
    attention, gradients = explain.attention_gradients(model, images, targets)
    for block, A, gradient in zip(model.blocks, attention, gradients, strict=True):
        direction, logits = torch.randn_like(A), []
        for step in (1e-5 * direction, -1e-5 * direction):
            with block.attn.softmax.register_forward_hook(lambda *call, step=step: call[-1] + step):
                logits.append(model(images)[[0, 1], targets])
        slope = (logits[0] - logits[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=0, atol=1e-7)


# ---------------------------------------------------------------------------- rollout, relevance


HEADS = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])  # A1 is their mean
G1, G2 = torch.tensor([[1.0, -1.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
G = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
CLASS = ViTConfig(image_size=8, patch_size=4)  # 5 tokens, or 4 with mean pooling
MEAN = dataclasses.replace(CLASS, pooling="mean")
P = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])  # probabilities
M4, M5 = torch.arange(16.0).reshape(4, 4), torch.arange(25.0).reshape(5, 5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (explain.rollout([HEADS, A2[None]]), [[0.375, 0.625], [0.375, 0.625]]),
        (explain.rollout([torch.eye(2)[None]] * 2), [[1, 0], [0, 1]]),
        (explain.relevance([A1[None], A2[None]], [G1[None], G2[None]]), [[1.5, 2], [0, 2]]),
        # Each head is clamped before the mean.
        (explain.relevance([torch.stack([A1, A1])], [torch.stack([G, -G])]), [[1, 0.25], [0, 1]]),
        (explain.map_of(M5, CLASS), [[1, 2], [3, 4]]),  # the class token's
        (explain.map_of(M4, MEAN), [[6, 7], [8, 9]]),
        (explain.map_of(M5, CLASS, (1, 0)), [[16, 17], [18, 19]]),
        (explain.map_of(M4, MEAN, (1, 0)), [[8, 9], [10, 11]]),
        (explain.relative_to_uniform(torch.tensor([[1.0, 3.0]])), [[0.5, 1.5]]),
        (explain.relative_to_uniform(torch.zeros(1, 2)), [[0, 0]]),
        (explain.area(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])), [1, 0.5]),
        (explain.attention_entropy(torch.full((2, 9, 9), 1 / 9)), [1, 1]),
        (explain.attention_entropy(torch.eye(9)[None]), [0]),
        (explain.attention_entropy(torch.tensor([[[0.5, 0.5, 0, 0]] * 4])), [0.5]),
        (explain.attention_distance(torch.eye(6)[None], (2, 3), 8), [0]),
        (explain.confusion_matrix(*torch.tensor([[0, 0, 1], [0, 1, 1]]), 2), [[1, 1], [0, 1]]),
        (explain.confident_mistakes(P, torch.tensor([0] * 4), 2), [2, 3]),
        (explain.confident_mistakes(P, torch.tensor([0] * 4), 9), [2, 3, 1]),
    ],
)
def test_by_hand(found, expected):
    torch.testing.assert_close(found, found.new_tensor(expected))


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_explanations_are_maps_of_mean_one_and_two_of_them_depend_on_the_class(pooling):
    model = small_vit(pooling)
    images = torch.randn(3, 16, 24).expand(2, 3, 16, 24)
    maps = explain.explanations(model, images, torch.tensor([0, 3]))
    for values in maps.values():
        assert values.shape == (2, 2, 3) and values.min() >= 0
        torch.testing.assert_close(values.mean(dim=(1, 2)), torch.ones(2))
    for method in ("attention", "rollout"):
        torch.testing.assert_close(maps[method][0], maps[method][1])
    for method in ("relevance", "LeGrad"):
        assert not torch.allclose(maps[method][0], maps[method][1], atol=1e-3)


# ---------------------------------------------------------------------------- class-specific


CELL, CELLS = 16, (2, 3)  # pixels of a cell, which is a patch; cells down and across


def draw_cells(classes: list[str], count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (n, 3, S, S) uint8 with shapes of some classes, their labels, and bare textures."""
    numbers = torch.tensor([list(shapes.SHAPES).index(name) for name in classes])
    images, labels, _ = shapes.draw_shapes(count * len(shapes.SHAPES) // len(classes), seed, CELL)
    chosen = torch.isin(labels, numbers)
    labels = (labels[chosen][:, None] == numbers).int().argmax(dim=1)
    textures = shapes._textures(count, CELL, torch.Generator().manual_seed(seed + 1))
    return images[chosen], labels, (textures * 255).byte()


def compose(cells: tuple[Tensor, Tensor, Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 32, 48) with shapes in the cells `present` (B, 6) and textures elsewhere.

    Also the label (B, 6) of each cell, -1 without a shape.
    """
    images, labels, textures = cells
    rows = torch.randint(len(labels), present.shape)
    bare = textures[torch.randint(len(textures), present.shape)]
    content = torch.where(present[..., None, None, None], images[rows], bare)
    content = content.flatten(2).mT.contiguous()  # (B, C S S, 6), as F.fold takes them
    size = (CELL * CELLS[0], CELL * CELLS[1])
    pictures = F.fold(content.float(), size, kernel_size=CELL, stride=CELL).byte()
    return pictures, labels[rows].masked_fill(~present, -1)


def presence(labels: Tensor, classes: int) -> Tensor:
    """(B, K): whether a class is anywhere in a picture."""
    return (labels[..., None] == torch.arange(classes)).any(dim=1).float()


def test_relevance_points_at_the_object_of_its_class_and_rollout_cannot():
    """A model trained to say which shapes a picture has must show where two of them are.

    The pointing game (Zhang et al., arXiv 1608.00507): a map scores if its maximum is the patch
    with the object.
    """
    torch.manual_seed(0)
    classes = ["ring", "square", "bar"]
    normalize = Preprocessing(size=(32, 48), mean=(0.31,) * 3, std=(0.247,) * 3).normalize
    size = {"image_size": (32, 48), "patch_size": CELL, "width": 64, "depth": 2, "heads": 4}
    model = ViT(ViTConfig(**size, classes=3, positions="sincos"))
    optimizers = make_optimizers(model, TrainConfig(optimizer="muon", learning_rate=3e-3), "fp32")
    cells = draw_cells(classes, 4000, seed=0)
    for step in range(500):
        pictures, labels = compose(cells, present=torch.rand(50, 6) < 0.3)
        State(model, optimizers, None).set_learning_rates(
            learning_rate_factor(step, 500, 50, "linear")
        )
        logits = model(normalize(pictures))
        F.binary_cross_entropy_with_logits(logits, presence(labels, 3)).mul(3).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    two = torch.rand(400, 6).argsort(dim=1) < 2
    pictures, labels = compose(draw_cells(classes, 1000, seed=2), two)
    differ = presence(labels, 3).sum(dim=1) == 2
    hits = {"relevance": 0, "rollout": 0}
    tasks = list(zip(pictures[differ], labels[differ], strict=True))[:100]
    for picture, cell_labels in tasks:
        places = (cell_labels >= 0).nonzero()[:, 0].tolist()
        images = normalize(picture[None].expand(len(places), *picture.shape))
        maps = explain.explanations(model, images, cell_labels[places])
        for method in hits:
            hits[method] += maps[method].flatten(1).argmax(dim=1).tolist() == places
    assert len(tasks) == 100
    assert hits["relevance"] >= 90, hits
    assert hits["rollout"] == 0, hits  # one map cannot have its maximum in two places


# ---------------------------------------------------------------------------- evidence


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_legrad_of_a_block_ignores_the_later_ones(pooling):
    model = small_vit(pooling).double()
    images, targets = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.tensor([2, 0])
    total = torch.zeros(2, 6, dtype=torch.float64)
    for depth in (1, 2, 3):
        shorter = copy.deepcopy(model)
        shorter.blocks = shorter.blocks[:depth]
        logits, attention, _ = explain.record(shorter, images)
        (gradient,) = torch.autograd.grad(logits[[0, 1], targets].sum(), attention[-1])
        total += gradient.clamp(min=0).mean(dim=(1, 2))[:, -6:]  # over the heads and queries
    torch.testing.assert_close(explain.legrad(model, images, targets), total)


def test_gradient_times_input_of_a_linear_model_is_each_patch_s_share():
    def linear(images):
        return torch.stack([images.flatten(1) @ weights, images.sum(dim=(1, 2, 3))], dim=1)

    linear.config = ViTConfig(image_size=(16, 24), patch_size=8)
    weights, images = torch.randn(3 * 16 * 24), torch.randn(2, 3, 16, 24)
    shares = explain.gradient_times_input(linear, images, torch.tensor([0, 1]))
    assert shares.shape == (2, 6)
    torch.testing.assert_close(shares[0].sum(), images[0].flatten() @ weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shares[1], patchify(images[1:], 8)[0].sum(dim=1))


class OnePatch(torch.nn.Module):
    """Predicts class 1 if one of the image's tokens is the marked patch, else class 0."""

    def __init__(self):
        super().__init__()
        self.config = ViTConfig(image_size=(16, 16), patch_size=4, pooling="mean", width=48)
        self.embed, self.blocks, self.norm = lambda x: patchify(x, 4), [], torch.nn.Identity()

    def pool(self, z):
        return z.amax(dim=1)

    def head(self, features):
        return torch.stack([0.5 - features[:, 0], features[:, 0]], dim=1) * 100

    def forward(self, images, kept=None):
        z = self.embed(images)
        return self.head(self.pool(z if kept is None else z.take_along_dim(kept[:, :, None], 1)))


@pytest.mark.parametrize("fill", [None, torch.zeros(3, 1, 1)])
def test_the_one_patch_that_matters_moves_the_curves_where_it_goes(fill):
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 4:8, 8:12] = 1  # patch 6 of 16
    model, targets = OnePatch(), torch.tensor([1])
    others = [patch for patch in range(16) if patch != 6]
    for place, expected in ((0, [1, 1, 1, 1]), (7, [0, 1, 1, 1]), (15, [0, 0, 0, 1])):
        order = torch.tensor([[*others[:place], 6, *others[place:]]])
        kept, hits = explain.kept_probabilities(model, images, targets, order, 4, fill)
        assert kept[0].round().tolist() == hits[0].tolist() == expected


@pytest.mark.parametrize("pooling", ["class", "mean"])
@pytest.mark.parametrize("fill", [None, torch.zeros(3, 1, 1)])
def test_with_every_patch_left_the_curves_are_the_model(pooling, fill):
    model, images = small_vit(pooling), torch.randn(4, 3, 16, 24)
    order = torch.rand(4, 6).argsort(dim=1)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(explain.logits_of_kept(model, images, order, fill), expected)
    targets = expected.argmax(dim=1)
    kept, hits = explain.kept_probabilities(model, images, targets, order, 3, fill)
    torch.testing.assert_close(kept[:, -1], expected.softmax(dim=1).amax(dim=1))
    assert hits[:, -1].all() and kept.shape == (4, 3)


def test_a_head_without_projection_is_worth_nothing_and_one_that_decides_is():
    model, images = small_vit("mean"), torch.randn(40, 3, 16, 24)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 8:] = 0  # the second of two heads
        labels = model(images).argmax(dim=1)

        def hits_and_loss():
            logits = model(images)
            return logits.argmax(dim=1) == labels, logits.std().item()

        worth = explain.head_worth(model, hits_and_loss)
        assert worth.pruned[0].all() and not worth.lost[1, 1].any()
        assert worth.lost.shape == (3, 2, 40) and worth.pruned.shape == (7, 40)
        assert worth.lost.max() == 1
        without_attention = copy.deepcopy(model)
        for block in without_attention.blocks:
            block.attn.proj.weight.zero_()
        expected = without_attention(images).argmax(dim=1) == labels
        assert torch.equal(worth.pruned[-1], expected)
        assert hits_and_loss()[0].all()  # the model is as before


def test_a_bootstrap_interval_is_that_of_a_normal_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    mean, deviation = values.mean().item(), values.std().item() / 20  # of the mean
    expected = mean - 1.96 * deviation, mean + 1.96 * deviation
    assert explain.bootstrap_interval(values) == pytest.approx(expected, abs=0.2 * deviation)


# ---------------------------------------------------------------------------- components


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    scales = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    mixed = torch.randn(6, 6, dtype=torch.float64)
    vectors = torch.randn(400, 6, dtype=torch.float64) * scales @ mixed + 7
    axes, projections, singular_values = explain.principal_components(vectors, 3)
    variances, expected = torch.linalg.eigh(vectors.T.cov())  # smallest first
    torch.testing.assert_close((axes @ expected.flip(1)).abs(), torch.eye(3, 6).double())
    torch.testing.assert_close(singular_values**2 / 399, variances.flip(0))
    torch.testing.assert_close(projections.var(dim=0), variances.flip(0)[:3])
    assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_filters_are_28_or_what_there_is_with_pixels_where_patchify_takes_them():
    for shape, count in (((64, 48), 28), ((64, 12), 12), ((8, 48), 8)):
        assert len(explain.embedding_filters(torch.randn(shape), channels=3)[0]) == count
    picture = torch.zeros(1, 3, 4, 4)
    picture[0, 1, 2, 3] = 1
    weight = torch.zeros(2, 48)
    weight[0] = patchify(picture, 4)[0, 0]  # a filter that reads this one pixel
    components, _ = explain.embedding_filters(weight, channels=3, count=1)
    torch.testing.assert_close(components[0].float(), picture[0])


def test_position_similarity_is_the_cosine_without_the_class_token():
    positions = torch.randn(7, 12)
    similarity = explain.position_similarity(positions, (2, 3))
    expected = F.cosine_similarity(positions[1 + 4], positions[1 + 2], dim=0)
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[1, 1, 0, 2].item() == pytest.approx(expected.item(), abs=1e-6)
    assert similarity[0, 2, 0, 2].item() == pytest.approx(1)


def test_tokens_that_differ_along_one_axis_get_colors_along_it():
    steps = torch.linspace(0, 1, 50)
    patches = torch.zeros(2, 25, 5)
    patches[..., 3] = steps.reshape(2, 25)
    colors = explain.tokens_as_colors(patches)
    assert colors.shape == (2, 25, 3) and colors.min() >= 0 and colors.max() <= 1
    expected = ((steps.double() - 0.02) / 0.96).clamp(0, 1)
    torch.testing.assert_close(colors[..., 0].flatten(), expected, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------- many images


def test_attention_distance_by_hand():
    A = torch.randn(2, 7, 7, dtype=torch.float64).softmax(dim=-1)
    places = list(itertools.product(range(2), range(3)))
    by_hand = [
        np.average([8 * math.dist(a, b) for b in places], weights=row)
        for rows in A[:, 1:, 1:]  # without the class token
        for a, row in zip(places, rows, strict=True)
    ]
    distance = explain.attention_distance(A, (2, 3), 8)
    np.testing.assert_allclose(distance, np.reshape(by_hand, (2, 6)).mean(axis=1))


def test_cka_is_1_under_rotation_and_near_0_for_independent_representations():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(128, 192, generator=generator) for _ in range(2))
    rotation, _ = torch.linalg.qr(torch.randn(192, 192, generator=generator))
    cka = explain.linear_cka([X, 3 * X @ rotation, Y, torch.cat([X, Y], dim=1)])
    torch.testing.assert_close(cka, cka.T)
    torch.testing.assert_close(cka.diag(), torch.ones(4).double())
    assert cka[0, 1].item() == pytest.approx(1, abs=1e-4)
    assert abs(cka[0, 2].item()) < 0.05
    assert cka[0, 3].item() == pytest.approx(0.5**0.5, abs=0.05)  # a half is shared


# ---------------------------------------------------------------------------- predictions


def test_calibration_by_hand():
    sure = torch.full((10,), 0.8)
    assert explain.calibration(sure, torch.arange(10) < 8).error == pytest.approx(0, abs=1e-7)
    assert explain.calibration(sure, torch.arange(10) < 5).error == pytest.approx(0.3)
    confidence = torch.tensor([0.65, 0.65, 1.0, 1.0])
    result = explain.calibration(confidence, torch.tensor([True, False, True, True]))
    assert result.error == pytest.approx(0.5 * 0.15)
    assert result.counts.tolist() == [0] * 9 + [2] + [0] * 4 + [2]  # 0.65 lies in (9/15, 10/15]
    assert result.accuracy[9] == 0.5 and result.confidence[14] == 1 and result.accuracy[0].isnan()
