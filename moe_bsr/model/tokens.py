"""Token dropping by class-token attention: score, select, fuse, trace (BSR section 4.1, after EViT).

In a drop block every patch token is scored by the attention that the class token pays to it. The best are kept in their
order, and the others are fused into one token, placed last. Shapes:

    B images, H heads, N tokens of which P prefix tokens (class, registers), D width,
    C = N - P candidates, K kept
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bsr.config import TokensConfig
from moe_bsr.model.replay import Replay
from moe_bsr.ops.tokens import reduce_tokens, select, take

FUSED = -1  # origin of a fused token
KEPT_TOKENS = "kept tokens"  # name of a recorded choice: positions after the prefix of kept and of dropped tokens


@dataclass(slots=True)
class Tokens:
    """Tokens between two blocks, and the patches of the image that they come from.

    Attributes:
        x: (B, N, D) features, prefix tokens first; in a convolutional network (B, C, H, W) maps.
        origin: (B, N - P) int64, original patch of each token after the prefix: -1 for a fused token, the first patch
            for a merged one. After a block that outputs only the class token, it describes the block's input. None for
            maps.
        fused: whether the last token is a fused one.
        place: (B, patches) int64, for each patch of the image the token after the prefix that contains it; None before
            any merge.
        class_tokens: (B, n D) of n earlier blocks, for heads that read them; `run_block` adds to them.
        rungs: outputs of earlier blocks for a side network (`ladder.py`); `run_block` adds to them.
    """

    x: Tensor
    origin: Tensor | None
    fused: bool = False
    place: Tensor | None = None
    class_tokens: Tensor | None = None
    rungs: "tuple[Rung, ...]" = ()

    @property
    def trace(self) -> tuple[Tensor | None, bool, Tensor | None]:
        """Return where the tokens come from. `Tokens(x, *trace)` gives new features the same origin."""
        return self.origin, self.fused, self.place

    def first(self) -> "Tokens":
        """Return only the first token, (B, 1, D), with the trace of all."""
        return Tokens(self.x[:, :1], *self.trace)

    def add(self, branch: Tensor) -> "Tokens":
        """Return the tokens with a residual branch (B, N, D) added."""
        return Tokens(self.x + branch, *self.trace)


@dataclass(slots=True)
class Dropped:
    """Record of a block that drops or merges tokens, for views and statistics. All tensors are detached.

    Attributes:
        origin_in: (B, C) original patch of every candidate, -1 for the fused token of an earlier drop.
        origin: (B, N' - P) the same for the remaining tokens.
        scores: (B, C) float32 attention of the class token, mean over heads; None if tokens are merged.
        place: as in `Tokens`, for the remaining tokens.
    """

    origin_in: Tensor
    origin: Tensor
    scores: Tensor | None = None
    place: Tensor | None = None


@dataclass(slots=True)
class Rung:
    """What a side network reads from one block, or from the input of the first.

    Attributes:
        read: (B, N, d) pooled output tokens of the block; None if it has no side block.
        kept, scores: (B, K) positions after the prefix that the block kept, and (B, C) its scores of all candidates;
            None if it dropped nothing or the side network ends before it.
    """

    read: Tensor | None
    kept: Tensor | None = None
    scores: Tensor | None = None


def count_kept(candidates: int, keep_rate: float) -> int:
    """Return K = max(1, ceil(keep_rate * C)). For example 196 candidates at 0.5 give 98."""
    # Rounding removes binary fractions: 0.07 * 100 is 7, not 7.000000000000001.
    return max(1, math.ceil(round(keep_rate * candidates, 6)))


def drop(
    tokens: Tokens,
    probabilities: Tensor,
    logits: Tensor,
    keep_rate: float,
    prefix: int,
    config: TokensConfig,
    replay: Replay,
) -> tuple[Tokens, Dropped]:
    """Keep the best-scored tokens and fuse the rest into one, placed last (BSR section 4.1).

    Args:
        tokens: N tokens after the attention. probabilities, logits: (B, N) float32, their scores.
        keep_rate: share of the candidates to keep, in (0, 1].
    Returns:
        The remaining tokens and a record of the drop. The tokens are unchanged if all would be kept.
    """
    x, origin = tokens.x, tokens.origin
    probabilities, logits = probabilities[:, prefix:], logits[:, prefix:]
    if config.detach_fusion_weights:
        probabilities = probabilities.detach()
    protected = config.protect_fused and tokens.fused
    candidates = origin.shape[1] - protected
    kept_count = count_kept(candidates, keep_rate)
    if kept_count == candidates:
        return tokens, Dropped(origin, origin, probabilities.detach())

    ranking = probabilities if config.rank_by == "probabilities" else logits
    kept, dropped = replay.record(KEPT_TOKENS, lambda: select(ranking[:, :candidates], kept_count))
    origins, weights = [take(origin, kept)], None
    if config.fuses:
        weights = take(probabilities.unsqueeze(2), dropped)
        if config.fuse == "normalized":
            weights = weights / weights.sum(1, keepdim=True)
        origins.append(torch.full_like(origin[:, :1], FUSED))
    if protected:  # add the fused token of an earlier drop, the last one, with weight 1
        dropped = torch.cat([dropped, torch.full_like(dropped[:, :1], candidates)], 1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
    shorter = reduce_tokens(x, kept, dropped, None if weights is None else weights.to(x.dtype), prefix)
    after = Tokens(shorter, torch.cat(origins, 1), weights is not None)
    return after, Dropped(origin, after.origin, probabilities.detach())
