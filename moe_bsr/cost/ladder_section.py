"""What a side network finds when the backbone has run: tensors without values, for the section in which it is traced.

The blocks' sections make what it reads and never let it go; the head's section, which does not make it, does.
"""

import torch

from moe_bsr.cost.sections import Stream
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Rung, count_kept


def empty_rungs(model: MultitaskViT, streams: list[Stream], device: torch.device) -> tuple[Rung, ...]:
    """Args:
    streams: that leave the embedding and each block.
    """
    ladder = model.ladder
    if ladder is None:
        return ()

    def read(stream: Stream) -> torch.Tensor:
        batch, tokens, width = stream.shape
        return torch.empty(batch, tokens, width // ladder.reduction, dtype=stream.dtype, device=device)

    rungs, protects = [Rung(read(streams[ladder.first]))], model.tokens_config.protect_fused
    for index in range(ladder.first, len(model.plan)):
        before = streams[index]
        # The last block, which drops nothing, hands on less than the ladder reads: the class token alone.
        leaving = streams[index + 1] if index + 1 < len(model.plan) else before
        rung = Rung(read(leaving) if ladder.reads(index) else None)
        batch, candidates = before.origin[0]
        kept = count_kept(candidates - (protects and before.fused), model.plan[index].keep_rate)
        if ladder.follows(index) and kept < candidates - (protects and before.fused):
            rung.kept = torch.empty(batch, kept, dtype=torch.int64, device=device)
            rung.scores = torch.empty(batch, candidates, device=device)
        rungs.append(rung)
    return tuple(rungs)
