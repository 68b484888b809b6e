"""Linear layers in the compute dtype, without repeated casts of frozen weights and with faster products on CPUs.

Under autocast, torch casts a frozen float32 weight again in every step. Here frozen weights can be stored in the
compute dtype only (`MultitaskViT.cast_frozen_`), and trained weights are cast once per pass from their float32 masters.
On a CPU in bf16, oneDNN computes product and bias together; `F.linear` would first write the bias to the output and
then add the product to it (DeiT-S, 32 x 197 tokens, fc1, two cores: 3.1 -> 2.1 ms). On CPUs where MKL is slow, oneDNN
computes float32 products too.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.keep import ACTIVATION_INPUTS, LINEAR_INPUTS, keep, product_derived
from moe_bsr.runtime import cpu_features as cpu


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which blocks compute: autocast's, or without autocast that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x weight^T + bias in the compute dtype: (..., in) and (out, in) -> (..., out)."""
    x = x.to(compute_dtype(x))
    if ops.is_reference():
        return linear_reference(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def activated_linear(
    act: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, needs_output: bool = True
) -> Tensor:
    """Compute act(x) weight^T + bias, saving only x for the backward pass.

    As two operations, the activation would save x, and a trained linear layer act(x).

    Args:
        act: activation without parameters. x: (..., in) in the compute dtype.
        needs_output: False if only the graph is needed, as in recomputation. The product is then skipped, and the
            values returned are zeros.
    Returns:
        (..., out).
    """
    if ops.is_reference():
        return linear_reference(act(x), weight, bias)
    return _ActivatedLinear.apply(x, act, weight, bias, needs_output)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x weight^T of (T, in) in float32. x is saved in its own dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight) if ops.is_reference() else _Float32Linear.apply(x, weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, repeats: bool = False) -> Tensor:
    """Compute x weight^T + bias with the fastest kernel, outside autograd. All operands have the same dtype.

    Args:
        repeats: the same shapes occur again and again. oneDNN compiles a kernel for each new shape, which in float32
            does not pay for shapes that occur once.
    """
    if x.device.type == "cpu" and x.ndim > 1:
        bf16 = x.dtype == torch.bfloat16 and cpu.onednn_has_bf16()
        float32 = x.dtype == torch.float32 and repeats and cpu.mkl_is_slow()
        if (bf16 or float32) and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of x for y = x weight^T: (rows, out) and (out, in) -> (rows, in)."""
    return product(grad, weight.t(), repeats=True) if grad.dtype == torch.float32 else grad @ weight


def activation_backward(act: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of x, given that of act(x). For GELU it overwrites `grad`."""
    if isinstance(act, nn.GELU):
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=act.approximate, grad_input=grad)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = act(x)
    return torch.autograd.grad(y, x, grad)[0]


def empty_output(x: Tensor, width: int) -> Tensor:
    """Return zeros (..., width) that take no memory, in place of an output of x (..., in) that is not needed."""
    return x.new_zeros(()).expand(*x.shape[:-1], width)


def _product_again(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), repeats=True)


def _rows(x: Tensor) -> Tensor:
    """(..., width) -> (rows, width), a view where x is contiguous."""
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """Saved for backward: the input, if the weight trains, and the weight.

    The cast weight is an attribute of ctx instead of a saved tensor. The first backward pass can then free it, even if
    the output keeps the graph alive, and no storage takes it for an activation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, ctx.needs_bias = ctx.needs_input_grad
        cast = weight.to(x.dtype)
        ctx.save_for_backward(keep(LINEAR_INPUTS, x) if needs_weight else None, weight if needs_x else None)
        ctx.cast = cast if needs_x else None
        y = product(x, cast, None if bias is None else bias.to(x.dtype), repeats=True)
        return product_derived(y, x, partial(_product_again, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, weight), cast = ctx.saved_tensors, ctx.cast
        ctx.cast = None
        if cast is None and weight is not None:  # a second backward through the same graph
            cast = weight.to(grad.dtype)
        grad_rows = _rows(grad)
        grad_x = None if weight is None else input_gradient(grad_rows, cast).view(*grad.shape[:-1], weight.shape[1])
        grad_weight = None if x is None else grad_rows.t() @ _rows(x)
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.needs_bias else None


class _ActivatedLinear(torch.autograd.Function):
    """Saved for backward: x and the weight. The weight's gradient needs act(x), which is computed again."""

    @staticmethod
    def forward(ctx, x: Tensor, act: nn.Module, weight: Tensor, bias: Tensor | None, needs_output: bool) -> Tensor:
        ctx.save_for_backward(keep(ACTIVATION_INPUTS, x), weight)
        ctx.act = act
        if not needs_output:
            return empty_output(x, len(weight))
        return product(act(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), repeats=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_rows = _rows(grad)
        grad_weight = grad_rows.t() @ _rows(ctx.act(x)) if ctx.needs_input_grad[2] else None
        grad_act = input_gradient(grad_rows, weight.to(x.dtype)).view(x.shape)
        grad_x = activation_backward(ctx.act, x, grad_act)
        return grad_x, None, grad_weight, grad_rows.sum(0) if ctx.needs_input_grad[3] else None, None


class _Float32Linear(torch.autograd.Function):
    """Saved for backward: x in its own dtype, and the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keep(LINEAR_INPUTS, x) if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = x.dtype
        return F.linear(x.float(), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None if x is None else grad.t() @ x.float()
