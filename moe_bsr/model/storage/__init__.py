"""Storages: how a block on the gradient path saves its activations for the backward pass. Each storage is one file.

A storage is a function `run(forward, tokens, parameters, options) -> (tokens, record)`. It calls `forward(tokens)` and
decides which tensors the backward pass will use. The block itself replays its choices (kept tokens, experts, noise), so
a storage may call `forward` again any number of times, with `needs_output=False` if it needs only the graph. To add a
storage, write a file here that registers it, and add the file's name to `_KINDS`.
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
    """A kind of storage.

    Attributes:
        run: runs a block's forward under this storage, see above.
        coarse: whether its gradients are so inexact that it is used only if the user asks for it.
    """

    run: Callable[[Forward, Tokens, list[nn.Parameter], Any], tuple[Tokens, Any]]
    coarse: bool = False


STORAGES: Registry[Storage] = Registry("storage")

# Files whose import registers what they define.
_KINDS = ("exact", "packed", "segments", "recompute", "offload", "back_razor", "subspace")
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
