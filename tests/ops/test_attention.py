"""Attention by matrix products, forward and backward, against a plain softmax, in float32 and bf16."""

import pytest
import torch
from torch.nn import functional as F

from moe_bsr.ops import attention as module
from moe_bsr.ops.attention import _Attention, attention, join_heads, split_heads
from moe_bsr.runtime import cpu_features as cpu

HEADS, SCALE = 3, 0.3


def inputs(dtype: torch.dtype, tokens: int = 37) -> tuple[torch.Tensor, ...]:
    """Return projections, and gradients of the output and of the class token's probabilities."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, tokens, 3 * HEADS * 16, generator=draw).to(dtype),
        torch.randn(4, tokens, HEADS * 16, generator=draw).to(dtype),
        torch.randn(4, tokens, generator=draw),
    )


def gradients(function, qkv, grad, grad_row) -> list[torch.Tensor]:
    """Return the output, the class token's probabilities and logits, and the gradient of the projections."""
    leaf = qkv.clone().requires_grad_()
    y, row, logits = function(leaf, HEADS, SCALE, True)
    torch.autograd.backward([y, row], [grad.to(y.dtype), grad_row.to(row.dtype)])
    return [y.detach(), row.detach(), logits.detach(), leaf.grad]


def plain_attention(qkv, heads, scale, scores):
    q, k, v = split_heads(qkv, heads)
    logits = scale * q @ k.transpose(-2, -1)
    return (join_heads(logits.softmax(-1) @ v), logits.softmax(-1)[:, :, 0].mean(1), logits[:, :, 0].mean(1))


def test_float32_values_and_gradients_equal_a_plain_softmax(kernels):
    tensors = inputs(torch.float32)
    for have, want in zip(gradients(attention, *tensors), gradients(plain_attention, *tensors), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("bf16", ["amx_bf16", "avx512_bf16"])
@pytest.mark.parametrize("map_bytes", [1, 3 * 37 * 37 * 4 * 3, 2**22], ids=["one", "three", "all"])
def test_the_result_does_not_depend_on_the_number_of_images_per_product(monkeypatch, map_bytes, bf16):
    qkv, grad, grad_row = inputs(torch.float32)
    monkeypatch.setattr(module, "MAP_BYTES", map_bytes)
    monkeypatch.setattr(module, "is_explicit", lambda device, dtype: True)
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: bf16)
    tensors = (qkv, grad, grad_row)
    for have, want in zip(gradients(_Attention.apply, *tensors), gradients(plain_attention, *tensors), strict=True):
        torch.testing.assert_close(have, want)


def test_the_error_of_bf16_products_is_of_the_order_of_bf16_rounding(monkeypatch):
    """The logits are rounded to bf16; the fused forward pass keeps them in float32."""
    qkv, *_ = inputs(torch.bfloat16, tokens=197)
    want, *_ = plain_attention(qkv.float(), HEADS, SCALE, True)
    errors = {}
    for bf16 in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(cpu, "bf16_instructions", lambda bf16=bf16: bf16)
        without_graph = attention(qkv, HEADS, SCALE)[0]
        y = attention(qkv.clone().requires_grad_(), HEADS, SCALE)[0].detach()
        assert torch.equal(y, without_graph) and y.dtype == torch.bfloat16
        errors[bf16] = float((y.float() - want).norm() / want.norm())
    assert errors["avx512_bf16"] != errors["amx_bf16"] and max(errors.values()) < 2**-7


def test_a_gradient_of_the_scores_alone_is_right():
    leaf, _, grad_row = inputs(torch.float32)
    expected = leaf.clone().requires_grad_()
    attention(leaf.requires_grad_(), HEADS, SCALE, True)[1].backward(grad_row)
    plain_attention(expected, HEADS, SCALE, True)[1].backward(grad_row)
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_the_bf16_gradient_is_about_as_exact_as_that_of_the_fused_kernel():
    qkv, grad, _ = inputs(torch.bfloat16)
    no_row = torch.zeros(4, 37)
    *_, expected = gradients(plain_attention, qkv.float(), grad.float(), no_row)
    *_, ours = gradients(attention, qkv, grad, no_row)
    leaf = qkv.clone().requires_grad_()
    join_heads(F.scaled_dot_product_attention(*split_heads(leaf, HEADS), scale=SCALE)).backward(grad)
    error, peer = ((g.float() - expected).norm() for g in (ours, leaf.grad))
    assert error <= 1.5 * peer + 1e-3 * expected.norm()


def test_in_bf16_scores_are_float32_and_their_gradient_is_right():
    qkv, grad, grad_row = inputs(torch.bfloat16)
    zero = torch.zeros_like(grad)
    with torch.autocast("cpu", torch.bfloat16):
        _, row, logits, ours = gradients(attention, qkv, zero, grad_row)
    _, want_row, want_logits, expected = gradients(plain_attention, qkv.float(), zero.float(), grad_row)
    assert row.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(row, want_row)
    torch.testing.assert_close(logits, want_logits)
    assert (ours.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_attention_map_is_kept(dtype):
    tokens, kept = 64, []
    qkv, *_ = inputs(dtype, tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        attention(qkv.requires_grad_(), HEADS, SCALE)
    assert kept and all(shape[-2:] != (tokens, tokens) for shape in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unattached_scores_have_no_gradient(dtype):
    qkv, *_ = inputs(dtype)
    _, row, logits = attention(qkv.float().requires_grad_(), HEADS, SCALE, True, attached=False)
    assert not row.requires_grad and not logits.requires_grad
