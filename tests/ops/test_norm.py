"""The layer norm is bitwise equal to torch's, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from moe_bsr.ops.norm import layer_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradients_are_bitwise_equal_to_torchs(kernels, dtype, affine, frozen):
    torch.manual_seed(0)
    x = (3 + 5 * torch.randn(3, 7, 24)).to(dtype)
    weight = None if affine == "none" else torch.randn(24, requires_grad=not frozen)
    bias = torch.randn(24, requires_grad=not frozen) if affine == "both" else None
    outcomes = []
    for run in (lambda x: layer_norm(x, weight, bias, 1e-6), lambda x: F.layer_norm(x, (24,), weight, bias, 1e-6)):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *(p for p in (weight, bias) if p is not None and p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = run(leaf)
        outcomes.append([y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*outcomes, strict=True))


def test_a_transposed_view_of_heads_is_normalized():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    y = layer_norm(x, None, None, 1e-6)
    assert torch.equal(y, F.layer_norm(x, (8,), eps=1e-6))
