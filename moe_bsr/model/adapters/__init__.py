"""Adapters: new layers that are added to a pretrained block. Each adapter is one file.

An adapter is a function `attach(block, options, seed) -> parameters`. It changes a timm block in place, so that the
block at first computes the same as before, and returns the new parameters. (`factored` computes only nearly the same.)
It can add its layers in three ways:

* A wrapper (`wrapped.py`) replaces a linear layer of the block, for example `attn.qkv`, and is called like it.
* A module named `BESIDE_FFN` gets the tokens before the FFN's norm, (B, N, D) -> (B, N, D). Its output is added to
  the output of the FFN.
* A module named `BESIDE_BLOCK` gets the input tokens of the block, without those that the block dropped. Its output
  is added to the output of the block.

To add an adapter, write a file here that registers it, and add the file's name to `_KINDS`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_bsr.config.registry import Choice, Registry


@dataclass(frozen=True, slots=True)
class Adapter:
    """A kind of adapter.

    Attributes:
        attach: (block, options, seed) -> the new parameters. None for a side network that reads the outputs of several
            blocks and changes none of them (`model/ladder.py`).
        merged_weight: (options, weight of the plain layer, tensors of the wrapper by name) -> weight of a plain layer
            that computes the same as the wrapper. None if the adapter does not wrap linear layers.
    """

    attach: Callable[[nn.Module, Any, tuple], list[nn.Parameter]] | None
    merged_weight: Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor] | None = None


ADAPTERS: Registry[Adapter] = Registry("adapter")

BESIDE_FFN = "beside_ffn"
BESIDE_BLOCK = "beside_block"

_KINDS = ("lora", "adaptformer", "repnet", "ladder", "factored")  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")


def is_beside(choice: Choice | None) -> bool:
    """Return whether a block's adapter is part of a side network, which does not change the block."""
    return choice is not None and ADAPTERS[choice.kind].attach is None


def attach(blocks: Sequence[nn.Module], choices: Sequence[Choice | None], seed: int) -> dict[int, list[nn.Parameter]]:
    """Add to each block the adapter chosen for it, and return the new parameters by block index."""
    parameters = {}
    for index, choice in enumerate(choices):
        if choice is not None and (into := ADAPTERS[choice.kind].attach) is not None:
            parameters[index] = into(blocks[index], choice.options, (seed, "adapter", index))
    return parameters
