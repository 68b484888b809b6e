"""What a forward pass decided, so that recomputation replays it instead of deciding again.

Kept tokens, chosen experts and gate noise are discrete or random: recomputing them from a slightly
different input (an int8 copy of the block input changes about 1.4 % of the expert choices) would make
the backward pass differentiate another network than the one that ran. Each block's forward asks a
`Replay` for every choice it makes; the first pass decides, any later pass reads.

Whoever compares two whole passes through slightly different weights has the first decide for both (`deciding_once`).
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
        """The choice `name`: made by `decide` (outside the graph) at first, the same ever after."""
        if name not in self._made:
            with torch.no_grad():
                self._made[name] = decide()
        return self._made[name]

    def made(self, name: str) -> Any:
        """The choice `name`, or None if none was made."""
        return self._made.get(name)


_shared: ContextVar[dict[int, Replay] | None] = ContextVar("replays", default=None)


@contextmanager
def deciding_once() -> Iterator[None]:
    """Within, the first forward pass of a model decides, and those that follow replay its choices."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def replay_of(block: int) -> Replay:
    """The choices of a block in a forward pass that begins."""
    shared = _shared.get()
    return Replay() if shared is None else shared.setdefault(block, Replay())
