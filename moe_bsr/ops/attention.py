"""Scaled dot-product attention with a fast, lean backward pass, which can also return the class token's attention row.

Queries, keys and values are saved, never an N x N map. In bf16 on a CPU, torch's fused backward is 2 to 5 times slower
than recomputing the map with matrix products for a few images at a time, whose maps stay in the cache (DeiT-S, batch
32, two cores with AMX: 197 tokens 14 ms, 100 tokens 5 ms, 28 tokens 1.5 ms). In float32 and on GPUs the fused backward
is faster and is used. Either way the gradients are written in the layout of the projections. The forward pass is
torch's fused one, unless matrix products are faster (`is_fused`).

    B images, N tokens, H heads, d width of a head
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.keep import ATTENTION_OUTPUTS, QUERIES_KEYS_VALUES, is_coarse, keep
from moe_bsr.runtime import cpu_features as cpu

MAP_BYTES = 2 * 2**20  # of attention maps that the explicit kernels hold at a time (one image at least)


def attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    scores: bool = False,
    attached: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute softmax(scale q k^T + bias) v.

    Args:
        qkv: (B, N, 3 H d) projections.
        scores: also return the class token's row of the attention.
        attached: let gradients flow through the probabilities of that row.
        bias: (B, N) float32, added to the logits of each key, without a gradient. It cannot be combined with `scores`.
            The fused operators take it as it is; it is never expanded to a map.
    Returns:
        The output with heads joined, (B, N, H d), and with `scores` the class token's probabilities and logits, each
        (B, N) float32, mean over heads; otherwise None and None. The logits carry no gradient.
    """
    if scores and bias is not None:
        raise ValueError("scores are not available for an attention with a bias")
    if ops.is_reference() or not is_supported(qkv, heads) or (bias is not None and qkv.device.type != "cpu"):
        return attention_reference(qkv, heads, scale, scores, attached, bias)
    y, probabilities, logits = _Attention.apply(qkv, heads, scale, scores, bias)
    return y, probabilities if attached or not scores else probabilities.detach(), logits


