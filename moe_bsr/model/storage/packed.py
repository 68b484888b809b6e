"""Keep activations in fewer bits: `bf16`, or `int8` with a scale for each channel of each image.

The forward pass is exact; only what the backward pass finds is rounded. Parameters, indices and small
per-token statistics stay as they are (a function saves these as columns, (..., 1)), and a tensor that
several operations keep is packed once. All experts of a layer share their scales: rounded each in its own way,
equal experts would seem to differ, and routers would learn that.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.ops.experts import saved_alike

NARROW = 16  # values a token; what is narrower stays as it is


class BFloat16Packed:
    """A tensor in bfloat16."""

    def __init__(self, x: Tensor) -> None:
        self.kept, self.dtype = x.to(torch.bfloat16), x.dtype

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype)


class Int8Packed:
    """(..., N, D) in int8: symmetric, scaled to the largest magnitude of each channel over the N tokens.

    By channel, because a few channels of a ViT's residual stream are tens of times larger than the rest.

    Args:
        largest: (..., 1, D) magnitudes to scale to, where x is a part of what shares one scale.
    """

    def __init__(self, x: Tensor, largest: Tensor | None = None) -> None:
        self.dtype = x.dtype
        largest = largest_magnitudes(x) if largest is None else largest
        # 126, not 127: rounding the scale to bfloat16 can then push no value over the edge.
        self.scale = (largest / 126).clamp_(min=1e-30).to(torch.bfloat16)
        self.kept = (x / self.scale).round_().to(torch.int8)

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype).mul_(self.scale)


def largest_magnitudes(x: Tensor) -> Tensor:
    """(..., N, D) -> (..., 1, D)."""
    return x.abs().amax(-2, keepdim=True)


def packable(x: Tensor, weights: frozenset[tuple[int, ...]] = frozenset()) -> bool:
    """Activations: floating, no parameter or view of one, and wider than per-token statistics and gates.

    Args:
        weights: shapes of the block's own: autocast's copies of them are known by nothing else.
    """
    source = x if x._base is None else x._base
    return (
        x.is_floating_point()
        and not isinstance(source, nn.Parameter)
        and x.ndim >= 2
        and x.shape[-1] >= NARROW
        and tuple(x.shape) not in weights
    )


def _run_packed(kind: type, forward, tokens, parameters, options):
    weights = frozenset(
        shape for p in parameters if p.ndim >= 2 for shape in (tuple(p.shape), tuple(p.transpose(-2, -1).shape))
    )
    packed: dict[tuple, tuple[StorageWeakRef, object]] = {}

    alike: dict[int, Tensor] = {}  # by the address of what is packed next

    def see_alike(parts: list[Tensor]) -> None:
        if issubclass(kind, Int8Packed):
            largest = torch.stack([largest_magnitudes(part) for part in parts]).amax(0)
            alike.update((part.data_ptr(), largest) for part in parts)

    def pack(x: Tensor) -> object:
        shared = alike.pop(x.data_ptr(), None)
        if not packable(x, weights):
            return x
        # The same values in another shape are the same values; strided ones are told apart by their strides.
        layout = x.numel() if x.is_contiguous() else (x.shape, x.stride())
        key = (x.data_ptr(), layout, x._version)
        if key not in packed or packed[key][0].expired():  # an address may have been used again
            values = (x.detach(),) if shared is None else (x.detach(), shared)
            packed[key] = StorageWeakRef(x.untyped_storage()), kind(*values)
        return packed[key][1], x.shape

    def unpack(kept: object) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].restore().view(kept[1])

    with saved_tensors_hooks(pack, unpack), saved_alike(see_alike):
        result = forward(tokens)
    packed.clear()  # autograd holds on to `pack`
    return result


STORAGES.register("bf16")(Storage(partial(_run_packed, BFloat16Packed)))
STORAGES.register("int8")(Storage(partial(_run_packed, Int8Packed)))
