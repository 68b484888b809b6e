"""What a forward pass decided, so that recomputation replays it instead of deciding again.

Kept tokens, chosen experts and gate noise are discrete or random: recomputing them from a slightly
different input (an int8 copy of the block input changes about 1.4 % of the expert choices) would make
the backward pass differentiate another network than the one that ran. Each block's forward asks a
`Replay` for every choice it makes; the first pass decides, any later pass reads.
"""

from collections.abc import Callable
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
