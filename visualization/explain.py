"""The math of the figures: functions from attention weights, gradients and tokens to tensors.

    A    attention weights of one block, (..., h, T, T): row i weights what token i reads
    z    tokens after one block, (n, T, D), of n images
    N    patches, g_h down times g_w across; T is N + 1 with a class token, which stands first

`record` gives A and z of every block. Ways to combine the blocks' attention into one map:

    rollout      product over the blocks of A, mean over heads: where information can flow
    relevance    max(A * dy_c/dA, 0), which raises class c, accumulated block by block
    LeGrad       max(dy_c/dA, 0) of the class score after each block, summed over the blocks

`kept_probabilities` tests how faithful a map is, by removing patches in the map's order.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ViT import ViT, ViTConfig, patchify

# ---------------------------------------------------------------------------- a recorded model


class Record(NamedTuple):
    """What a model computes for a batch of images; the tensors stay in the autograd graph."""

    logits: Tensor  # (B, K)
    attention: list[Tensor]  # L of (B, h, T, T): A of each block, before any dropout
    tokens: list[Tensor]  # L + 1 of (B, T, D): z_0, z_1, ..., z_L


def record(model: ViT, images: Tensor, start: int = 0) -> Record:
    """Runs a model on normalized images (B, C, H, W); hooks record what its parts compute.

    Args:
        start: the first block, counted from 0, whose attention is recorded.
    """
    attention, tokens = [], []
    with ExitStack() as hooks:
        for part in (model.embed, *model.blocks):
            hooks.enter_context(part.register_forward_hook(adds_to(tokens)))
        for attn in (block.attn for block in model.blocks[start:]):
            hooks.enter_context(attn.softmax.register_forward_hook(begins_graph))
            hooks.enter_context(attn.softmax.register_forward_hook(adds_to(attention)))
            hooks.callback(setattr, attn, "implementation", attn.implementation)
            attn.implementation = "plain"  # the fused kernel never holds all of A
        return Record(model(images), attention, tokens)


def adds_to(outputs: list[Tensor]) -> Callable:
    """A forward hook that appends the output of its module to a list."""
    return lambda module, inputs, output: outputs.append(output)


def begins_graph(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    """With frozen weights, starts the autograd graph at the first recorded attention."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


# --------------------------------------------------------------------------- from tokens to patches