def attention_reference(
    qkv: Tensor, heads: int, scale: float, scores: bool, attached: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mask = None if bias is None else bias[:, None, None].to(qkv.dtype)
    y = join_heads(F.scaled_dot_product_attention(*split_heads(qkv, heads), mask, scale=scale))
    if not scores:
        return y, None, None
    with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
        probabilities, logits = (row.mean(1).squeeze(1) for row in class_row(qkv, heads, scale))
    return y, probabilities, logits.detach()


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of (B, N, 3 H d) projections: queries, keys and values, each (B, H, N, d)."""
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(y: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return y.transpose(1, 2).flatten(2)


def class_row(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the class token's attention in float32: (probabilities, logits), each (B, H, 1, N)."""
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, _ = split_heads(qkv, heads)
        # A matrix product would make, and save, a second copy of the keys.
        logits = ((q[:, :, :1].float() * scale) * k).sum(-1, dtype=torch.float32).unsqueeze(2)
        return logits.softmax(-1), logits


def is_supported(qkv: Tensor, heads: int) -> bool:
    """Return whether torch's fused operators accept these projections when they are called directly."""
    if qkv.device.type == "cpu":
        return True
    if qkv.device.type != "cuda" or qkv.shape[2] // (3 * heads) % 8:
        return False
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    return qkv.dtype == torch.float32 or (half and torch.cuda.get_device_capability(qkv.device) >= (8, 0))


def is_explicit(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the backward pass uses this module's matrix products instead of torch's fused operator."""
    return device.type == "cpu" and dtype == torch.bfloat16


def is_fused(dtype: torch.dtype) -> bool:
    """Return whether torch's fused forward pass is the faster one on this CPU.

    In bf16, matrix products are faster on CPUs that have bf16 instructions but no tiles (AMX). DeiT-S, batch 32, 197
    tokens, two Zen 4 cores: 19.4 ms fused and 11.4 ms as products in bf16, 17.4 and 19.6 ms in float32. With AMX: 5.2
    and 6.9 ms in bf16.
    """
    return dtype != torch.bfloat16 or cpu.bf16_instructions() != "avx512_bf16"


class _Attention(torch.autograd.Function):
    """(B, N, 3 H d) projections -> attention (B, N, H d) and the class token's row.

    Saved for backward: the projections, the bias, and for the fused backward also the output and one log-sum per row.
    Bias and log-sums are saved as columns (..., 1), which no storage compresses. The gradients of queries, keys and
    values are written into one tensor; autograd would stack and copy them.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, scale: float, scores: bool, bias: Tensor | None = None):
        ctx.heads, ctx.scale = heads, scale
        ctx.set_materialize_grads(False)
        explicit = is_explicit(qkv.device, qkv.dtype)
        # If a storage changes queries and keys much, their map does not fit the log-sums: its rows would not sum to 1.
        ctx.explicit = explicit or is_coarse(QUERIES_KEYS_VALUES)
        if explicit and not is_fused(qkv.dtype):
            y, sums, ctx.seeds = _explicit_forward(qkv, heads, scale, bias), None, ()
        else:
            y, sums, ctx.seeds = _fused_forward(*split_heads(qkv, heads), scale, bias)
            y = join_heads(y)
        keep(QUERIES_KEYS_VALUES, qkv)
        column = None if bias is None else bias.unsqueeze(2)
        ctx.save_for_backward(qkv, column, *(() if ctx.explicit else (keep(ATTENTION_OUTPUTS, y), sums.unsqueeze(3))))
        if not scores:
            return y, None, None
        probabilities, logits = (row.mean(1).squeeze(1) for row in class_row(qkv, heads, scale))
        ctx.mark_non_differentiable(logits)
        return y, probabilities, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_probabilities: Tensor | None, _: None):
        qkv, column, *fused = ctx.saved_tensors
        bias = None if column is None else column.squeeze(2)
        q, k, v = split_heads(qkv, ctx.heads)
        if grad is None:  # only the scores were used
            grad_qkv = torch.zeros_like(qkv)
        else:
            grad = grad.unflatten(2, (ctx.heads, -1)).transpose(1, 2)
            if ctx.explicit:
                grad_qkv = _explicit_backward(qkv, ctx.heads, ctx.scale, grad, bias)
            else:
                y, sums = fused
                y = y.unflatten(2, (ctx.heads, -1)).transpose(1, 2)
                grads = _fused_backward(grad, q, k, v, y, sums.squeeze(3), ctx.seeds, ctx.scale, bias)
                grad_qkv = torch.cat([join_heads(g) for g in grads], 2)
                del grads
        if grad_probabilities is not None:
            row, _ = class_row(qkv, ctx.heads, ctx.scale)
            grad_row = (grad_probabilities / ctx.heads)[:, None, None, :].expand_as(row)
            grad_row = torch.ops.aten._softmax_backward_data(grad_row, row, -1, row.dtype)
            grad_row = ctx.scale * grad_row.to(qkv.dtype)
            grad_q, grad_k, _ = split_heads(grad_qkv, ctx.heads)
            grad_q[:, :, :1] += grad_row @ k
            grad_k.add_(grad_row.transpose(-2, -1) * q[:, :, :1])
        return grad_qkv, None, None, None, None


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor, tuple]:
    """Return attention (B, H, N, d), a log-sum per row (B, H, N or more), and further arguments of the backward."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        y, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=_mask(bias), scale=scale
        )
        return y, sums, ()
    if q.dtype == torch.float32:  # flash attention supports only half precision
        y, sums, *seeds = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
        return y, sums, tuple(seeds)
    y, sums, *seeds, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return y, sums, tuple(seeds)


def _mask(bias: Tensor | None) -> Tensor | None:
    """Return a (B, N) bias in the shape of an attention mask, (B, 1, 1, N)."""
    return None if bias is None else bias[:, None, None]


def _fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    sums: Tensor,
    seeds: tuple,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, each (B, H, N, d)."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, y, sums, 0.0, False, attn_mask=_mask(bias), scale=scale
        )
    if q.dtype == torch.float32:
        needs = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, y, sums, *seeds, 0.0, needs, False, scale=scale
        )[:3]
    cumulative_q, cumulative_k, longest_q, longest_k, seed, offset = seeds
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, y, sums, cumulative_q, cumulative_k, longest_q, longest_k, 0.0, False, seed, offset, scale=scale
    )


def _explicit_forward(qkv: Tensor, heads: int, scale: float, bias: Tensor | None) -> Tensor:
    """Compute the attention (B, N, H d) with matrix products, a few images at a time."""
    q, k, v = split_heads(qkv, heads)
    y = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    y_heads = y.unflatten(2, (heads, -1)).transpose(1, 2)
    for part in _few_images(qkv, heads):
        attention = _softmax_map(_packed(q[part]) * scale, _packed(k[part]), _bias_of_heads(bias, part, heads))
        y_heads[part] = torch.bmm(attention, _packed(v[part])).unflatten(0, (-1, heads))
        del attention  # before the next one is allocated
    return y


def _explicit_backward(qkv: Tensor, heads: int, scale: float, grad: Tensor, bias: Tensor | None) -> Tensor:
    """Return the gradient of the projections, recomputing the map for a few images at a time.

    Args:
        grad: (B, H, N, d), gradient of the attention's output.
    """
    q, k, v = split_heads(qkv, heads)
    grad_qkv = torch.empty_like(qkv)
    grad_q, grad_k, grad_v = split_heads(grad_qkv, heads)
    for part in _few_images(qkv, heads):
        q_part, k_part, v_part, grad_part = (_packed(t[part]) for t in (q, k, v, grad))
        q_part = q_part * scale
        attention = _softmax_map(q_part, k_part, _bias_of_heads(bias, part, heads))
        found_v = torch.bmm(attention.transpose(1, 2), grad_part)
        grad_logits = torch.ops.aten._softmax_backward_data(
            torch.bmm(grad_part, v_part.transpose(1, 2)), attention, -1, attention.dtype
        )
        found_q = torch.bmm(grad_logits, k_part).mul_(scale)
        found_k = torch.bmm(grad_logits.transpose(1, 2), q_part)
        for whole, found in ((grad_q, found_q), (grad_k, found_k), (grad_v, found_v)):
            whole[part] = found.unflatten(0, (-1, heads))
        # Free these before the next part allocates its own.
        del q_part, k_part, v_part, grad_part, attention, grad_logits, found_q, found_k, found_v, found
    return grad_qkv


def images_at_once(batch: int, heads: int, tokens: int, element_size: int) -> int:
    """Return how many images the explicit kernels process at a time."""
    return max(1, min(batch, MAP_BYTES // (heads * tokens * tokens * element_size)))


def _few_images(qkv: Tensor, heads: int) -> Iterator[slice]:
    batch, tokens, _ = qkv.shape
    step = images_at_once(batch, heads, tokens, qkv.element_size())
    return (slice(first, first + step) for first in range(0, batch, step))


def _packed(images: Tensor) -> Tensor:
    """(b, H, N, d) -> (b x H, N, d), contiguous for a batched product."""
    return images.flatten(0, 1).contiguous()


def _bias_of_heads(bias: Tensor | None, part: slice, heads: int) -> Tensor | None:
    """Return the bias of the images in `part`, repeated for each head: (b x H, 1, N)."""
    return None if bias is None else bias[part].repeat_interleave(heads, 0).unsqueeze(1)


def _softmax_map(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias), (b x H, N, N)."""
    attention = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        attention += bias
    return torch.softmax(attention, -1, out=attention)
