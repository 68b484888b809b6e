"""The explicit attention backward against the softmax written out, in float32 and in bf16."""

import pytest
import torch
from torch.nn import functional as F

from moe_bsr.attention import _MatmulBackward, attention


def inputs(dtype: torch.dtype, tokens: int = 37) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, generator=generator).to(dtype) for _ in range(4)]


def gradients(function, q, k, v, grad, scale: float = 0.3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    y = function(*leaves, scale)
    return y.detach(), torch.autograd.grad(y, leaves, grad)


def written_out(q, k, v, scale):
    return ((scale * q @ k.transpose(-2, -1)).softmax(-1)) @ v


def test_in_float32_value_and_gradients_are_the_softmaxs():
    tensors = inputs(torch.float32)
    y, expected = gradients(written_out, *tensors)
    got, grads = gradients(_MatmulBackward.apply, *tensors)
    torch.testing.assert_close(got, y)
    for have, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(have, want)


def test_in_bf16_it_is_as_near_to_float32_as_the_fused_backward():
    tensors = inputs(torch.bfloat16)
    _, expected = gradients(written_out, *[t.float() for t in tensors])
    _, ours = gradients(attention, *tensors)
    _, fused = gradients(lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v, scale=s), *tensors)
    for have, peer, want in zip(ours, fused, expected, strict=True):
        assert (have.float() - want).norm() <= 1.5 * (peer.float() - want).norm() + 1e-3 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_map_of_tokens_by_tokens_is_kept(dtype):
    tokens, kept = 64, []
    q, k, v, _ = inputs(dtype, tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        attention(q.requires_grad_(), k, v, 0.3)
    assert kept and all(shape[-2:] != (tokens, tokens) for shape in kept)
