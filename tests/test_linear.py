"""An activation and the layer behind it as one operation: the same numbers, one tensor kept in place of two."""

import pytest
import torch
from torch import nn

from moe_bsr.linear import activated_linear, linear

ACTIVATIONS = {"gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}


def outcome(run, layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """Value, and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = run(layer, x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), x.grad, layer.weight.grad.clone(), *([] if layer.bias is None else [layer.bias.grad.clone()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equal_to_two_operations_to_the_bit(name, dtype, bias):
    torch.manual_seed(0)
    act, layer, x = ACTIVATIONS[name], nn.Linear(24, 8, bias=bias), torch.randn(3, 5, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        one = outcome(lambda layer, x: activated_linear(act, layer, x), layer, x)
        two = outcome(lambda layer, x: linear(layer, act(x)), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_only_the_values_before_the_activation_are_kept():
    layer, kept = nn.Linear(24, 8), []
    x = torch.randn(3, 5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        activated_linear(nn.GELU(), layer, x)
    assert set(kept) == {x.data_ptr(), layer.weight.data_ptr()}


def test_what_was_kept_is_left_as_it_was():
    x, before = torch.randn(3, 5, 24, requires_grad=True), []
    y = activated_linear(nn.GELU(), nn.Linear(24, 8), x)
    before.append(x.detach().clone())
    y.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(x.grad, first)