def over_heads(M: Tensor, head: int | str) -> Tensor:
    """One head, counted from 1, or the mean, maximum or minimum over the heads; "all" is the mean.

    Args:
        M: (..., h, T, T), or maps.

    Returns:
        (..., T, T)
    """
    if isinstance(head, int):
        return M[..., head - 1, :, :]
    reduce = {"all": torch.mean, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[head]
    return reduce(M, dim=-3)


def map_of(M: Tensor, config: ViTConfig, patch: tuple[int, int] | None = None) -> Tensor:
    """A map over patches: the row of a token-by-token matrix for the classifier or a patch.

    The classifier's row is the class token's or, with mean pooling, which has no class token,
    the mean of all rows. The class token's column is left out.

    Args:
        M: (..., T, T).
        patch: the patch's row and column, counted from 0; None for the classifier.

    Returns:
        (..., g_h, g_w)
    """
    first = config.tokens - config.patches  # 1 with a class token
    if patch:
        row = M[..., first + patch[0] * config.grid[1] + patch[1], :]
    else:
        row = M[..., 0, :] if first else M.mean(dim=-2)
    return row[..., first:].unflatten(-1, config.grid)


# -------------------------------------------------------------------------- one image, step by step


class Walk(NamedTuple):
    """What a model computes for one image, including the inside of one block."""

    patches: Tensor  # (N, C P P) x_p
    embedded: Tensor  # (N, D) x_p E, before the positions
    tokens: Tensor  # (L + 1, T, D): z_0, ..., z_L
    q: Tensor  # (h, T, D_h) of that block, as are k and v
    k: Tensor
    v: Tensor
    scores: Tensor  # (h, T, T) q k^T / sqrt(D_h)
    attention: Tensor  # (L, h, T, T)
    hidden: Tensor  # (T, mlp_ratio D) of the block's MLP, before its GELU
    lens: Tensor  # (L + 1, K) `logit_lens`; the last row is the model's output


@torch.no_grad()
def walk(model: ViT, image: Tensor, block: int) -> Walk:
    """Follows one normalized image (C, H, W) through a model; the block is counted from 0."""
    outputs: list[Tensor] = []
    layers = model.embed.proj, model.blocks[block].attn.qkv, model.blocks[block].mlp.fc1
    with ExitStack() as hooks:
        for layer in layers:  # in the order in which they are called
            hooks.enter_context(layer.register_forward_hook(adds_to(outputs)))
        _, attention, tokens = record(model, image[None])
    embedded, qkv, hidden = (output[0] for output in outputs)
    q, k, v = qkv.unflatten(-1, (3, model.config.heads, -1)).permute(1, 2, 0, 3)  # (h, T, D_h)
    return Walk(
        patches=patchify(image[None], model.config.patch_size)[0],
        embedded=embedded,
        tokens=torch.cat(tokens),
        q=q,
        k=k,
        v=v,
        scores=q @ k.mT * q.shape[-1] ** -0.5,
        attention=torch.cat(attention),
        hidden=hidden,
        lens=logit_lens(model, tokens)[:, 0],
    )


# ---------------------------------------------------------------------------- maps of one image


def attention_gradients(
    model: ViT, images: Tensor, targets: Tensor, start: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of images, and the gradient of a class's logit with respect to it.

    Args:
        images: (B, C, H, W), normalized.
        targets: (B,), the class of each.
        start: the first block, counted from 0.

    Returns:
        Two lists of L - start tensors (B, h, T, T): A, and dy_c/dA through all later blocks.
    """
    logits, attention, _ = record(model, images, start)
    gradients = torch.autograd.grad(score(logits, targets), attention)
    return [A.detach() for A in attention], list(gradients)


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the targets' logits; each image's gradient is that of its own logit."""
    return logits.gather(1, targets[:, None]).sum()


def bytes_needed(config: ViTConfig, start: int) -> int:
    """About how many bytes `explanations` needs for one image in float32, without the weights.

    For each block from `start` on, counted from 0: the attention, its gradient, and activations
    that the gradient needs; for one block, three more matrices.
    """
    T, squares = config.tokens, config.heads * config.tokens**2
    of_a_block = 2 * squares + T * (8 * config.width + config.hidden)
    return 4 * ((config.depth - start) * of_a_block + 3 * squares)


def rollout(attention: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928), which does not depend on a class.

    The mean over heads is averaged with the identity, for the residual path, and the blocks'
    matrices are multiplied, the last one leftmost. Rows sum to 1.

    Args:
        attention: L of (..., h, T, T).

    Returns:
        (..., T, T)
    """
    joint = identity = _identity_like(attention[0][..., 0, :, :])
    for A in attention:
        joint = (A.mean(dim=-3) + identity) / 2 @ joint
    return joint


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
    for A, gradient in zip(attention, gradients, strict=True):
        R = R + (A * gradient).clamp(min=0).mean(dim=-3) @ R
    return R


def legrad(model: ViT, images: Tensor, targets: Tensor, start: int = 0) -> Tensor:
    """LeGrad (Bousselham et al., arXiv 2404.03214), without its scaling to the range 0 to 1.

    For each block, the gradient of the class score of that block's own pooled token with respect to
    its attention: the positive part, its mean over heads and queries; then the sum over the blocks.

    Args:
        images: (B, C, H, W), normalized.
        targets: (B,)
        start: the first block, counted from 0.

    Returns:
        (B, N)
    """
    _, attention, tokens = record(model, images, start)
    total = images.new_zeros(len(images), model.config.patches)
    for A, z in zip(attention, tokens[1 + start :], strict=True):
        of_block = score(model.head(model.norm(model.pool(z))), targets)
        (gradient,) = torch.autograd.grad(of_block, A, retain_graph=True)
        total += gradient.clamp(min=0).mean(dim=(1, 2))[:, -model.config.patches :]
    return total


def gradient_times_input(model: ViT, images: Tensor, targets: Tensor) -> Tensor:
    """The sum over each patch of pixel times gradient of the class's logit: (B, N), of any sign."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(model(images), targets), images)
    return patchify(images.detach() * gradient, model.config.patch_size).sum(dim=-1)


def _identity_like(M: Tensor) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)


def explanations(
    model: ViT,
    images: Tensor,
    targets: Tensor,
    start: int = 0,
    layer: int | str = "all",
    head: int | str = "mean",
) -> dict[str, Tensor]:
    """Four maps over each image's patches for its target class, relative to uniform.

    Args:
        images: (B, C, H, W), normalized.
        targets: (B,)
        start: the first block, counted from 0, in the maps that combine several blocks.
        layer: the layer, counted from 1, whose attention is the first map; "all" is the last.
        head: the head of that map, as in `over_heads`.

    Returns:
        A map (B, g_h, g_w) for each method, scaled to a mean of 1, so that 1 is uniform.
    """
    A, gradients = attention_gradients(model, images, targets, start)
    R = relevance(A, gradients)
    matrices = {
        "attention": over_heads(A[-1 if layer == "all" else layer - 1 - start], head),
        "rollout": rollout(A),
        # R starts as the identity, which is not evidence; only mean pooling would show it.
        "relevance": R - _identity_like(R),
    }
    maps = {name: map_of(M, model.config) for name, M in matrices.items()}
    maps["LeGrad"] = legrad(model, images, targets, start).unflatten(-1, model.config.grid)
    return {name: relative_to_uniform(values) for name, values in maps.items()}


def relative_to_uniform(maps: Tensor) -> Tensor:
    """Non-negative maps (..., g_h, g_w) as multiples of their mean; all 0 where all are 0."""
    mean = maps.mean(dim=(-2, -1), keepdim=True)
    return torch.where(mean > 0, maps / mean, torch.zeros_like(maps))


@torch.no_grad()
def logit_lens(model: ViT, tokens: list[Tensor]) -> Tensor:
    """The classifier applied to the tokens after each block, as if it were the last.

    Args:
        tokens: L + 1 of (B, T, D), as in a `Record`.

    Returns:
        Probabilities (L + 1, B, K); the last are the model's own.
    """
    logits = torch.stack([model.head(model.norm(model.pool(z))) for z in tokens])
    return logits.softmax(dim=-1)


# ---------------------------------------------------------------------------- evidence


@torch.no_grad()
def logits_of_kept(model: ViT, images: Tensor, kept: Tensor, fill: Tensor | None) -> Tensor:
    """Logits (B, K) of images with only some of their patches left.

    Args:
        images: (B, C, H, W), normalized.
        kept: (B, n), the indices of the patches that are left.
        fill: what replaces the others, a normalized pixel (C, 1, 1); None drops their tokens.
    """
    config = model.config
    if fill is None:
        return model(images, kept)
    left = torch.zeros(len(images), config.patches, dtype=torch.bool, device=images.device)
    left = left.scatter(1, kept, True).unflatten(1, config.grid)[:, None]  # (B, 1, H/P, W/P)
    for dim in (2, 3):
        left = left.repeat_interleave(config.patch_size, dim)
    return model(torch.where(left, images, fill))


def kept_probabilities(
    model: ViT, images: Tensor, targets: Tensor, order: Tensor, shares: int, fill: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A class's probability when the first 1/n, 2/n, ..., n/n of an image's patches are left.

    In a map's order this is its insertion curve. In the opposite order, read from its end, it is
    the deletion curve: the patches that the map ranks as most important are missing.

    Args:
        order: (B, N), the indices of all patches; the first ones are kept the longest.
        shares: n.

    Returns:
        (B, n) each: the probability of the target, and whether it is the prediction.
    """
    probabilities, hits = [], []
    for number in range(1, shares + 1):
        count = max(1, round(model.config.patches * number / shares))
        logits = logits_of_kept(model, images, order[:, :count], fill)
        probabilities.append(logits.softmax(dim=1).gather(1, targets[:, None])[:, 0])
        hits.append(logits.argmax(dim=1) == targets)
    return torch.stack(probabilities, dim=1), torch.stack(hits, dim=1)


Head = tuple[int, int]  # a block and a head in it, counted from 0


@contextmanager
def without_heads(model: ViT, heads: Iterable[Head]) -> Iterator[None]:
    """A context in which the outputs of these heads are zero before they are projected."""
    with ExitStack() as hooks:
        for layer, head in heads:

            def silenced(_: nn.Module, inputs: tuple[Tensor], head: int = head) -> tuple[Tensor]:
                z = inputs[0].unflatten(-1, (model.config.heads, -1)).clone()  # (B, T, h, D_h)
                z[:, :, head] = 0
                return (z.flatten(2),)

            proj = model.blocks[layer].attn.proj
            hooks.enter_context(proj.register_forward_pre_hook(silenced))
        yield


class HeadWorth(NamedTuple):
    """How much of the accuracy on some images is due to each attention head."""

    lost: Tensor  # (L, h, n): 1 if an image is right only with a head, -1 if only without it
    pruned: Tensor  # (L h + 1, n): whether it is right without the 0, 1, 2, ... least useful


def head_worth(model: ViT, hits_and_loss: Callable[[], tuple[Tensor, float]]) -> HeadWorth:
    """What is lost without each head, and left without more and more, the least useful first.

    Args:
        hits_and_loss: evaluates the model as it is now: whether each of n images is right, and
            the mean loss, which orders heads of equal accuracy.
    """
    L, h = model.config.depth, model.config.heads
    found = {}
    for head in ((layer, head) for layer in range(L) for head in range(h)):
        with without_heads(model, [head]):
            found[head] = hits_and_loss()
    order = sorted(found, key=lambda head: (-found[head][0].sum(), found[head][1]))
    pruned = [hits_and_loss()[0]]
    for count in range(1, L * h + 1):
        with without_heads(model, order[:count]):
            pruned.append(hits_and_loss()[0])
    without = torch.stack([hits for hits, _ in found.values()]).unflatten(0, (L, h))
    return HeadWorth(pruned[0].int() - without.int(), torch.stack(pruned))


def area(curves: Tensor) -> Tensor:
    """Mean height (...,) of curves (..., n) between their ends, by the trapezoidal rule."""
    return torch.trapezoid(curves, dim=-1) / (curves.shape[-1] - 1)


def bootstrap_interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """The 95% interval of the mean of values (n,), by resampling them (Efron, 1979)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values.double()[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975]).double())
    return low.item(), high.item()


