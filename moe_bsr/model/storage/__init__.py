"""Storage: what a block on the gradient path saves for its backward pass; one file each.

A storage is a function `run(forward, tokens, parameters, options) -> (tokens, record)` that calls
`forward(tokens)` now and arranges what the backward pass will find. What a block decided (kept tokens, experts,
noise) is replayed by the block itself, so a storage may call `forward` again as often as it likes, with
`needs_output=False` where it wants the graph and not the output. To add one, write a file here that registers it
and name the file in `_KINDS`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_bsr.config.registry import Registry
from moe_bsr.model.tokens import Tokens

Forward = Callable[..., tuple[Tokens, Any]]  # (tokens, needs_output=True) -> (tokens, the block's record)


@dataclass(frozen=True, slots=True)
class Storage:
    """Attributes:
    run: the forward under this storage.
    recomputes: whether the block runs a second time, in the backward pass.
    coarse: whether its gradients are so far off that nobody is to have it who did not ask for it.
    """

    run: Callable[[Forward, Tokens, list[nn.Parameter], Any], tuple[Tokens, Any]]
    recomputes: bool = False
    coarse: bool = False


STORAGES: Registry[Storage] = Registry("storage")

# Files whose import registers what they define.
_KINDS = ("exact", "packed", "segments", "recompute", "offload", "back_razor", "subspace")
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
