"""Select and fuse tokens, and compute the token scores of a network without a class token.

B images, H heads, N tokens of which P prefix tokens (class, registers), d width of a head, D width,
C = N - P candidates, K kept
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_bsr import ops
from moe_bsr.ops.keep import QUERIES_KEYS_VALUES, keep


def select(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the `kept` best scores and of the rest, both ascending. Ties go to the lower position.

    Args:
        scores: (B, C).
    Returns:
        (B, K) and (B, C - K) int64.
    """
    if ops.is_reference():
        return select_reference(scores, kept)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def select_reference(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Select without sorting, which runtimes of exported models lack: rank each score by C x C comparisons."""
    position = torch.arange(scores.shape[1], device=scores.device)
    mine, others = scores.unsqueeze(2), scores.unsqueeze(1)
    better = (others > mine) | ((others == mine) & (position < position.unsqueeze(1)))
    stays = better.sum(2) < kept
    # The kept ones get the places from 0 on, the others those from `kept` on, each in their order.
    place = torch.where(stays, stays.cumsum(1), kept + (~stays).cumsum(1)) - 1
    positions = torch.zeros_like(place).scatter(1, place, position.expand_as(place))
    return positions[:, :kept], positions[:, kept:]


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Return x[b, positions[b, i]]: (B, N, ...) and (B, K) -> (B, K, ...).

    Advanced indexing saves only the positions for backward; `torch.gather` would save all of `x`.
    """
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), positions]


def reduce_tokens(x: Tensor, kept: Tensor, dropped: Tensor, weights: Tensor | None, prefix: int) -> Tensor:
    """Keep the prefix and the kept tokens in their order, and append the weighted sum of the dropped ones.

    Args:
        x: (B, N, D). kept (B, K), dropped (B, C - K): positions after the prefix.
        weights: (B, C - K, 1), in the dtype of x; None to append no sum.
    Returns:
        (B, P + K + 1, D), or without weights (B, P + K, D).
    """
    if ops.is_reference():
        return reduce_tokens_reference(x, kept, dropped, weights, prefix)
    return _ReduceTokens.apply(x, kept, dropped, weights, prefix)


def reduce_tokens_reference(x: Tensor, kept: Tensor, dropped: Tensor, weights: Tensor | None, prefix: int) -> Tensor:
    parts = [x[:, :prefix], take(x[:, prefix:], kept)]
    if weights is not None:
        parts.append((weights * take(x[:, prefix:], dropped)).sum(1, keepdim=True))
    return torch.cat(parts, 1)


def read_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (B, N, D) and a copy (B, D) of its first token, for heads that read the class token of a block."""
    if ops.is_reference() or not x.requires_grad:
        return x, x[:, 0].clone()
    return _ReadFirst.apply(x)


def received_attention(q: Tensor, k: Tensor, scale: float, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Return the mean attention that each token receives: the scores of a network without a class token.

    Args:
        q, k: (B, H, N, d) queries and keys as the attention uses them.
        chunk: number of queries processed at a time.
    Returns:
        (probabilities, logits), each (B, N) float32; logits carry no gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        if ops.is_reference():
            return received_attention_reference(q, k, scale)
        return _ReceivedAttention.apply(q, k, scale, chunk)


def received_attention_reference(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = (q.float() * scale) @ k.float().transpose(-2, -1)
    return logits.softmax(-1).mean((1, 2)), logits.detach().mean((1, 2))


class _ReduceTokens(torch.autograd.Function):
    """Every token is kept or summed once, so the backward pass writes each row of the gradient once.

    Saved for backward: the positions, the weights, and the dropped tokens if the weights need a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor, dropped: Tensor, weights: Tensor | None, prefix: int) -> Tensor:
        parts = [x[:, :prefix], take(x[:, prefix:], kept)]
        dropped_x = None
        if weights is not None:
            dropped_x = take(x[:, prefix:], dropped)
            parts.append(weights.transpose(1, 2) @ dropped_x)
        ctx.save_for_backward(kept, dropped, weights, dropped_x if ctx.needs_input_grad[3] else None)
        ctx.prefix, ctx.tokens = prefix, x.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        kept, dropped, weights, dropped_x = ctx.saved_tensors
        batch, prefix = len(grad), ctx.prefix
        grad_x = grad.new_empty(batch, ctx.tokens, grad.shape[2])
        grad_x[:, :prefix] = grad[:, :prefix]
        images = torch.arange(batch, device=grad.device).unsqueeze(1)
        grad_x[images, prefix + kept] = grad[:, prefix : prefix + kept.shape[1]]
        grad_fused = grad[:, -1:]
        grad_x[images, prefix + dropped] = 0.0 if weights is None else weights * grad_fused
        grad_weights = None if dropped_x is None else dropped_x @ grad_fused.transpose(1, 2)
        return grad_x, None, None, grad_weights, None


class _ReadFirst(torch.autograd.Function):
    """The backward pass allocates one (B, N, D) tensor. Indexing would allocate two: zeros around the gradient of the
    token, and their sum with the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_read: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:, 0] += grad_read
        return grad


class _ReceivedAttention(torch.autograd.Function):
    """Only `chunk` rows of the map exist at a time. The backward pass computes them again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep(QUERIES_KEYS_VALUES, q), keep(QUERIES_KEYS_VALUES, k))
        ctx.scale, ctx.chunk = scale, chunk
        keys = k.float().transpose(-2, -1)
        probabilities = logits = 0.0
        for q_part in q.split(chunk, dim=2):
            rows = (q_part.float() * scale) @ keys
            logits = logits + rows.mean(1).sum(1)
            probabilities = probabilities + rows.softmax(-1).mean(1).sum(1)
        logits = logits / q.shape[2]
        ctx.mark_non_differentiable(logits)
        return probabilities / q.shape[2], logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        q, k = ctx.saved_tensors
        keys = k.float()
        grad_k, grad_q = torch.zeros_like(keys), torch.empty_like(q)
        grad = (grad / (q.shape[1] * q.shape[2]))[:, None, None]  # each row's share of the mean over heads, queries
        for q_part, grad_q_part in zip(q.split(ctx.chunk, dim=2), grad_q.split(ctx.chunk, dim=2), strict=True):
            q_part = q_part.float() * ctx.scale
            rows = (q_part @ keys.transpose(-2, -1)).softmax(-1)
            grad_rows = torch.ops.aten._softmax_backward_data(grad.expand_as(rows), rows, -1, rows.dtype)
            grad_q_part.copy_(ctx.scale * (grad_rows @ keys))
            grad_k += grad_rows.transpose(-2, -1) @ q_part
        return grad_q, grad_k.to(k.dtype), None, None
