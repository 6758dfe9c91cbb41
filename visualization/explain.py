"""What a Vision Transformer's attention, gradients and tokens say: functions of tensors alone.

    A    attention weights of one block, (..., h, T, T): row i is what token i takes from each token
    z    tokens after one block, (n, T, D), of n images
    N    patches, g_h down times g_w across; T is N + 1 with a class token, which stands first

What `ViT.trace` returns is what these take. Three ways to join the blocks' attention into one map:

    rollout             A of each block, mean over heads, multiplied: where information may flow
    gradient rollout    the same of max(A * dy_c/dA, 0), what raises class c: class-specific
    relevance           the same weights added, block by block, to what is there: class-specific
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ViT import ViT, patchify

# --------------------------------------------------------------------------- from tokens to patches


def classifier_row(M: Tensor, pooling: str) -> Tensor:
    """The row of a token-by-token matrix that the classifier reads, without the class token.

    With a class token that is its row; with mean pooling, which has no such token, it is the mean
    over all rows.

    Args:
        M: (..., T, T).
        pooling: "class" or "mean", of the model's config.

    Returns:
        (..., N)
    """
    return M[..., 0, 1:] if pooling == "class" else M.mean(dim=-2)


def patch_row(M: Tensor, patch: int, pooling: str) -> Tensor:
    """The row of one patch, counted from 0, without the class token: (..., T, T) to (..., N)."""
    first = 1 if pooling == "class" else 0
    return M[..., first + patch, first:]


# -------------------------------------------------------------------------- one image, step by step


class Walk(NamedTuple):
    """What an image is at each step through a model; one block is looked into."""

    patches: Tensor  # (N, C P P) x_p
    embedded: Tensor  # (N, D) x_p E, before the positions
    tokens: list[Tensor]  # L + 1 of (T, D): z_0, ..., z_L
    q: Tensor  # (h, T, D_h) of the block, as k and v
    k: Tensor
    v: Tensor
    scores: Tensor  # (h, T, T) q k^T / sqrt(D_h)
    attention: list[Tensor]  # L of (h, T, T)
    hidden: Tensor  # (T, mlp_ratio D) of the block's MLP, before its GELU
    lens: Tensor  # (L + 1, K) `logit_lens`; the last row is the model's answer


@torch.no_grad()
def walk(model: ViT, image: Tensor, block: int) -> Walk:
    """Follows one image (C, H, W), normalised, and looks into a block, counted from 0."""
    trace, inside = model.trace(image[None]), model.blocks[block]
    patches = patchify(image[None], model.config.patch_size)
    z = trace.tokens[block]
    normed = inside.norm1(z)
    q, k, v = inside.attention.split(normed)
    mixed = z + inside.attention(normed)  # Eq. 2
    return Walk(
        patches=patches[0],
        embedded=model.embed.projection(patches)[0],
        tokens=[each[0] for each in trace.tokens],
        q=q[0],
        k=k[0],
        v=v[0],
        scores=(q @ k.mT)[0] * q.shape[-1] ** -0.5,
        attention=[A[0] for A in trace.attention],
        hidden=inside.mlp.expand(inside.norm2(mixed))[0],
        lens=logit_lens(model, trace.tokens)[:, 0],
    )


# ---------------------------------------------------------------------------- maps of one image


def attention_gradients(
    model: ViT, image: Tensor, targets: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of an image, and for each target class the gradient of its logit by it.

    Args:
        image: (C, H, W), normalised.

    Returns:
        Two lists of L tensors (len(targets), h, T, T): A, and dy_c/dA through all later blocks.
    """
    images = image.expand(len(targets), *image.shape).clone().requires_grad_()
    trace = model.trace(images)
    rows = torch.arange(len(targets), device=image.device)
    logits = trace.logits[rows, torch.tensor(targets, device=image.device)]
    return [A.detach() for A in trace.attention], list(
        torch.autograd.grad(logits.sum(), trace.attention)
    )


def rollout(attention: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928), which does not know of classes.

    The mean over heads is halved with the identity, for the residual path, and the blocks are
    multiplied, the last one leftmost. Rows sum to 1.

    Args:
        attention: L of (..., h, T, T).

    Returns:
        (..., T, T)
    """
    return _product_with_residuals([A.mean(dim=-3) for A in attention])


def gradient_rollout(attention: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Rollout of the attention that raises a class, chosen as in `relevance`.

    What each token takes is made to sum to 1 before the identity comes in, so that, as in
    `rollout` and unlike in `relevance`, the size of the gradients has no part. A token that takes
    nothing of use keeps to itself.
    """
    weights = _helpful(attention, gradients)
    sums = [W.sum(dim=-1, keepdim=True) for W in weights]
    return _product_with_residuals(
        [
            torch.where(total > 0, W / total, _identity_like(W))
            for W, total in zip(weights, sums, strict=True)
        ]
    )


