"""Record the choices of a forward pass, so that recomputation replays them.

Kept tokens, chosen experts and gate noise are discrete or random. If they were recomputed from a slightly different
input (an int8 copy of the block input changes about 1.4 % of the expert choices), the backward pass would differentiate
another network than the one that ran. Each block's forward therefore makes every choice through a `Replay`: the first
pass records it, later passes read it.

To compare two forward passes with slightly different weights, let both use the choices of the first (`deciding_once`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Choice = TypeVar("Choice")


class Replay:
    """The choices of one block in one forward pass, by name."""

    def __init__(self) -> None:
        self._made: dict[str, object] = {}

    def record(self, name: str, decide: Callable[[], Choice]) -> Choice:
        """Return the choice `name`. The first call computes it with `decide`, outside the graph."""
        if name not in self._made:
            with torch.no_grad():
                self._made[name] = decide()
        return self._made[name]

    def made(self, name: str) -> Any:
        """Return the choice `name`, or None if it was not made."""
        return self._made.get(name)


_shared: ContextVar[dict[int, Replay] | None] = ContextVar("replays", default=None)


@contextmanager
def deciding_once() -> Iterator[None]:
    """Context in which the first forward pass of a model makes the choices, and all later passes replay them."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def replay_of(block: int) -> Replay:
    """Return the `Replay` of a block for a new forward pass."""
    shared = _shared.get()
    return Replay() if shared is None else shared.setdefault(block, Replay())
