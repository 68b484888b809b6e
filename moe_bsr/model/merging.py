"""Token merging: replace similar tokens by their mean, weighted by how many patches each token stands for.

Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), written from the paper. Instead of dropping
tokens, a block merges up to half of them into others (`ops.merging.match`), until the same number remains. A token's
size is the number of patches it is made of. Sizes weight the means, and in every later block the logarithm of a key's
size is added to its attention logits ("proportional attention"). Prefix tokens are never merged. Shapes:

    B images, N tokens of which P prefix tokens (class, registers), D width, d width of a head,
    C = N - P candidates, K remaining tokens
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Dropped, Tokens, count_kept
from moe_bsr.ops.merging import match, merge_tokens, sum_at
from moe_bsr.ops.tokens import take


def sizes(tokens: Tokens) -> Tensor:
    """Return how many patches each token after the prefix is made of: (B, C) float32."""
    if tokens.place is None:
        return torch.ones_like(tokens.origin, dtype=torch.float32)
    return sum_at(torch.ones_like(tokens.place, dtype=torch.float32), tokens.place, tokens.origin.shape[1])


def log_sizes(tokens: Tokens) -> Tensor | None:
    """Return what the attention adds to each key's logits: (B, N) float32, 0 for the prefix; None before any merge."""
    if tokens.place is None:
        return None
    return F.pad(sizes(tokens).log(), (tokens.x.shape[1] - tokens.origin.shape[1], 0))


def merge(tokens: Tokens, keys: Tensor, keep_rate: float, prefix: int, replay: Replay) -> tuple[Tokens, Dropped]:
    """Merge the most similar tokens until the share `keep_rate` of the candidates remains.

    Gradients flow through the means, but not through the choice of tokens.

    Args:
        tokens: N tokens after the attention. keys: (B, N, d) float32, by which they are compared.
        keep_rate: from 0.5 to 1.
    Returns:
        The remaining tokens, and a record of what was merged. The tokens are unchanged if all would remain.
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
    """Repeat each merged token for every patch it is made of: (B, N, D) -> (B, P + patches, D).

    Heads that pool all tokens pool these, so that a token counts as often as its patches.
    """
    if tokens.place is None:
        return tokens.x
    prefix = tokens.x.shape[1] - tokens.origin.shape[1]
    return torch.cat([tokens.x[:, :prefix], take(tokens.x[:, prefix:], tokens.place)], 1)