def relevance(attention: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Relevance of every token to every token for one class (Chefer, Gur & Wolf, arXiv 2103.15679).

    R = I, then for every block, first to last, R <- R + E_h[max(A * dy_c/dA, 0)] R (their Eqs. 5-6
    for self-attention). The row of the class token is the explanation.

    Args:
        attention, gradients: L of (..., h, T, T).

    Returns:
        (..., T, T), no entry below 0
    """
    R = _identity_like(attention[0][..., 0, :, :])
    for weights in _helpful(attention, gradients):
        R = R + weights @ R
    return R


def _helpful(attention: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """E_h[max(A * dy_c/dA, 0)]: what each block moves in favour of a class, (..., T, T)."""
    pairs = zip(attention, gradients, strict=True)
    return [(A * gradient).clamp(min=0).mean(dim=-3) for A, gradient in pairs]


def _product_with_residuals(matrices: list[Tensor]) -> Tensor:
    """The product, last matrix leftmost, of (M + I) / 2, rows made to sum to 1."""
    joint = _identity_like(matrices[0])
    for M in matrices:
        M = (M + _identity_like(M)) / 2
        joint = M / M.sum(dim=-1, keepdim=True) @ joint
    return joint


def _identity_like(M: Tensor) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)


def explanations(model: ViT, image: Tensor, targets: list[int]) -> dict[str, Tensor]:
    """Four maps over the patches for each target class, made comparable.

    Args:
        image: (C, H, W), normalised.

    Returns:
        For each method (len(targets), g_h, g_w), times N and divided by its sum, so that 1 is what
        every patch has where all are alike. "attention" is the last block's, mean over heads.
    """
    pooling = model.config.pooling
    A, gradients = attention_gradients(model, image, targets)
    R = relevance(A, gradients)
    matrices = {
        "attention": A[-1].mean(dim=-3),
        "rollout": rollout(A),
        "gradient rollout": gradient_rollout(A, gradients),
        # R began as the identity, which says nothing; a class token's row does not see it anyway.
        "relevance": R - _identity_like(R),
    }
    return {
        name: relative_to_uniform(classifier_row(M, pooling)).unflatten(-1, model.config.grid)
        for name, M in matrices.items()
    }


def relative_to_uniform(row: Tensor) -> Tensor:
    """Non-negative weights (..., N) as multiples of their mean; all 0 where all are 0."""
    mean = row.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, row / mean, torch.zeros_like(row))


@torch.no_grad()
def logit_lens(model: ViT, tokens: list[Tensor]) -> Tensor:
    """The classifier applied to the tokens after each block, as if it were the last.

    Args:
        tokens: L + 1 of (B, T, D), as `ViT.trace` returns them.

    Returns:
        Probabilities (L + 1, B, K); the last are the model's own.
    """
    logits = torch.stack([model.head(model.norm(model.pool(z))) for z in tokens])
    return logits.softmax(dim=-1)


# ---------------------------------------------------------------------------- weights of the model


class Components(NamedTuple):
    """Principal components of n vectors of length p."""

    axes: Tensor  # (k, p), orthonormal; the largest entry of each is positive
    projections: Tensor  # (n, k), of the centred vectors
    singular_values: Tensor  # (min(n, p),), all of them, largest first


def principal_components(vectors: Tensor, count: int) -> Components:
    """Principal components of vectors (n, p) by the SVD of the centred matrix, in float64."""
    centred = vectors.double() - vectors.double().mean(dim=0)
    _, singular_values, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:count]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * largest.sign()
    return Components(axes, centred @ axes.T, singular_values)


def embedding_filters(weight: Tensor, channels: int, count: int = 28) -> tuple[Tensor, Tensor]:
    """Principal components of the patch embedding's filters (the paper's Fig. 7, left).

    Args:
        weight: E, (D, C P P), each row one filter, channel first.

    Returns:
        The first k = min(count, D, C P P) components (k, C, P, P), and all singular values.
    """
    components = principal_components(weight, count)
    P = math.isqrt(weight.shape[1] // channels)
    return components.axes.unflatten(1, (channels, P, P)), components.singular_values


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of the patches' position embeddings (the paper's Fig. 7, centre).

    Args:
        positions: (T, D), the class token's, if there is one, first.

    Returns:
        (g_h, g_w, g_h, g_w): [i, j] is the map of the patch in row i, column j.
    """
    patches = positions[-grid[0] * grid[1] :].double()
    unit = patches / patches.norm(dim=1, keepdim=True)
    return (unit @ unit.T).reshape(*grid, *grid)


