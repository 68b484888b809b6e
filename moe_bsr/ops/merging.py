"""Merging similar tokens: which with which, and their means.

Bipartite soft matching, written from the description in Bolya et al. 2023, "Token Merging: Your ViT But Faster"
(arXiv 2210.09461), sections 3 and 4.

    B images, H heads, N tokens of which P prefix tokens (class, registers), d width of a head, D width,
    C = N - P candidates, K left
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.attention import split_heads
from moe_bsr.ops.tokens import select, take


def mean_keys(qkv: Tensor, heads: int) -> Tensor:
    """What tokens are compared by: the keys of (B, N, 3 H d) projections, mean over heads, (B, N, d) float32.

    No gradient goes through it.
    """
    return split_heads(qkv.detach(), heads)[1].mean(1, dtype=torch.float32)


def match(keys: Tensor, left: int) -> Tensor:
    """Which of the `left` tokens each candidate becomes: (B, C, d) -> (B, C) int64.

    Every second candidate, from the first on, is a source, the others are targets. Of each source the most similar
    target, by the cosine of their keys, is its partner, and the C - K sources that are most similar to theirs merge
    into them. Of equal ones the first counts. Left are the other sources and behind them the targets, both in their
    order.

    Args:
        left: K, at least half of C.
    """
    with torch.autocast(keys.device.type, enabled=False):
        keys = F.normalize(keys, dim=2)
        similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(2)
    candidates, targets = keys.shape[1], keys.shape[1] // 2
    alone = left - targets  # sources that stay
    _, stays = select(similarity, candidates - left)
    places = torch.arange(left, device=keys.device).expand(keys.shape[0], -1)
    of_sources = (partner + alone).scatter(1, stays, places[:, :alone])
    found = places.new_empty(keys.shape[0], candidates)
    found[:, ::2], found[:, 1::2] = of_sources, places[:, alone:]
    return found


def sum_at(values: Tensor, place: Tensor, left: int) -> Tensor:
    """Of (B, C) values those with the same place, added up: (B, K). All places are in 0 to K - 1."""
    return values.new_zeros(values.shape[0], left).scatter_add(1, place, values)


def merge_tokens(x: Tensor, place: Tensor, weights: Tensor, left: int, prefix: int) -> Tensor:
    """Prefix tokens, and the weighted sums of those that have the same place: (B, N, D) -> (B, P + K, D).

    Args:
        place: (B, C) int64 by candidate. weights: (B, C, 1), without a gradient.
    """
    if ops.is_reference() or x.device.type != "cpu":  # elsewhere sums of rows come in no fixed order
        return merge_tokens_reference(x, place, weights, left, prefix)
    return _MergeTokens.apply(x, place, weights, left, prefix)


def merge_tokens_reference(x: Tensor, place: Tensor, weights: Tensor, left: int, prefix: int) -> Tensor:
    """As a product with a (B, K, C) matrix."""
    shares = (place.unsqueeze(2) == torch.arange(left, device=x.device)).to(x.dtype) * weights.to(x.dtype)
    return torch.cat([x[:, :prefix], shares.transpose(1, 2) @ x[:, prefix:]], 1)


class _MergeTokens(torch.autograd.Function):
    """Saved for backward: the places and the weights, and nothing of the tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor, weights: Tensor, left: int, prefix: int) -> Tensor:
        ctx.save_for_backward(place, weights)
        ctx.prefix = prefix
        batch, tokens, width = x.shape[0], prefix + left, x.shape[2]
        merged = x.new_zeros(batch, tokens, width)
        merged[:, :prefix] = x[:, :prefix]
        rows = place + torch.arange(prefix, batch * tokens, tokens).unsqueeze(1)
        weighted = x[:, prefix:] * weights.to(x.dtype)
        merged.flatten(0, 1).index_add_(0, rows.flatten(), weighted.flatten(0, 1))
        return merged

    @staticmethod
    def backward(ctx, grad: Tensor):
        place, weights = ctx.saved_tensors
        of_candidates = take(grad[:, ctx.prefix :], place).mul_(weights.to(grad.dtype))
        return torch.cat([grad[:, : ctx.prefix], of_candidates], 1), None, None, None, None
