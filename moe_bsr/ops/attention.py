"""Scaled dot-product attention whose backward is fast, and small, on CPUs.

Kept are queries, keys and values, never an N x N map. torch's fused backward on a CPU is 2 to 5 times slower
in bf16 than recomputing the map with matrix products a few images at a time, so that the maps of a part stay
in the cache (DeiT-S, batch 32, two cores with AMX: 197 tokens 14 ms, 100 tokens 5 ms, 28 tokens 1.5 ms). In
float32, and on GPUs, the fused backward is the faster one and is used; on CPUs its gradients go straight into
the projections' layout. The forward is torch's fused one unless products are faster (`is_fused`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.cost.ledger import ROW, Backward, Held, Ledger
from moe_bsr.runtime import cpu_features as cpu

PLAIN = torch.bfloat16  # the type whose backward is made of matrix products here
MAP_BYTES = 2 * 2**20  # of one attention map recomputed at once in the backward


def images_at_once(batch: int, heads: int, tokens: int, element_size: int) -> int:
    """Into how many images' maps the recomputation of a batch's attention is cut."""
    return max(1, min(batch, MAP_BYTES // (heads * tokens * tokens * element_size)))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H d) -> queries, keys, values, views of it, each (B, H, N, d)."""
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(y: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return y.transpose(1, 2).flatten(2)


def class_row(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """The class token's attention in float32: (probabilities, logits), each (B, H, 1, N)."""
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, _ = split_heads(qkv, heads)
        # Not as a matrix product, which would lay out, and keep, a second copy of the keys.
        logits = ((q[:, :, :1].float() * scale) * k).sum(-1, dtype=torch.float32).unsqueeze(2)
        return logits.softmax(-1), logits


def is_fused(dtype: torch.dtype) -> bool:
    """Whether torch's fused forward is the faster one on this CPU; without tiles for bf16 matrix products are.

    DeiT-S, batch 32, 197 tokens, two Zen 4 cores: 19.4 ms fused and 11.4 as products in bf16, 17.4 and 19.6 in
    float32; with tiles (AMX) 5.2 and 6.9 in bf16.
    """
    return dtype != PLAIN or cpu.bf16_instructions() != "avx512_bf16"


def _parts(qkv: Tensor, heads: int) -> Iterator[slice]:
    """A few images at a time."""
    batch, tokens, _ = qkv.shape
    step = images_at_once(batch, heads, tokens, qkv.element_size())
    return (slice(first, first + step) for first in range(0, batch, step))


def _apart(of_images: Tensor) -> Tensor:
    """(b, H, N, d) of some images -> (b x H, N, d), laid out for a batched product."""
    return of_images.flatten(0, 1).contiguous()


def _map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T), (b x H, N, N)."""
    attention = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(attention, -1, out=attention)


def _forward(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attention (B, N, H d) and, of the fused one, a log-sum for each row, (B, H, N)."""
    if is_fused(qkv.dtype):
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *split_heads(qkv, heads), 0.0, False, scale=scale
        )
        return join_heads(y), sums
    q, k, v = split_heads(qkv, heads)
    y = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    by_head = y.unflatten(2, (heads, -1)).transpose(1, 2)
    for part in _parts(qkv, heads):
        attention = _map(_apart(q[part]) * scale, _apart(k[part]))
        by_head[part] = torch.bmm(attention, _apart(v[part])).unflatten(0, (-1, heads))
        del attention  # or it would live beside the next one
    return y, None


def _images_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some images' queries, keys and values, all (b x H, N, d)."""
    q = q * scale
    attention = _map(q, k)
    grad_v = torch.bmm(attention.transpose(1, 2), grad)
    grad_logits = torch.ops.aten._softmax_backward_data(
        torch.bmm(grad, v.transpose(1, 2)), attention, -1, attention.dtype
    )
    return torch.bmm(grad_logits, k).mul_(scale), torch.bmm(grad_logits.transpose(1, 2), q), grad_v


