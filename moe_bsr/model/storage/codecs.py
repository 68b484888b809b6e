"""Codecs, which hold an activation in fewer bytes. A codec is created from a tensor; `restore()` approximates it.

If a codec has a method `alike`, that packs several tensors that must be rounded in the same way.
"""

from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional


class Packed(Protocol):
    def restore(self) -> Tensor: ...


class BFloat16Packed:
    """A tensor packed in bfloat16."""

    def __init__(self, x: Tensor) -> None:
        self.kept, self.dtype = x.to(torch.bfloat16), x.dtype

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype)


class Int8Packed:
    """A tensor (..., N, D) packed in int8, symmetrically, scaled to each channel's largest magnitude over the N tokens.

    Each channel has a scale because a few channels of a ViT's residual stream are tens of times larger than the rest.

    Args:
        largest: (..., 1, D) magnitudes to which to scale, if several tensors share one scale.
    """

    # Not 127, so that values cannot overflow when the scale is rounded to bfloat16.
    LEVELS = 126

    def __init__(self, x: Tensor, largest: Tensor | None = None) -> None:
        self.dtype = x.dtype
        largest = largest_magnitudes(x) if largest is None else largest
        self.scale = (largest / self.LEVELS).clamp_(min=1e-30).to(torch.bfloat16)
        self.kept = (x / self.scale).round_().to(torch.int8)

    @classmethod
    def alike(cls, parts: list[Tensor]) -> list[Self]:
        largest = torch.stack([largest_magnitudes(part) for part in parts]).amax(0)
        return [cls(part, largest) for part in parts]

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype).mul_(self.scale)


class Int4Packed:
    """A tensor (..., N, D) packed in four bits: 16 levels from the smallest to the largest value of each channel.

    Two channels share a byte, (..., N, (D + 1) // 2) bytes. The first token is saved in bfloat16 and does not influence
    the levels: a class token is unlike the others, and most of the gradient comes through it.
    """

    LEVELS = 15

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.width = x.dtype, x.shape[-1]
        self.first = x[..., :1, :].to(torch.bfloat16, copy=True)
        others = x[..., 1:, :] if x.shape[-2] > 1 else x
        self.lowest = others.amin(-2, keepdim=True).to(torch.bfloat16)
        span = others.amax(-2, keepdim=True) - self.lowest
        self.scale = (span / self.LEVELS).clamp_(min=1e-30).to(torch.bfloat16)
        codes = ((x - self.lowest) / self.scale).round_().clamp_(0, self.LEVELS).to(torch.uint8)
        low, high = functional.pad(codes, (0, self.width % 2)).chunk(2, -1)
        self.kept = low | (high << 4)

    def restore(self) -> Tensor:
        both = torch.cat([self.kept & 15, self.kept >> 4], -1)[..., : self.width]
        x = both.to(self.dtype).mul_(self.scale).add_(self.lowest)
        x[..., :1, :] = self.first
        return x


def largest_magnitudes(x: Tensor) -> Tensor:
    """Return the largest magnitudes over tokens: (..., N, D) -> (..., 1, D)."""
    return x.abs().amax(-2, keepdim=True)


class Float16Packed:
    """A float32 tensor packed in float16. A tensor of a smaller dtype stays as it is."""

    def __init__(self, x: Tensor) -> None:
        self.kept, self.dtype = x.to(torch.float16) if x.dtype == torch.float32 else x, x.dtype

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype)


class Pruned:
    """The largest magnitudes of each image in 16 bits, and for every value a bit that says whether it was kept.

    Of v values, max(1, int(sparsity * v)) - 1 become 0. Exactly that many, even if magnitudes are equal, so the number
    of bytes does not depend on the values.

    Args:
        x: (B, ..., D), pruned image by image; or (R, D) rows that belong to no image, pruned as a whole.
        parts: number of parts into which the last dimension is cut. Each part is pruned separately.
    """

    def __init__(self, x: Tensor, sparsity: float, parts: int = 1) -> None:
        self.dtype, self.shape, self.parts = x.dtype, x.shape, parts
        groups = len(x) * parts if x.ndim > 2 else parts
        values = x.unflatten(-1, (parts, -1)).movedim(-2, 1 if x.ndim > 2 else 0).reshape(groups, -1)
        self.size = values.shape[1]
        kept = self.size + 1 - max(1, int(sparsity * self.size))
        places = values.abs().topk(kept, sorted=False).indices.sort(1).values
        self.values = values.gather(1, places).to(torch.float16 if x.dtype == torch.float32 else x.dtype)
        present = torch.zeros(groups, -(-self.size // 8) * 8, dtype=torch.uint8, device=x.device)
        present.scatter_(1, places, torch.ones_like(places, dtype=torch.uint8))
        self.present = (present.unflatten(1, (-1, 8)) << self._bits()).sum(2, dtype=torch.uint8)

    def restore(self) -> Tensor:
        present = (self.present.unsqueeze(2) >> self._bits()) & 1
        present = present.flatten(1)[:, : self.size].bool()
        values = torch.zeros(present.shape, dtype=self.dtype, device=present.device)
        values.masked_scatter_(present, self.values.to(self.dtype))
        cut = (*self.shape[:-1], self.shape[-1] // self.parts)
        images = len(self.shape) > 2
        grouped = (cut[0], self.parts, *cut[1:]) if images else (self.parts, *cut)
        return values.view(grouped).movedim(1 if images else 0, -2).reshape(self.shape)

    def _bits(self) -> Tensor:
        return torch.arange(8, dtype=torch.uint8, device=self.values.device)
