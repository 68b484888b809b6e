"""Storage: what a block on the gradient path keeps for its backward pass; one file each.

A storage is a function `run(forward, tokens, parameters) -> (tokens, record)` that calls
`forward(tokens)` now and arranges what the backward pass will find; `parameters` are the block's trained
ones. Registering one makes it a value of the `storage` key. What a block decided (kept tokens, experts,
noise) is replayed by the block itself, so a storage may call `forward` again as often as it likes.
"""

from collections.abc import Callable

STORAGES: dict[str, Callable] = {}


def register(name: str) -> Callable[[Callable], Callable]:
    def add(run: Callable) -> Callable:
        STORAGES[name] = run
        return run
    return add


from moe_bsr.storage import exact, packed, recompute  # noqa: E402, F401  (they register themselves)
