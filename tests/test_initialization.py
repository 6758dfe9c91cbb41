"""Initializations besides the paper's: mimetic attention, white patches, standardized features."""

import pytest
import torch

from data import Preprocessing, Split
from evaluation import predict
from initialization import mimetic, standardize_features, whiten_patches
from ViT import ViT, ViTConfig, patchify


def test_mimetic_queries_and_keys_of_each_head_have_a_product_of_its_rank():
    torch.manual_seed(0)
    model = ViT(ViTConfig(width=96, heads=3, depth=2)).requires_grad_(False)
    mimetic(model)
    for block in model.blocks:
        q, k, _ = (part.double() for part in block.attn.qkv.weight.chunk(3))
        for q_h, k_h in zip(q.chunk(3), k.chunk(3), strict=True):
            product = q_h.T @ k_h  # (D, D): best fit of rank D_h to 0.7 Z + 0.7 I
            singular = torch.linalg.svdvals(product)
            assert (singular[32:] < 1e-5).all() and singular[31] > 0.5
            assert product.diagonal().mean() > 10 * product.mean().abs()
            torch.testing.assert_close(q_h.norm(), k_h.norm(), rtol=1e-4, atol=0)


def test_mimetic_products_of_whole_rank_are_exact():
    """With one head nothing is cut off: the same draws give 0.7 Z + 0.7 I and 0.4 Z - 0.4 I."""
    model = ViT(ViTConfig(width=16, heads=1, depth=1)).requires_grad_(False)
    torch.manual_seed(7)
    mimetic(model)
    torch.manual_seed(7)
    similar, contrary = (torch.randn(16, 16) / 4 for _ in range(2))
    q, k, v = model.blocks[0].attn.qkv.weight.chunk(3)
    output = model.blocks[0].attn.proj.weight
    torch.testing.assert_close(q.T @ k, 0.7 * similar + 0.7 * torch.eye(16))
    torch.testing.assert_close(v.T @ output.T, 0.4 * contrary - 0.4 * torch.eye(16))


@pytest.mark.parametrize(("width", "variance"), [(96, 2.0), (48, 1.0), (24, 1.0)])
def test_whitened_patches_have_one_variance_in_every_direction(width, variance):
    """On images whose neighboring pixels are similar, measured by an independent PCA."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(60, 3, 10, 10, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear")
    noise = 60 * torch.rand(60, 3, 40, 40, generator=generator)
    split = Split((195 * smooth + noise).byte(), torch.zeros(60).long())
    preprocessing = Preprocessing(size=(40, 40), mean=(0.5,) * 3, std=(0.05,) * 3)
    model = ViT(ViTConfig(image_size=40, patch_size=4, width=width, heads=1, depth=1))
    whiten_patches(model, split, preprocessing)
    patches = patchify(preprocessing.normalize(split.take(torch.arange(60)).images), 4)
    before = torch.pca_lowrank(patches.flatten(0, 1), 48, niter=9)[1]
    outputs = model.embed.proj(patches).detach().flatten(0, 1)
    after = torch.pca_lowrank(outputs, min(width, 48), niter=9)[1]
    assert before[0] > 5 * before[-1]
    found = after.square() / (len(outputs) - 1)
    torch.testing.assert_close(found, torch.full_like(found, variance), rtol=0.03, atol=0)


def test_standardized_features_leave_the_logits_as_they_are():
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=8, width=8, heads=1, depth=1)).eval()
    torch.nn.init.normal_(model.head.weight)
    split = Split(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.zeros(40).long())
    preprocessing = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.3,) * 3)
    before = predict(model, split, preprocessing)
    standardize_features(model, split, preprocessing)
    torch.testing.assert_close(predict(model, split, preprocessing), before, rtol=0, atol=1e-4)
    model.head = torch.nn.Identity()
    features = predict(model, split, preprocessing)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.std(dim=0), torch.ones(8), rtol=0, atol=1e-4)
