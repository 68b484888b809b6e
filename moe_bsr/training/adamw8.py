"""AdamW whose two moments take one byte each (after Dettmers et al. 2022, block-wise quantization, arXiv 2110.02861).

A parameter's values are cut into blocks of 256, and a block's moments are codes times its largest magnitude, so that an
outlier spoils one block. Codes are dense near zero: the first moment is the square of its code, the second the fourth
power, whose root an update divides by. No code of the second stands for zero, so that no update is far too large.

Rounding to the nearest code would freeze the second moment, which moves by a thousandth in an update. So codes are
rounded down after adding a number from [0, 1) that runs through a golden-ratio sequence with the updates: over some of
them they are right in the mean. It depends on the number of the update alone, and a resumed run is the same to the bit.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256  # values that share a scale
CHUNK = 256  # blocks that are updated at a time: few enough for the cache, and no copy is as large as a parameter
GOLDEN = (math.sqrt(5) - 1) / 2
FIRST, SECOND = 127.0, 255.0  # the largest codes of the moments
TINY = 1e-30


class AdamW8(torch.optim.Optimizer):
    """State of a parameter of n values: `exp_avg` (blocks, 256) int8, `exp_avg_sq` the same in uint8, a float32 scale
    for each block of either, and the number of updates."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update({key: torch.zeros_like(like, device=parameter.device) for key, like in layout(parameter)})
        state["step"] += 1
        updates = state["step"].double()
        (first, second), rate = group["betas"], group["lr"]
        size = (rate / (1 - first**updates)).float()
        correction = (1 - second**updates).sqrt().float()
        offset = (updates * GOLDEN % 1).float()
        values, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        values.mul_(1 - rate * group["weight_decay"])
        for start in starts(len(state["exp_avg"])):
            blocks = slice(start, start + CHUNK)
            part = slice(start * BLOCK, (start + CHUNK) * BLOCK)
            g = in_blocks(gradient[part])
            average = decode_first(state["exp_avg"][blocks], state["exp_avg_scale"][blocks]).lerp_(g, 1 - first)
            square = decode_second(state["exp_avg_sq"][blocks], state["exp_avg_sq_scale"][blocks])
            square.mul_(second).addcmul_(g, g, value=1 - second)
            state["exp_avg_scale"][blocks] = scale = average.abs().amax(1, keepdim=True)
            state["exp_avg"][blocks] = encode_first(average, scale, offset)
            state["exp_avg_sq_scale"][blocks] = scale = square.amax(1, keepdim=True)
            state["exp_avg_sq"][blocks] = encode_second(square, scale, offset)
            change = average.mul_(size).div_(square.sqrt_().div_(correction).add_(group["eps"]))
            values[part].sub_(change.view(-1)[: len(values[part])])


def starts(blocks: int) -> Sequence[int]:
    """The first block of each chunk."""
    return range(0, blocks, CHUNK)


def layout(parameter: Tensor) -> list[tuple[str, Tensor]]:
    """The state of a parameter: names, and tensors without values of its shapes and types."""
    blocks = -(-parameter.numel() // BLOCK)
    shapes = {
        "step": ((), torch.float32),
        "exp_avg": ((blocks, BLOCK), torch.int8),
        "exp_avg_scale": ((blocks, 1), torch.float32),
        "exp_avg_sq": ((blocks, BLOCK), torch.uint8),
        "exp_avg_sq_scale": ((blocks, 1), torch.float32),
    }
    return [(key, torch.empty(shape, dtype=dtype, device="meta")) for key, (shape, dtype) in shapes.items()]


def in_blocks(x: Tensor) -> Tensor:
    """(values,) -> (blocks, 256) float32, zeros behind the last."""
    return nn.functional.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)


def encode_first(average: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """(blocks, 256) first moments and (blocks, 1) magnitudes to scale by -> int8.

    Args:
        offset: from [0, 1), added before rounding down.
    """
    root = (average / scale.clamp_min(TINY)).abs_().sqrt_().copysign_(average)
    return root.mul_(FIRST).add_(offset).floor_().clamp_(-FIRST, FIRST).to(torch.int8)


def decode_first(codes: Tensor, scale: Tensor) -> Tensor:
    root = codes.float().div_(FIRST)
    return root.mul_(root.abs()).mul_(scale)


def encode_second(square: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """(blocks, 256) second moments and (blocks, 1) to scale by -> uint8, at least 1; the conversion rounds down."""
    root = (square / scale.clamp_min(TINY)).sqrt_().sqrt_()
    return root.mul_(SECOND).add_(offset).clamp_(1, SECOND).to(torch.uint8)


def decode_second(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float().div_(SECOND).square_().square_().mul_(scale)
