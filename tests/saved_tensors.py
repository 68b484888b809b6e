"""Record what autograd saves, through its own hooks: a check of the meter in `moe_bsr.benchmark.measure`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_storages(run: Callable[[], Any], exclude: list[Tensor]) -> list[Tensor]:
    """Return the tensors that reach autograd's saved-tensor hooks while `run` runs, one per storage.

    Args:
        exclude: tensors whose storages are in memory anyway (parameters, buffers, the images).
    """
    saved: dict[int, Tensor] = {}
    known = {t.untyped_storage().data_ptr() for t in exclude}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            saved.setdefault(pointer, tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result  # kept alive until here, so that no address is reused
    return list(saved.values())
