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
from moe_bsr.decisions import Decisions

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


def cls_attention(q: Tensor, k: Tensor, scale: float, prefix: int, has_class_token: bool,
                  chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Scores of the tokens after the prefix: (probabilities, logits), each (B, N - P) float32.

    Only the class token's row of the attention is computed. Without a class token a token's score is
    the mean attention it receives from all tokens, computed `chunk` queries at a time.

    Args:
        q, k: (B, H, N, D/H) queries and keys as the attention uses them.
    """
    with torch.autocast(q.device.type, enabled=False):
        keys = k.float().transpose(-2, -1)
        queries = q[:, :, :1] if has_class_token else q
        probabilities = logits = 0.0
        for part in queries.float().split(chunk, dim=2):
            row = (part * scale) @ keys
            probabilities = probabilities + row.softmax(-1).mean(1).sum(1)
            logits = logits + row.mean(1).sum(1)
        rows = queries.shape[2]
        return (probabilities / rows)[:, prefix:], (logits / rows)[:, prefix:]


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


def drop(tokens: Tokens, q: Tensor, k: Tensor, *, scale: float, keep: float, prefix: int,
         has_class_token: bool, config: TokensConfig, decisions: Decisions) -> tuple[Tokens, Dropped]:
    """Keep the best-scored tokens and fuse the rest into one, placed last (BSR section 4.1).

    Args:
        tokens: N tokens after the attention. q, k: (B, H, N, D/H) of that attention.
        keep: share of the candidates to keep, in (0, 1].
    Returns:
        The shorter stream and what was done. If everything would be kept, the stream unchanged.
    """
    x, origin = tokens.x, tokens.origin
    # Ranking has no gradient: only the weights of the fused token need the scores in the graph.
    attached = torch.is_grad_enabled() and config.fuse != "none" and not config.detach
    with torch.set_grad_enabled(attached):
        probabilities, logits = cls_attention(q, k, scale, prefix, has_class_token)
    protected = config.protect and tokens.fused
    candidates = origin.shape[1] - protected
    kept_count = count_kept(candidates, keep)
    if kept_count == candidates:
        return tokens, Dropped(origin, origin, probabilities.detach())

    ranking = probabilities if config.rank == "probabilities" else logits
    kept, dropped = decisions.once(
        "kept tokens", lambda: select(ranking[:, :candidates], kept_count))
    patches = x[:, prefix:]
    parts, origins = [x[:, :prefix], take(patches, kept)], [take(origin, kept)]
    if config.fuse != "none":
        weights = take(probabilities, dropped)
        if config.fuse == "normalised":
            weights = weights / weights.sum(1, keepdim=True)
        fused = weights.to(x.dtype).unsqueeze(1) @ take(patches, dropped)
        parts.append((fused + patches[:, -1:] if protected else fused).to(x.dtype))
        origins.append(torch.full_like(origin[:, :1], FUSED))
    shorter = Tokens(torch.cat(parts, 1), torch.cat(origins, 1), config.fuse != "none")
    return shorter, Dropped(origin, shorter.origin, probabilities.detach())