# ---------------------------------------------------------------------------- weights of the model


class Components(NamedTuple):
    """Principal components of n vectors of length p."""

    axes: Tensor  # (k, p), orthonormal; the largest entry of each is positive
    projections: Tensor  # (n, k), of the centered vectors
    singular_values: Tensor  # (min(n, p),), all of them, largest first


def principal_components(vectors: Tensor, count: int) -> Components:
    """Principal components of vectors (n, p) by the SVD of the centered matrix, in float64."""
    centered = vectors.double() - vectors.double().mean(dim=0)
    _, singular_values, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = axes[:count]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * largest.sign()
    return Components(axes, centered @ axes.T, singular_values)


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
    """Cosine similarity of the patches' position embeddings (the paper's Fig. 7, center).

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
    """Mean attention distance in pixels: attention-weighted distance of patch centers.

    The paper's Fig. 7, right. The class token is left out and rows are renormalized to sum to 1.

    Args:
        A: (..., h, T, T).

    Returns:
        (..., h), the mean over query patches.
    """
    N = grid[0] * grid[1]
    A = A[..., -N:, -N:]
    A = A / A.sum(dim=-1, keepdim=True).clamp(min=1e-12)  # all may be on the class token
    return (A * patch_distances(grid, patch_size).to(A)).sum(dim=-1).mean(dim=-1)


def patch_distances(grid: tuple[int, int], patch_size: int) -> Tensor:
    """Distances of patch centers in pixels, (N, N)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centers = patch_size * torch.stack([rows, columns], dim=-1).reshape(-1, 2).double()
    return torch.cdist(centers, centers)


