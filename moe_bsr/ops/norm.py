"""Layer normalization whose result need not be kept for the layer behind it.

A norm that is followed by a linear layer that trains would keep its input, and the layer its result: the same
values twice. Here only the input is kept, and the result is computed from it once more where it is needed, by
the same kernel, to the same bits.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.keep import NORM_INPUTS, keep, norm_derived


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(..., D) over its last dimension, in the type of x."""
    if ops.is_reference():
        return layer_norm_reference(x, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _normalize(weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean and reciprocal standard deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _normalize_again(weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> Tensor:
    return _normalize(weight, bias, eps, x)[0]


class _LayerNorm(torch.autograd.Function):
    """Saved for backward: the input, and mean and deviation of each token, as columns."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _normalize(weight, bias, eps, x)
        if any(ctx.needs_input_grad):  # otherwise nothing of it is kept
            ctx.save_for_backward(keep(NORM_INPUTS, x), weight, bias, mean, rstd)
            norm_derived(y, x, partial(_normalize_again, weight, bias, eps))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, mask), None
