"""Convolutions followed by a batch norm with fixed statistics, and ReLUs that save one bit per value.

A batch norm with fixed statistics is an affine map of each channel. It is therefore folded into the convolution before
it, and needs neither a pass nor saved tensors of its own. The folded weight is computed in the forward pass, again in
the backward pass, and never saved. The gradient of the norm's scale follows from that of the folded weight, so a
trained norm saves nothing either.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.linear import compute_dtype

ONES = 0x0101010101010101
ONE_BIT_EACH = 0x8040201008040201 - (1 << 64)  # mask: bit 0 of the lowest byte, bit 1 of the next byte, ...
GATHER = 0x0102040810204080  # eight bytes of 0 or 1, times this, have their bits in the product's highest byte


def normed_convolution(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Compute norm(conv(x)) with the norm's running statistics, in the compute dtype.

    Saved for backward: x, if the convolution's weight or the norm's scale trains.

    Args:
        x: (B, C, H, W). conv: must have no bias.
    Returns:
        (B, C', H', W').
    """
    x = x.to(compute_dtype(x))
    if ops.is_reference():
        return normed_convolution_reference(x, conv, norm)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return _NormedConvolution.apply(x, conv.weight, scale, shift, conv)


def normed_convolution_reference(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = _convolution(x, conv.weight.to(x.dtype), None, conv)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def relu(x: Tensor) -> Tensor:
    """Compute max(x, 0) in place. Saved for backward: one bit per value."""
    return F.relu(x) if ops.is_reference() else _ReLU.apply(x)


def pack_bits(true: Tensor) -> Tensor:
    """Pack n booleans of any shape into (ceil(n / 8),) uint8."""
    flat = true.reshape(-1)
    flat = F.pad(flat, (0, -len(flat) % 8)) if len(flat) % 8 else flat
    return (flat.view(torch.int64) * GATHER >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the booleans that `pack_bits` packed."""
    spread = bits.to(torch.int64).mul_(ONES).bitwise_and_(ONE_BIT_EACH)
    return spread.view(torch.uint8)[: shape.numel()].view(shape).ne(0)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


def _folded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype)


class _NormedConvolution(torch.autograd.Function):
    """(x, weight, scale, shift) -> conv(x, scale weight) + shift.

    Saved for backward: weight, scale, and x only if weight or scale needs a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, weight, scale)
        return _convolution(x, _folded(weight, scale, x.dtype), shift.to(x.dtype), conv)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_scale, needs_shift, _ = ctx.needs_input_grad
        conv = ctx.conv
        # The gradient of x needs the shape of x, not its values.
        like = grad.new_empty(1).expand(ctx.shape) if x is None else x
        grad_x, grad_folded, grad_shift = torch.ops.aten.convolution_backward(
            grad,
            like,
            _folded(weight, scale, grad.dtype),
            [len(weight)],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            (needs_x, x is not None, needs_shift and x is not None),
        )
        if needs_shift and x is None:  # the operator would compute the weight's gradient too
            grad_shift = grad.sum((0, 2, 3))
        grad_weight = grad_scale = None
        if grad_folded is not None:
            grad_folded = grad_folded.to(scale.dtype)
            grad_scale = (grad_folded * weight).sum((1, 2, 3)) if needs_scale else None
            grad_weight = grad_folded.mul_(scale.view(-1, 1, 1, 1)).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, grad_scale, None if grad_shift is None else grad_shift.to(scale.dtype), None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.relu_()
        ctx.mark_dirty(y)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_bits(y > 0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (bits,) = ctx.saved_tensors
        return grad * unpack_bits(bits, grad.shape)
