"""Adapters: what is added to a block beside its pretrained parameters; one file each.

An adapter is a function `attach(block, options, seed) -> parameters` that puts its layers into a timm block in
place, so that at the start the block computes what it did, and returns their parameters. Its layers stand in one of
two places. Either they take that of a layer they wrap: the block's forward calls whatever stands there. Or it is one
module under the name `BESIDE_FFN`, whose output is added to that of the FFN and which is given the stream before the
FFN's norm, (B, N, D) -> (B, N, D). To add one, write a file here that registers it and name the file in `_KINDS`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_bsr.config.registry import Registry


@dataclass(frozen=True, slots=True)
class Adapter:
    """Attributes:
    attach: (block, options, seed) -> the adapter's parameters.
    """

    attach: Callable[[nn.Module, Any, tuple], list[nn.Parameter]]


ADAPTERS: Registry[Adapter] = Registry("adapter")

BESIDE_FFN = "beside_ffn"

_KINDS = ("lora", "adaptformer")  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
