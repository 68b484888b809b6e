"""Decide when two modules are alike: for the same input they allocate the same memory."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.model.layers import has_hooks


def fingerprint(
    modules: dict[str, nn.Module], task: str, tasks: list[str], dtype: Callable[[Tensor], torch.dtype]
) -> tuple[dict[str, str], tuple]:
    """Return a key that differs between modules that may allocate differently.

    Args:
        modules: by name. task: the task that is traced; parameters of other tasks are left out.
        dtype: function that returns the dtype of a parameter or buffer while training.

    Returns:
        A dictionary from each parameter's name to the same name without the task's, and the key.
    """
    key: list[Any] = []
    names: dict[str, str] = {}
    for prefix, module in modules.items():
        by_task = isinstance(module, nn.ParameterDict) and set(module.keys()) == set(tasks)
        alike = prefix.replace(f"heads.{task}", "heads.*")
        key += (alike, type(module), has_hooks(module))
        for name, value in vars(module).items():
            if name[0] != "_":
                key += (name, _plain(value))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or by_task and name != task:
                continue
            if isinstance(tensor, nn.Parameter):
                names[f"{prefix}.{name}".removeprefix(".")] = f"{alike}.{'*' if by_task else name}"
            key += (name if not by_task else "*", tensor.shape, dtype(tensor), tensor.requires_grad)
    return names, tuple(key)


def _plain(value: Any) -> Hashable:
    """Return a module's attribute as part of a key: plain values as they are, objects by their type."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | type):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return getattr(value, "__qualname__", None) or (repr(value) if dataclasses.is_dataclass(value) else type(value))
