"""Layer normalization whose result need not be saved for the next layer.

Before a trained linear layer, autograd saves both the norm's input and its result. Here only the input is saved. The
result is computed from it again in the backward pass, by the same kernel, to the same bits.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.keep import NORM_INPUTS, keep, norm_derived


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize (..., D) over the last dimension, in the dtype of x."""
    if ops.is_reference():
        return layer_norm_reference(x, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _normalize(weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the mean and the reciprocal standard deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _normalize_again(weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> Tensor:
    return _normalize(weight, bias, eps, x)[0]


class _LayerNorm(torch.autograd.Function):
    """Saved for backward: the input, and each token's mean and reciprocal standard deviation as columns (..., 1)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _normalize(weight, bias, eps, x)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(keep(NORM_INPUTS, x), weight, bias, mean, rstd)
            norm_derived(y, x, partial(_normalize_again, weight, bias, eps))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, mask), None
