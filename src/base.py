"""Building blocks that know nothing about images: GELU and DropPath."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), where Phi is the standard normal's cumulative distribution function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class GELU(nn.Module):
    """Gaussian Error Linear Unit (Hendrycks & Gimpel, arXiv 1606.08415): x times the Gaussian CDF.

    Smooth where ReLU has a corner, and not zero for small negative x. `F.gelu` is the formula above
    in one kernel, which keeps only x for the backward pass; a test checks that the two agree.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drops a residual branch, image by image.

    In training each image's branch is zeroed with probability `rate` and the others are scaled
    by 1 / (1 - rate), which preserves the expectation; in evaluation nothing happens. This
    trains an ensemble of shallower networks, and so regularizes.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
