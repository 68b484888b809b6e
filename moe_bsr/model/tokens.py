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
from moe_bsr.model.replay import Replay
from moe_bsr.ops.tokens import reduce_tokens, select, take

FUSED = -1  # what the trace says of a fused token
KEPT_TOKENS = "kept tokens"  # a block's choice: positions after the prefix of those kept, and of the others


@dataclass(slots=True)
class Tokens:
    """The residual stream and where its tokens came from.

    Attributes:
        x: (B, N, D) features, prefix tokens first; of a convolutional network (B, C, H, W) maps, without a trace.
        origin: (B, N - P) int64 index of the original patch of each token after the prefix; -1 = fused; of a merged
            one the first of its patches. Behind a block that leaves the class token alone, of those that entered it.
            None of maps.
        fused: whether the last token is a fused one.
        place: (B, patches) int64, which token after the prefix each patch of the image is part of; None while nothing
            was merged.
        read: (B, ...) class tokens of blocks before, for heads that read them; `run_block` hands them on.
        rungs: what blocks before left for a side network (`ladder.py`); `run_block` adds to them.
    """

    x: Tensor
    origin: Tensor | None
    fused: bool = False
    place: Tensor | None = None
    read: Tensor | None = None
    rungs: "tuple[Rung, ...]" = ()

    @property
    def trace(self) -> tuple[Tensor | None, bool, Tensor | None]:
        """Where the tokens came from: `Tokens(x, *trace)` has it of other features."""
        return self.origin, self.fused, self.place

    def first(self) -> "Tokens":
        """The first token alone, (B, 1, D), with the trace of all."""
        return Tokens(self.x[:, :1], *self.trace)

    def add(self, branch: Tensor) -> "Tokens":
        """The stream with a branch's output (B, N, D) added."""
        return Tokens(self.x + branch, *self.trace)


@dataclass(slots=True)
class Dropped:
    """What was done where tokens are dropped or merged, for views and statistics; everything detached.

    Attributes:
        origin_in: (B, C) original patch of every candidate, -1 = the fused token of an earlier drop.
        origin: (B, N' - P) the same after the drop.
        scores: (B, C) float32 attention of the class token, mean over heads; None where tokens are merged.
        place: as of `Tokens`, after it.
    """

    origin_in: Tensor
    origin: Tensor
    scores: Tensor | None = None
    place: Tensor | None = None


@dataclass(slots=True)
class Rung:
    """What a side network reads of one block, or of the tokens that enter the first.

    Attributes:
        read: (B, N, d) of the tokens that the block leaves; None of a block without a side block.
        kept, scores: (B, K) positions after the prefix that the block kept, and (B, C) its scores of all; None if it
            dropped nothing, or nobody follows it.
    """

    read: Tensor | None
    kept: Tensor | None = None
    scores: Tensor | None = None


def count_kept(candidates: int, keep_rate: float) -> int:
    """K = max(1, ceil(keep_rate * C)). 197 tokens at 0.5: 196 -> 98."""
    # The rounding keeps binary fractions honest: 0.07 * 100 is 7, not 7.000000000000001.
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
        tokens: N tokens after the attention. probabilities, logits: (B, N) float32 scores of them.
        keep_rate: share of the candidates to keep, in (0, 1].
    Returns:
        The shorter stream and what was done. If everything would be kept, the stream unchanged.
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
    if protected:  # the fused token of an earlier drop, the last one, is added as it is
        dropped = torch.cat([dropped, torch.full_like(dropped[:, :1], candidates)], 1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
    shorter = reduce_tokens(x, kept, dropped, None if weights is None else weights.to(x.dtype), prefix)
    after = Tokens(shorter, torch.cat(origins, 1), weights is not None)
    return after, Dropped(origin, after.origin, probabilities.detach())
