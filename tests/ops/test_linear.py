"""Linear layers: the same numbers from every kernel, also fused with the activation before them."""

import pytest
import torch
from torch import nn

from moe_bsr.ops.linear import activated_linear, linear, product
from moe_bsr.runtime import cpu_features as cpu

ACTIVATIONS = {"gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"], autouse=True)
def slow_mkl(request, monkeypatch) -> bool:
    """Run float32 products with either library, regardless of this CPU's own choice."""
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: request.param)
    return request.param


def call(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def call_activated(act: nn.Module, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return activated_linear(act, x, layer.weight, layer.bias)


def outcome(run, layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the value, and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = run(layer, x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), x.grad, layer.weight.grad.clone(), *([] if layer.bias is None else [layer.bias.grad.clone()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (0, 24), (24,)])
def test_value_and_gradients_equal_torchs_layer(kernels, bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8, bias=bias), torch.randn(shape)
    for ours, theirs in zip(outcome(call, layer, x), outcome(nn.Linear.forward, layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_onednn_computes_float32_products_if_mkl_is_slow_and_shapes_repeat(slow_mkl):
    x, weight, bias = torch.randn(6, 24), torch.randn(8, 24), torch.randn(8)
    for repeats in (False, True):
        with torch.profiler.profile() as profile:
            y = product(x, weight, bias, repeats=repeats)
        torch.testing.assert_close(y, x @ weight.t() + bias)
        by_onednn = any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())
        assert by_onednn == (slow_mkl and repeats)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_fused_operation_is_bitwise_equal_to_two_operations(kernels, name, dtype, bias):
    torch.manual_seed(0)
    act, layer, x = ACTIVATIONS[name], nn.Linear(24, 8, bias=bias), torch.randn(3, 5, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        one = outcome(lambda layer, x: call_activated(act, layer, x), layer, x)
        two = outcome(lambda layer, x: call(layer, act(x)), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_only_the_input_of_the_activation_is_kept():
    layer, kept = nn.Linear(24, 8), []
    x = torch.randn(3, 5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        call_activated(nn.GELU(), layer, x)
    assert set(kept) == {x.data_ptr(), layer.weight.data_ptr()}


def test_the_backward_pass_does_not_change_the_saved_input():
    x, before = torch.randn(3, 5, 24, requires_grad=True), []
    y = call_activated(nn.GELU(), nn.Linear(24, 8), x)
    before.append(x.detach().clone())
    y.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(x.grad, first)