class CpuAttention(torch.autograd.Function):
    """(B, N, 3 H d) projections -> attention (B, N, H d) and the class token's row.

    Kept: the projections, and in float32, for the fused backward, the output and a log-sum a row. The row, (B, N)
    probabilities and logits, mean over heads, comes with `scores`; else None. All gradients are written into one
    tensor of the projections' layout, where autograd would stack and copy those of queries, keys and values.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, scale: float, scores: bool):
        ctx.heads, ctx.scale, ctx.plain = heads, scale, qkv.dtype == PLAIN
        ctx.set_materialize_grads(False)
        y, sums = _forward(qkv, heads, scale)
        ctx.save_for_backward(qkv, *(() if ctx.plain else (y, sums.unsqueeze(3))))
        if not scores:
            return y, None, None
        probabilities, logits = (row.mean(1).squeeze(1) for row in class_row(qkv, heads, scale))
        ctx.mark_non_differentiable(logits)
        return y, probabilities, logits

    @staticmethod
    def backward(ctx, grad: Tensor, grad_probabilities: Tensor | None, _: None):
        qkv, *fused = ctx.saved_tensors
        q, k, v = split_heads(qkv, ctx.heads)
        grad = None if grad is None else grad.unflatten(2, (ctx.heads, -1)).transpose(1, 2)
        if grad is None:  # only the scores were used
            grad_qkv = torch.zeros_like(qkv)
        elif ctx.plain:
            grad_qkv = torch.empty_like(qkv)
            grads = split_heads(grad_qkv, ctx.heads)
            for part in _parts(qkv, ctx.heads):
                found = _images_backward(*(_apart(t[part]) for t in (q, k, v, grad)), ctx.scale)
                for whole, of_part in zip(grads, found, strict=True):
                    whole[part] = of_part.unflatten(0, (-1, ctx.heads))
                del found, of_part
        else:
            y, sums = fused
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad,
                q,
                k,
                v,
                y.unflatten(2, (ctx.heads, -1)).transpose(1, 2),
                sums.squeeze(3),
                0.0,
                False,
                scale=ctx.scale,
            )
            grad_qkv = torch.cat([join_heads(g) for g in found], 2)
            del found
        if grad_probabilities is not None:
            row, _ = class_row(qkv, ctx.heads, ctx.scale)
            grad_row = (grad_probabilities / ctx.heads)[:, None, None, :].expand_as(row)
            grad_row = ctx.scale * torch.ops.aten._softmax_backward_data(grad_row, row, -1, row.dtype).to(qkv.dtype)
            grad_q, grad_k, _ = split_heads(grad_qkv, ctx.heads)
            grad_q[:, :, :1] += grad_row @ k
            grad_k.add_(grad_row.transpose(-2, -1) * q[:, :, :1])
        return grad_qkv, None, None, None


def attention(
    qkv: Tensor, heads: int, scale: float, scores: bool = False, attached: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(scale q k^T) v of (B, N, 3 H d) projections, heads joined: (B, N, H d).

    With `scores` also the class token's row of the attention, mean over heads: (B, N) probabilities
    and logits, float32; None and None otherwise. Logits carry no gradient, probabilities if `attached`.
    """
    if qkv.device.type == "cpu":
        y, probabilities, logits = CpuAttention.apply(qkv, heads, scale, scores)
        return y, probabilities if attached or not scores else probabilities.detach(), logits
    y = join_heads(F.scaled_dot_product_attention(*split_heads(qkv, heads), scale=scale))
    if not scores:
        return y, None, None
    with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
        probabilities, logits = (row.mean(1).squeeze(1) for row in class_row(qkv, heads, scale))
    return y, probabilities, logits.detach()


def attention_bytes(
    ledger: Ledger, qkv: Held, batch: int, heads: int, tokens: int, width: int, *, scores: bool, attached: bool
) -> tuple[Held, Held | None, Backward]:
    """Kept: the projections; in float32 also the output and a log-sum per row and head.

    Returns the output, the scores (probabilities and logits, mean over heads) and the backward.
    """
    stream = batch * tokens * width  # elements
    rows, size = batch * heads * tokens * ROW, ledger.size
    y, sums = ledger.make(stream * size), None
    step = images_at_once(batch, heads, tokens, size)
    if is_fused(torch.float32 if size == 4 else PLAIN):
        sums = ledger.make(rows, packable=False)
        ledger.scratch(_fused_scratch(ledger, stream, tokens, width // heads))
    else:
        ledger.scratch(step * (2 * tokens * width + heads * tokens * tokens) * size)
    given, row = None, None
    if scores:
        ledger.scratch(stream * ROW)
        row = ledger.make(rows + batch * width * ROW, packable=False)  # and the class token's queries
        ledger.scratch(rows)
        given = ledger.make(2 * batch * tokens * ROW, packable=False)
    ledger.save(qkv, "queries, keys, values")
    fused = size == 4
    if fused:
        ledger.save(y, "attention outputs")
        ledger.save(sums, "attention sums")
    ledger.free(sums, row)

    def backward(grad: Held) -> Held:
        ledger.restore(qkv)
        if fused:
            ledger.restore(y)
            parts = [ledger.make(stream * size) for _ in range(3)]
            out = ledger.make(3 * stream * size)
            ledger.free(*parts)
            ledger.release(y)
            ledger.release(sums)
        else:
            out = ledger.make(3 * stream * size)
            ledger.scratch(
                step
                * max(
                    5 * tokens * width + 3 * heads * tokens * tokens, 7 * tokens * width + 2 * heads * tokens * tokens
                )
                * size
            )
        if scores and attached:
            ledger.scratch(stream * ROW + 3 * rows)
        ledger.free(grad)
        ledger.release(qkv)
        return out

    return y, given, backward


def _fused_scratch(ledger: Ledger, stream: int, tokens: int, head_width: int) -> int:
    """Of torch's fused kernel on a CPU: blocks of the map per thread; in bf16 keys and values packed."""
    block = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    keys = min(tokens, 512)
    scratch = ledger.threads * block * (keys + 2 + head_width) * ROW
    return scratch if ledger.size == 4 else scratch + ledger.threads * block * 4 * keys + 2 * stream * ledger.size
