"""GELU against PyTorch's own kernel, DropPath against torchvision's stochastic depth."""

import pytest
import torch
from torchvision.ops import stochastic_depth

from base import GELU, DropPath, gelu

# In float32, 1 + erf is off by about 1e-7 where it cancels, and |x| < 12 multiplies that.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 3e-6},
}


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward((torch.arange(len(x)) % 5 - 2).to(x.dtype))  # the same numbers in every dtype
    return y.detach(), x.grad


# ---------------------------------------------------------------------------- GELU


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gelu_is_the_formula_in_values_and_gradients(dtype):
    far = torch.tensor([0.0, -0.0, 40, -40, 1e4, -1e4, 1e10, -1e10])
    x = torch.cat([torch.linspace(-12, 12, 2001), far]).to(dtype)
    module, formula = value_and_gradient(GELU(), x), value_and_gradient(gelu, x)
    for got, expected in zip(module, formula, strict=True):
        assert got.dtype == dtype and got.isfinite().all()
        torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


# ---------------------------------------------------------------------------- DropPath


@pytest.mark.parametrize("rate, training", [(0.3, True), (0.0, True), (0.9, False)])
@pytest.mark.parametrize("shape", [(64,), (64, 3), (64, 5, 6)])
def test_drop_path_draws_and_scales_as_torchvision_does(shape, rate, training):
    x = torch.randn(shape)
    torch.manual_seed(0)
    ours = DropPath(rate).train(training)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, stochastic_depth(x, rate, "row", training))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_drop_path_refuses_a_rate_outside_0_to_1(rate):
    with pytest.raises(ValueError, match=f"not {rate}"):
        DropPath(rate)
