"""Attention for the query of the first token only. The last block uses it if the heads read only the class token.

The attention map has a single row per head. It is computed with plain matrix products on every device, and computed
again in the backward pass.

    B images, N tokens, H heads, d width of a head
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.attention import join_heads
from moe_bsr.ops.keep import KEYS_VALUES, LINEAR_INPUTS, keep


def first_attention(q: Tensor, kv: Tensor, heads: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(scale q k^T + bias) v for one query per image.

    Args:
        q: (B, 1, H d). kv: (B, N, 2 H d) keys and values.
        bias: (B, N) float32, added to the logits of each key, without a gradient.
    Returns:
        (B, 1, H d), heads joined.
    """
    if ops.is_reference():
        k, v = _keys_and_values(kv, heads)
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        return join_heads(F.scaled_dot_product_attention(_by_head(q, heads), k, v, mask, scale=scale))
    return _FirstAttention.apply(q, kv, heads, scale, bias)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, n, H d) -> (B, H, n, d), a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _keys_and_values(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return views of (B, N, 2 H d): keys and values, each (B, H, N, d)."""
    return kv.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Return the attention probabilities of the query: (B, H, 1, N)."""
    logits = (q * scale) @ k.transpose(2, 3)
    if bias is not None:
        logits += bias[:, None, None]
    return logits.softmax(3)


class _FirstAttention(torch.autograd.Function):
    """Saved for backward: the query, keys, values, and the bias as a column (B, N, 1), which no storage compresses."""

    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, heads: int, scale: float, bias: Tensor | None) -> Tensor:
        ctx.heads, ctx.scale = heads, scale
        column = None if bias is None else bias.unsqueeze(2)
        ctx.save_for_backward(keep(LINEAR_INPUTS, q), keep(KEYS_VALUES, kv), column)
        k, v = _keys_and_values(kv, heads)
        return join_heads(_row(_by_head(q, heads), k, scale, bias) @ v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, kv, column = ctx.saved_tensors
        q, grad = _by_head(q, ctx.heads), _by_head(grad, ctx.heads)
        k, v = _keys_and_values(kv, ctx.heads)
        row = _row(q, k, ctx.scale, None if column is None else column.squeeze(2))
        grad_kv = torch.empty_like(kv)
        grad_k, grad_v = _keys_and_values(grad_kv, ctx.heads)
        grad_v.copy_(row.transpose(2, 3) * grad)
        grad_logits = torch.ops.aten._softmax_backward_data(grad @ v.transpose(2, 3), row, -1, row.dtype) * ctx.scale
        grad_k.copy_(grad_logits.transpose(2, 3) * q)
        return join_heads(grad_logits @ k), grad_kv, None, None, None
