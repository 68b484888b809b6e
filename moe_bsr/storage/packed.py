"""Keep activations in fewer bits: `bf16`, or `int8` with a scale for each channel of each image.

The forward pass is exact; only what the backward pass finds is rounded. Parameters, indices and small
per-token statistics stay as they are, and a tensor that several operations keep is packed once.
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moe_bsr.storage import register


class Rounded:
    """A tensor in bfloat16."""

    def __init__(self, x: Tensor) -> None:
        self.kept, self.dtype = x.to(torch.bfloat16), x.dtype

    def restore(self) -> Tensor:
        return self.kept.to(self.dtype)


class Quantised:
    """(..., N, D) in int8: symmetric, scaled to the largest magnitude of each channel over the N tokens.

    By channel, because a few channels of a ViT's residual stream are tens of times larger than the rest.
    """

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        # 126, not 127: rounding the scale to bfloat16 can then push no value over the edge.
        self.scale = (x.abs().amax(-2, keepdim=True) / 126).clamp_(min=1e-30).to(torch.bfloat16)
        self.kept = (x / self.scale).round_().to(torch.int8)

    def restore(self) -> Tensor:
        return (self.kept * self.scale).to(self.dtype)


def packable(x: Tensor) -> bool:
    """Activations: floating, no parameter, and wider than per-token statistics and gates."""
    return x.is_floating_point() and not isinstance(x, nn.Parameter) and x.ndim >= 2 and x.shape[-1] >= 16


def _run_packed(kind: type, forward, tokens):
    packed: dict[tuple, object] = {}
    alive: list[Tensor] = []  # while they are, no other tensor can have their address

    def pack(x: Tensor) -> object:
        if not packable(x):
            return x
        # The same values in another shape are the same values; strided ones are told apart by their strides.
        layout = x.numel() if x.is_contiguous() else (x.shape, x.stride())
        key = (x.data_ptr(), layout, x._version)
        if key not in packed:
            packed[key] = kind(x.detach())
            alive.append(x.detach())
        return packed[key], x.shape

    def unpack(kept: object) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].restore().view(kept[1])

    with saved_tensors_hooks(pack, unpack):
        result = forward(tokens)
    packed.clear()
    alive.clear()
    return result


@register("bf16")
def run_bf16(forward, tokens, parameters):
    return _run_packed(Rounded, forward, tokens)


@register("int8")
def run_int8(forward, tokens, parameters):
    return _run_packed(Quantised, forward, tokens)
