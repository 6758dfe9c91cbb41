"""Initializations besides the paper's, which is in ViT.py."""

import math

import torch
from torch import Tensor, nn

from data import Preprocessing, Split
from evaluation import features_of
from ViT import ViT, patchify


@torch.no_grad()
def mimetic(model: ViT) -> None:
    """Gives attention weights products like those of trained weights.

    Mimetic initialization (Trockman & Kolter, arXiv 2305.09828): with a random Z of variance
    1/D, each head's W_q W_k^T is the rank-D_h matrix nearest to 0.7 Z + 0.7 I, so that similar
    tokens attend to each other, and W_v W_msa is 0.4 Z - 0.4 I. (These W multiply z from the
    right, as U_qkv and U_msa do; nn.Linear stores them transposed.)
    """
    D, heads = model.config.width, model.config.heads
    identity = torch.eye(D)
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)  # each (D, D), h times D_h rows
        for q_h, k_h in zip(q.chunk(heads), k.chunk(heads), strict=True):  # (D_h, D)
            left, right = _factors(0.7 * torch.randn(D, D) * D**-0.5 + 0.7 * identity)
            q_h.copy_(left.T[: len(q_h)])
            k_h.copy_(right[: len(k_h)])
        left, right = _factors(0.4 * torch.randn(D, D) * D**-0.5 - 0.4 * identity)
        v.copy_(left.T)
        block.attn.proj.weight.copy_(right.T)


@torch.no_grad()
def whiten_patches(model: ViT, split: Split, preprocessing: Preprocessing) -> None:
    """Sets the weights of the patch embedding so that it whitens a split's patches.

    Neighboring pixels are nearly equal, so a few directions hold most of the patches' variance,
    and a random map passes on little else. Here all directions count equally, except those of
    least variance, which are noise. airbench (Jordan, arXiv 2404.00498) does so for its first
    convolution, with copies of opposite sign for the nonlinearity after it; here a random
    rotation into the model's width replaces the copies.
    """
    pixels = math.prod(model.config.image_size)
    count = min(len(split), max(1, 5000 * 32**2 // pixels))  # as many pixels as 5,000 of 32 x 32
    rows = torch.linspace(0, len(split) - 1, count).long()
    images = preprocessing.normalize(split.take(rows.to(split.labels.device)).images).cpu()
    patches = patchify(images, model.config.patch_size).flatten(0, 1)  # (n N, C P P)
    variances, axes = torch.linalg.eigh(patches.T.cov())
    whitening = axes.T / (variances + 0.01).sqrt()[:, None]  # (C P P, C P P)
    rotation = torch.empty_like(model.embed.proj.weight)  # (D, C P P)
    width, inputs = rotation.shape
    # With more outputs than inputs, a rotation alone would make the outputs' variance below 1.
    nn.init.orthogonal_(rotation, gain=max(1, width / inputs) ** 0.5)
    model.embed.proj.weight.copy_(rotation @ whitening)


@torch.no_grad()
def standardize_features(model: ViT, split: Split, preprocessing: Preprocessing) -> None:
    """Rescales the last norm so that the head's inputs are standardized over a split.

    MAE does so for linear probing (He et al., arXiv 2111.06377, A.1), with a batch norm; here
    the last LayerNorm's weights absorb it, so that the model stays a plain ViT. The head is
    rescaled too, which leaves the logits unchanged.
    """
    features = features_of(model, split, preprocessing)  # (n, D)
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    model.norm.weight /= std
    model.norm.bias.sub_(mean).div_(std)
    model.head.bias += model.head.weight @ mean
    model.head.weight *= std


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices with equal singular values whose product is the given one."""
    U, S, Vh = torch.linalg.svd(matrix)  # S descending
    return U * S.sqrt(), S.sqrt()[:, None] * Vh