# ---------------------------------------------------------------------------- many images


def attention_distance(A: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """How far a patch looks, in pixels: attention-weighted distance of patch centres.

    The paper's Fig. 7, right. The class token is left out and rows are made to sum to 1 again.

    Args:
        A: (..., h, T, T).

    Returns:
        (..., h), the mean over query patches.
    """
    N = grid[0] * grid[1]
    A = A[..., -N:, -N:]
    A = A / A.sum(dim=-1, keepdim=True).clamp(min=1e-12)  # a class token can take all there is
    return (A * patch_distances(grid, patch_size).to(A)).sum(dim=-1).mean(dim=-1)


def patch_distances(grid: tuple[int, int], patch_size: int) -> Tensor:
    """Distances of patch centres in pixels, (N, N)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = patch_size * torch.stack([rows, columns], dim=-1).reshape(-1, 2).double()
    return torch.cdist(centres, centres)


def attention_entropy(A: Tensor) -> Tensor:
    """Entropy of the rows of A over its largest value, ln T: 0 is one token, 1 is all alike.

    Args:
        A: (..., h, T, T), T at least 2.

    Returns:
        (..., h), the mean over query tokens.
    """
    return torch.special.entr(A).sum(dim=-1).mean(dim=-1) / math.log(A.shape[-1])


def tokens_as_colours(patches: Tensor) -> Tensor:
    """Patch tokens (n, N, D), D at least 3, as colours (n, N, 3) from 0 to 1.

    Red, green and blue are the first three principal components of all n N tokens, each scaled so
    that its middle 96% fill the range.
    """
    projections = principal_components(patches.flatten(0, 1), 3).projections
    low, high = projections.quantile(torch.tensor([0.02, 0.98]).to(projections), dim=0)
    colours = ((projections - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.unflatten(0, patches.shape[:2])


def picture_masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, g_h, g_w) smoothed to the pictures' size (bicubic), each stretched to 0 to 1."""
    masks = F.interpolate(maps[:, None], size, mode="bicubic", align_corners=False)[:, 0]
    low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
    return (masks - low) / (high - low).clamp(min=1e-12)


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Centred kernel alignment of two representations of the same n images, by a linear kernel.

    1 where one is a rotation of the other, 0 in expectation where they have nothing in common: with
    the unbiased estimator of HSIC (Song et al., 2012, as in Nguyen et al., arXiv 2010.15327).

    Args:
        X, Y: (n, p) and (n, q), n at least 4.
    """
    return float(layer_similarity([X, Y])[0, 1])


def layer_similarity(layers: list[Tensor]) -> Tensor:
    """`linear_cka` between every two of m representations (n, p) of the same images: (m, m)."""
    kernels = [features.double() @ features.double().T for features in layers]
    shared = torch.stack([torch.stack([_hsic(K, L) for L in kernels]) for K in kernels])
    own = shared.diag().sqrt()
    return shared / (own[:, None] * own)


def _hsic(K: Tensor, L: Tensor) -> Tensor:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels (n, n)."""
    n = len(K)
    K, L = K - K.diag().diag(), L - L.diag().diag()
    total = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * K.sum(dim=0) @ L.sum(dim=0)) / (n * (n - 3))


# ---------------------------------------------------------------------------- predictions


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts (K, K): row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).reshape(
        classes, classes
    )


class Calibration(NamedTuple):
    """Confidence against accuracy, in equal bins of the confidence."""

    accuracy: Tensor  # (bins,), nan where a bin is empty
    confidence: Tensor  # (bins,), the mean, nan where a bin is empty
    counts: Tensor  # (bins,)
    error: float  # ECE, from 0 to 1


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Calibration:
    """Expected calibration error (Guo et al., arXiv 1706.04599).

    ECE is the mean over images of the distance, within each image's bin, between accuracy and mean
    confidence. Bin b holds confidences in (b / bins, (b + 1) / bins].

    Args:
        confidence: (n,) probability of the predicted class.
        correct: (n,) bool.
    """
    confidence = confidence.double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = torch.bincount(bin_of, minlength=bins)
    means = [
        torch.bincount(bin_of, weights=values, minlength=bins) / counts
        for values in (correct.double(), confidence)
    ]
    gaps = (means[0] - means[1]).abs().nan_to_num() * counts
    return Calibration(*means, counts, float(gaps.sum() / len(confidence)))


def confident_mistakes(probabilities: Tensor, labels: Tensor, count: int) -> Tensor:
    """Rows of the wrong predictions with the highest probability, most confident first.

    Args:
        probabilities: (n, K).
    """
    confidence, predictions = probabilities.max(dim=1)
    wrong = (predictions != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
