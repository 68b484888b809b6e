"""Merge similar tokens: match them in pairs and compute their weighted means.

Bipartite soft matching, written from the description in Bolya et al. 2023, "Token Merging: Your ViT But Faster"
(arXiv 2210.09461), sections 3 and 4.

    B images, H heads, N tokens of which P prefix tokens (class, registers), d width of a head, D width,
    C = N - P candidates, K left
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.attention import split_heads
from moe_bsr.ops.tokens import select, take


def mean_keys(qkv: Tensor, heads: int) -> Tensor:
    """Return the features by which tokens are compared: their keys, mean over heads, detached.

    Args:
        qkv: (B, N, 3 H d) projections.
    Returns:
        (B, N, d) float32.
    """
    return split_heads(qkv.detach(), heads)[1].mean(1, dtype=torch.float32)


def match(keys: Tensor, left: int) -> Tensor:
    """Decide which of the K remaining tokens each candidate becomes.

    The candidates 0, 2, 4 ... are sources, the others targets. The partner of a source is the target whose key is most
    similar by cosine. The C - K sources most similar to their partners merge into them. Ties go to the lower index. The
    remaining tokens are first the unmerged sources, then the targets, each in their order.

    Args:
        keys: (B, C, d). left: K, at least half of C.
    Returns:
        (B, C) int64, the new position of each candidate, 0 to K - 1.
    """
    with torch.autocast(keys.device.type, enabled=False):
        keys = F.normalize(keys, dim=2)
        similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(2)
    candidates, targets = keys.shape[1], keys.shape[1] // 2
    unmerged = left - targets  # number of sources that stay
    _, stays = select(similarity, candidates - left)
    places = torch.arange(left, device=keys.device).expand(keys.shape[0], -1)
    of_sources = (partner + unmerged).scatter(1, stays, places[:, :unmerged])
    found = places.new_empty(keys.shape[0], candidates)
    found[:, ::2], found[:, 1::2] = of_sources, places[:, unmerged:]
    return found


def sum_at(values: Tensor, place: Tensor, left: int) -> Tensor:
    """Add up the values (B, C) that have the same place: (B, K). Places are 0 to K - 1."""
    return values.new_zeros(values.shape[0], left).scatter_add(1, place, values)


def merge_tokens(x: Tensor, place: Tensor, weights: Tensor, left: int, prefix: int) -> Tensor:
    """Keep the prefix tokens, and replace candidates that have the same place by their weighted sum.

    Args:
        x: (B, N, D). place: (B, C) int64, new position of each candidate. weights: (B, C, 1), without a gradient.
    Returns:
        (B, P + K, D).
    """
    if ops.is_reference() or x.device.type != "cpu":  # on other devices index_add_ adds in no fixed order
        return merge_tokens_reference(x, place, weights, left, prefix)
    return _MergeTokens.apply(x, place, weights, left, prefix)


def merge_tokens_reference(x: Tensor, place: Tensor, weights: Tensor, left: int, prefix: int) -> Tensor:
    """Compute the sums as a product with a (B, K, C) matrix."""
    shares = (place.unsqueeze(2) == torch.arange(left, device=x.device)).to(x.dtype) * weights.to(x.dtype)
    return torch.cat([x[:, :prefix], shares.transpose(1, 2) @ x[:, prefix:]], 1)


class _MergeTokens(torch.autograd.Function):
    """Saved for backward: the places and the weights, but no tokens."""

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
    @once_differentiable
    def backward(ctx, grad: Tensor):
        place, weights = ctx.saved_tensors
        of_candidates = take(grad[:, ctx.prefix :], place).mul_(weights.to(grad.dtype))
        return torch.cat([grad[:, : ctx.prefix], of_candidates], 1), None, None, None, None
