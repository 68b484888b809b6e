"""Token dropping by CLS attention: score, select, fuse, trace (BSR section 4.1, after EViT).

In a drop block every patch token is scored by the attention the class token pays it; the best are kept
in their order and the others are fused into one token, placed last. Shapes:

    B images, H heads, N tokens of which P prefix tokens (class, registers), D width,
    C = N - P candidates, K kept
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bsr.config import TokensConfig
from moe_bsr.cost.ledger import INDEX, ROW, Backward, Held, Ledger
from moe_bsr.model.replay import Replay

FUSED = -1  # what the trace says of a fused token


@dataclass(slots=True)
class Tokens:
    """The residual stream and where its tokens came from.

    Attributes:
        x: (B, N, D) features, prefix tokens first.
        origin: (B, N - P) int64 index of the original patch of each token after the prefix; -1 = fused.
        fused: whether the last token is a fused one.
    """

    x: Tensor
    origin: Tensor
    fused: bool = False


@dataclass(slots=True)
class Dropped:
    """What one drop location did, for views and statistics; everything detached.

    Attributes:
        origin_in: (B, C) original patch of every candidate, -1 = the fused token of an earlier drop.
        origin: (B, N' - P) the same after the drop.
        scores: (B, C) float32 attention of the class token, mean over heads.
    """

    origin_in: Tensor
    origin: Tensor
    scores: Tensor


def count_kept(candidates: int, keep: float) -> int:
    """K = max(1, ceil(keep * C)). 197 tokens at 0.5: 196 -> 98."""
    # The rounding keeps binary fractions honest: 0.07 * 100 is 7, not 7.000000000000001.
    return max(1, math.ceil(round(keep * candidates, 6)))


class _ReceivedAttention(torch.autograd.Function):
    """Of the map only `chunk` rows are ever alive: the backward computes them again. Logits have no gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k)
        ctx.scale, ctx.chunk = scale, chunk
        keys = k.float().transpose(-2, -1)
        probabilities = logits = 0.0
        for part in q.split(chunk, dim=2):
            row = (part.float() * scale) @ keys
            logits = logits + row.mean(1).sum(1)
            probabilities = probabilities + row.softmax(-1).mean(1).sum(1)
        logits = logits / q.shape[2]
        ctx.mark_non_differentiable(logits)
        return probabilities / q.shape[2], logits

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        q, k = ctx.saved_tensors
        keys = k.float()
        grad_k, grad_q = torch.zeros_like(keys), torch.empty_like(q)
        grad = (grad / (q.shape[1] * q.shape[2]))[:, None, None]  # each row's share of the mean over heads, queries
        for part, of_part in zip(q.split(ctx.chunk, dim=2), grad_q.split(ctx.chunk, dim=2), strict=True):
            part = part.float() * ctx.scale
            row = (part @ keys.transpose(-2, -1)).softmax(-1)
            back = torch.ops.aten._softmax_backward_data(grad.expand_as(row), row, -1, row.dtype)
            of_part.copy_(ctx.scale * (back @ keys))
            grad_k += back.transpose(-2, -1) @ part
        return grad_q, grad_k.to(k.dtype), None, None


