"""Storage: what a block on the gradient path keeps for its backward pass; one file each.

A storage is a function `run(forward, tokens, parameters) -> (tokens, record)` that calls
`forward(tokens)` now and arranges what the backward pass will find; `parameters` are the block's. A new one
registers itself and is named in `config.Storage`. What a block decided (kept tokens, experts, noise) is
replayed by the block itself, so a storage may call `forward` again as often as it likes, with `valued=False`
where it wants the graph and not the output.

What a storage costs it states beside its forward: `cost(ledger, part, x) -> (output, records, backward)`
retells the bytes, given a `part(x)` that retells the plain block's.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Storage:
    """Attributes:
    run: the forward under this storage. cost: its bytes. again: whether the block runs twice.
    """

    run: Callable
    cost: Callable
    again: bool = False


STORAGES: dict[str, Storage] = {}


def register(name: str, run: Callable, *, cost: Callable, again: bool = False) -> None:
    STORAGES[name] = Storage(run, cost, again)


from moe_bsr.model.storage import exact, packed, recompute
