"""Adapters: what is added to a block beside its pretrained parameters; one file each.

An adapter is a function `attach(block, options, seed) -> parameters` that puts its layers into a timm block in
place, so that at the start the block computes what it did, and returns the parameters that train with it. Its
layers take the places of those they wrap: the block's forward calls whatever stands there. To add one, write a
file here that registers it and name the file in `_KINDS`.
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
    attach: (block, options, seed) -> the adapter's parameters, all of which train.
    """

    attach: Callable[[nn.Module, Any, tuple], list[nn.Parameter]]


ADAPTERS: Registry[Adapter] = Registry("adapter")

_KINDS = ("lora",)  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