def attention_entropy(A: Tensor) -> Tensor:
    """Entropy of the rows of A over its maximum, ln T: 0 is a single token, 1 is uniform.

    Args:
        A: (..., h, T, T), T at least 2.

    Returns:
        (..., h), the mean over query tokens.
    """
    return torch.special.entr(A).sum(dim=-1).mean(dim=-1) / math.log(A.shape[-1])


def tokens_as_colors(patches: Tensor) -> Tensor:
    """Patch tokens (n, N, D), D at least 3, as colors (n, N, 3) from 0 to 1.

    Red, green and blue are the first three principal components of all n N tokens, each scaled so
    that its middle 96% fills the range.
    """
    projections = principal_components(patches.flatten(0, 1), 3).projections
    low, high = projections.quantile(torch.tensor([0.02, 0.98]).to(projections), dim=0)
    colors = ((projections - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.unflatten(0, patches.shape[:2])


def linear_cka(layers: list[Tensor]) -> Tensor:
    """Linear centered kernel alignment of each pair of m representations of the same images.

    1 if one is a rotation of the other; 0 in expectation if they are independent, thanks to the
    unbiased estimator of HSIC (Song et al., 2012, as in Nguyen et al., arXiv 2010.15327).

    Args:
        layers: m of (n, p), n at least 4; p may differ.

    Returns:
        (m, m)
    """
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
    """Accuracy against confidence, in bins of equal width."""

    accuracy: Tensor  # (bins,), nan where a bin is empty
    confidence: Tensor  # (bins,), the mean, nan where a bin is empty
    counts: Tensor  # (bins,)
    error: float  # ECE, from 0 to 1


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Calibration:
    """Expected calibration error (Guo et al., arXiv 1706.04599).

    ECE is the mean over the bins, weighted by their images, of the absolute difference between
    accuracy and mean confidence. Bin b holds confidences in (b / bins, (b + 1) / bins].

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
    """Rows (at most `count`,) of wrong predictions, the most confident first.

    Args:
        probabilities: (n, K).
        labels: (n,)
    """
    confidence, predictions = probabilities.max(dim=1)
    wrong = (predictions != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
