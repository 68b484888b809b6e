"""Token merging: similar tokens become their mean, and attention knows how many patches each token stands for.

Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), written from the paper. Where tokens would
be dropped, half of them at most are merged into others instead (`ops.merging.match`), so that as many tokens are left.
A token weighs as much as the patches that it is made of: in the means, and in the attention of every later block
("proportional attention"), whose logits get the logarithm of each key's size. Prefix tokens are never merged. Shapes:

    B images, N tokens of which P prefix tokens (class, registers), D width, d width of a head,
    C = N - P candidates, K left
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Dropped, Tokens, count_kept
from moe_bsr.ops.merging import match, merge_tokens, sum_at
from moe_bsr.ops.tokens import take


def sizes(tokens: Tokens) -> Tensor:
    """How many patches each token after the prefix is made of: (B, C) float32."""
    if tokens.place is None:
        return torch.ones_like(tokens.origin, dtype=torch.float32)
    return sum_at(torch.ones_like(tokens.place, dtype=torch.float32), tokens.place, tokens.origin.shape[1])


def log_sizes(tokens: Tokens) -> Tensor | None:
    """What the attention adds to the logits of each key: (B, N) float32, 0 of prefix tokens; None before any merge."""
    if tokens.place is None:
        return None
    return F.pad(sizes(tokens).log(), (tokens.x.shape[1] - tokens.origin.shape[1], 0))


def merge(tokens: Tokens, keys: Tensor, keep_rate: float, prefix: int, replay: Replay) -> tuple[Tokens, Dropped]:
    """Merge the most similar tokens, until a share of them is left.

    Args:
        tokens: N tokens after the attention. keys: (B, N, d) float32, what they are compared by.
        keep_rate: share of the candidates that is left, from 0.5 to 1.
    Returns:
        The shorter stream and what was done. If everything would be left, the stream unchanged. Its gradient goes
        through the means; which tokens merge has none.
    """
    origin = tokens.origin
    left = count_kept(origin.shape[1], keep_rate)
    if left == origin.shape[1]:
        return tokens, Dropped(origin, origin, place=tokens.place)
    becomes = replay.record("merged tokens", lambda: match(keys[:, prefix:], left))
    before = sizes(tokens)
    weights = (before / take(sum_at(before, becomes, left), becomes)).unsqueeze(2)
    x = merge_tokens(tokens.x, becomes, weights, left, prefix)
    place = becomes if tokens.place is None else take(becomes, tokens.place)
    first = origin.new_full((origin.shape[0], left), place.shape[1]).scatter_reduce(1, becomes, origin, "amin")
    return Tokens(x, first, place=place), Dropped(origin, first, place=place)


def spread(tokens: Tokens) -> Tensor:
    """The features of every patch, of its token's where it was merged: (B, N, D) -> (B, P + patches, D).

    Whatever pools all tokens pools these, so that a token counts as often as the patches that it is made of.
    """
    if tokens.place is None:
        return tokens.x
    prefix = tokens.x.shape[1] - tokens.origin.shape[1]
    return torch.cat([tokens.x[:, :prefix], take(tokens.x[:, prefix:], tokens.place)], 1)
