"""Softmax over few values per row, such as the experts of a router, whose saved result no storage compresses."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_bsr import ops


def narrow_softmax(x: Tensor) -> Tensor:
    """Compute the softmax over the last dimension: (..., E) -> (..., E).

    Its result is saved as columns (..., E, 1). In eight bits with a scale for each expert, equal experts would appear
    to differ in the gradient of the router.
    """
    return x.softmax(-1) if ops.is_reference() else _NarrowSoftmax.apply(x)


class _NarrowSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(y.unsqueeze(-1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (columns,) = ctx.saved_tensors
        y = columns.squeeze(-1)
        return torch.ops.aten._softmax_backward_data(grad, y, -1, y.dtype)
