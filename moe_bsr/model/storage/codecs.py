"""Codecs: how one activation is kept in fewer bytes. Made from a tensor; `restore()` gives an approximation of it.

A codec with `alike` packs several tensors that are parts of one and must be rounded in the same way.
"""

from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    def restore(self) -> Tensor: ...


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

    @classmethod
    def alike(cls, parts: list[Tensor]) -> list["Int8Packed"]:
        largest = torch.stack([largest_magnitudes(part) for part in parts]).amax(0)
        return [cls(part, largest) for part in parts]

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype).mul_(self.scale)


def largest_magnitudes(x: Tensor) -> Tensor:
    """(..., N, D) -> (..., 1, D)."""
    return x.abs().amax(-2, keepdim=True)
