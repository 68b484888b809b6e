"""AdamW with both moments in 8 bits (block-wise quantization after Dettmers et al. 2022, arXiv 2110.02861).

A parameter's values are split into blocks of 256. Each moment is stored as a code times the largest magnitude of its
block, so an outlier affects one block only. Codes are dense near zero: the first moment is the square of its code, the
second moment the fourth power of its code, because an update divides by its square root. No code of the second moment
means zero, so that no update becomes far too large.

Rounding to the nearest code would freeze the second moment, which changes by a thousandth per update. So the code is
rounded down after adding an offset in [0, 1), which follows a golden-ratio sequence over the updates: on average over
several updates the codes are right. The offset depends only on the number of the update, so a resumed run has the same
bits.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256  # values that share a scale
CHUNK = 256  # blocks updated at a time: they fit the cache, and no temporary is as large as a parameter
GOLDEN = (math.sqrt(5) - 1) / 2
FIRST, SECOND = 127.0, 255.0  # the largest codes of the moments
TINY = 1e-30


class AdamW8(torch.optim.Optimizer):
    """AdamW with quantized state.

    State of one parameter: `exp_avg` (blocks, 256) int8, `exp_avg_sq` (blocks, 256) uint8, one float32 scale per block
    for each of them, and the number of updates, `step`.
    """

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
    """Return the index of the first block of each chunk."""
    return range(0, blocks, CHUNK)


def layout(parameter: Tensor) -> list[tuple[str, Tensor]]:
    """Return the names of a parameter's state tensors, with meta tensors of their shapes and types."""
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
    """Reshape (values,) to (blocks, 256) float32, padded with zeros."""
    return nn.functional.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)


def encode_first(average: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Quantize first moments to int8 codes.

    Args:
        average: (blocks, 256). scale: (blocks, 1), the largest magnitude of each block.
        offset: in [0, 1), added before rounding down.
    """
    root = (average / scale.clamp_min(TINY)).abs_().sqrt_().copysign_(average)
    return root.mul_(FIRST).add_(offset).floor_().clamp_(-FIRST, FIRST).to(torch.int8)


def decode_first(codes: Tensor, scale: Tensor) -> Tensor:
    root = codes.float().div_(FIRST)
    return root.mul_(root.abs()).mul_(scale)


def encode_second(square: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Quantize second moments likewise, to uint8 codes of at least 1. The conversion to uint8 rounds down."""
    root = (square / scale.clamp_min(TINY)).sqrt_().sqrt_()
    return root.mul_(SECOND).add_(offset).clamp_(1, SECOND).to(torch.uint8)


def decode_second(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float().div_(SECOND).square_().square_().mul_(scale)
