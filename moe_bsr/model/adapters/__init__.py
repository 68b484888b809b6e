"""Adapters: what is added to a block beside its pretrained parameters; one file each.

An adapter is a function `attach(block, options, seed) -> parameters` that puts its layers into a timm block in
place, so that at the start the block computes what it did, and returns their parameters. Its layers stand in one of
three places. Either they take that of a layer they wrap: the block's forward calls whatever stands there. Or it is one
module under the name `BESIDE_FFN`, whose output is added to that of the FFN and which is given the stream before the
FFN's norm, (B, N, D) -> (B, N, D). Or one under `BESIDE_BLOCK`, whose output is added to the block's and which is given
the tokens that enter the block and are left by it. To add one, write a file here that registers it and name the file in
`_KINDS`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_bsr.config.registry import Choice, Registry


@dataclass(frozen=True, slots=True)
class Adapter:
    """Attributes:
    attach: (block, options, seed) -> the adapter's parameters. None: it stands beside all blocks, as a side network
        that reads what they leave (`model/ladder.py`).
    """

    attach: Callable[[nn.Module, Any, tuple], list[nn.Parameter]] | None


ADAPTERS: Registry[Adapter] = Registry("adapter")

BESIDE_FFN = "beside_ffn"
BESIDE_BLOCK = "beside_block"

_KINDS = ("lora", "adaptformer", "repnet", "ladder")  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")


def is_beside(choice: Choice | None) -> bool:
    """Whether a block's adapter is a part of a side network, which leaves the block as it is."""
    return choice is not None and ADAPTERS[choice.kind].attach is None


def attach(blocks: Sequence[nn.Module], choices: Sequence[Choice | None], seed: int) -> dict[int, list[nn.Parameter]]:
    """Put into each block the adapter chosen for it; returns their parameters by block."""
    parameters = {}
    for index, choice in enumerate(choices):
        if choice is not None and (into := ADAPTERS[choice.kind].attach) is not None:
            parameters[index] = into(blocks[index], choice.options, (seed, "adapter", index))
    return parameters
