"""Make the fake inputs of a side network, which is traced in the head's section.

The blocks' sections allocate these tensors and do not release them. The head's section releases them without having
allocated them.
"""

import torch

from moe_bsr.cost.sections import Stream
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Rung, count_kept


def empty_rungs(model: MultitaskViT, streams: list[Stream], device: torch.device) -> tuple[Rung, ...]:
    """Return the rungs that the backbone leaves for the side network; empty if the model has none.

    Args:
        streams: the tokens that leave the embedding and each block.
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
        # The last block drops nothing. It may return only the class token, and the ladder reads all tokens.
        leaving = streams[index + 1] if index + 1 < len(model.plan) else before
        rung = Rung(read(leaving) if ladder.reads(index) else None)
        batch, candidates = before.origin[0]
        kept = count_kept(candidates - (protects and before.fused), model.plan[index].keep_rate)
        if ladder.follows(index) and kept < candidates - (protects and before.fused):
            rung.kept = torch.empty(batch, kept, dtype=torch.int64, device=device)
            rung.scores = torch.empty(batch, candidates, device=device)
        rungs.append(rung)
    return tuple(rungs)