def received_attention(q: Tensor, k: Tensor, scale: float, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Mean attention each token receives from all: the score where there is no class token.

    Args:
        q, k: (B, H, N, d) queries and keys as the attention uses them, taken `chunk` queries at a time.
    Returns:
        (probabilities, logits), each (B, N) float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _ReceivedAttention.apply(q, k, scale, chunk)


def select(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Positions of the `kept` best scores and of the rest, both ascending; ties go to the lower.

    Args:
        scores: (B, C). Returns: (B, K) and (B, C - K) int64.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x[b, positions[b, i]]: (B, N, ...) and (B, K) -> (B, K, ...).

    Advanced indexing keeps only the positions for backward; `torch.gather` would keep all of `x`.
    """
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), positions]


class Reduce(torch.autograd.Function):
    """Kept tokens in their order and one weighted sum of the dropped ones, placed last.

    (B, N, D) -> (B, P + K + 1, D), or without weights (B, P + K, D). Every token is kept or summed once,
    so the backward writes each row of the gradient once. Of the tokens only the dropped are kept for it,
    and these only if the weights need a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor, dropped: Tensor, weights: Tensor | None, prefix: int) -> Tensor:
        """kept (B, K), dropped (B, C - K): positions after the prefix; weights (B, C - K, 1), of x's type."""
        parts = [x[:, :prefix], take(x[:, prefix:], kept)]
        away = None
        if weights is not None:
            away = take(x[:, prefix:], dropped)
            parts.append(weights.transpose(1, 2) @ away)
        ctx.save_for_backward(kept, dropped, weights, away if ctx.needs_input_grad[3] else None)
        ctx.prefix, ctx.tokens = prefix, x.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept, dropped, weights, away = ctx.saved_tensors
        batch, prefix = len(grad), ctx.prefix
        grad_x = grad.new_empty(batch, ctx.tokens, grad.shape[2])
        grad_x[:, :prefix] = grad[:, :prefix]
        images = torch.arange(batch, device=grad.device).unsqueeze(1)
        grad_x[images, prefix + kept] = grad[:, prefix : prefix + kept.shape[1]]
        fused = grad[:, -1:]
        grad_x[images, prefix + dropped] = 0.0 if weights is None else weights * fused
        grad_weights = None if away is None else away @ fused.transpose(1, 2)
        return grad_x, None, None, grad_weights, None


def drop(
    tokens: Tokens,
    probabilities: Tensor,
    logits: Tensor,
    *,
    keep: float,
    prefix: int,
    config: TokensConfig,
    replay: Replay,
) -> tuple[Tokens, Dropped]:
    """Keep the best-scored tokens and fuse the rest into one, placed last (BSR section 4.1).

    Args:
        tokens: N tokens after the attention. probabilities, logits: (B, N) float32 scores of them.
        keep: share of the candidates to keep, in (0, 1].
    Returns:
        The shorter stream and what was done. If everything would be kept, the stream unchanged.
    """
    x, origin = tokens.x, tokens.origin
    probabilities, logits = probabilities[:, prefix:], logits[:, prefix:]
    if config.detach_fusion_weights:
        probabilities = probabilities.detach()
    protected = config.protect_fused and tokens.fused
    candidates = origin.shape[1] - protected
    kept_count = count_kept(candidates, keep)
    if kept_count == candidates:
        return tokens, Dropped(origin, origin, probabilities.detach())

    ranking = probabilities if config.rank_by == "probabilities" else logits
    kept, dropped = replay.record("kept tokens", lambda: select(ranking[:, :candidates], kept_count))
    origins, weights = [take(origin, kept)], None
    if config.fuses:
        weights = take(probabilities.unsqueeze(2), dropped)
        if config.fuse == "normalized":
            weights = weights / weights.sum(1, keepdim=True)
        origins.append(torch.full_like(origin[:, :1], FUSED))
    if protected:  # the fused token of an earlier drop, the last one, is added as it is
        dropped = torch.cat([dropped, torch.full_like(dropped[:, :1], candidates)], 1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
    shorter = Reduce.apply(x, kept, dropped, None if weights is None else weights.to(x.dtype), prefix)
    after = Tokens(shorter, torch.cat(origins, 1), weights is not None)
    return after, Dropped(origin, after.origin, probabilities.detach())


def drop_bytes(
    ledger: Ledger, batch: int, before: int, after: int, prefix: int, width: int, config: TokensConfig, needs_x: bool
) -> tuple[Held, Backward]:
    """Kept: the positions, and for the weights of the fused token these and the dropped tokens.

    Args:
        before, after: tokens entering and leaving, prefix included.
    """
    size, fuses = ledger.size, config.fuses
    kept = after - prefix - fuses
    dropped = before - prefix - kept
    token = batch * width * size
    attached = config.attached
    positions = ledger.make(batch * (before - prefix) * INDEX, packable=False)
    # A block that runs again also holds its tokens' origins, those after the last drop.
    ledger.decided += positions.bytes + batch * (after - prefix) * INDEX
    away = ledger.make(dropped * token) if fuses else None
    taken = ledger.make(kept * token)
    out = ledger.make(after * token)
    ledger.free(taken)
    weights = ledger.make(batch * dropped * (ROW + size), packable=False) if fuses else None
    if needs_x:
        ledger.save(positions, "positions")
        if fuses:
            ledger.save(weights, "fusion weights")
    if attached and ledger.grad:
        ledger.save(away, "dropped tokens")
        if not needs_x:
            ledger.save(positions, "positions")
    ledger.free(positions, away, weights)

    def backward(grad: Held) -> Held | None:
        if attached:
            ledger.restore(away)
        back = ledger.make(before * token)
        ledger.scratch(dropped * token)
        if attached:
            ledger.release(away)
        if needs_x or attached:
            ledger.release(positions)
        if needs_x and fuses:
            ledger.release(weights)
        ledger.free(grad)
        return back

    return out, backward
