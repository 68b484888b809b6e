"""Linear layers in the compute dtype: no casts of what is constant, no detour on CPUs.

Under autocast, torch casts a frozen float32 weight anew in every step. Here frozen weights may be kept in
the compute dtype alone (`keep_in`), and trained ones are cast once a pass from their float32 masters. On a
CPU in bf16 the product goes to oneDNN with its bias; `F.linear` would first write the bias to the output
and then add the product to it (DeiT-S, 32 x 197 tokens, fc1, two cores: 3.1 -> 2.1 ms).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the blocks compute in: autocast's type, or the input's own without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def keep_in(layer: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen parameters of a layer in `dtype` alone: the values autocast would compute with."""
    for parameter in layer.parameters(recurse=False):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias of operands of one type, by the fastest kernel; outside of autograd."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Saved for backward: the input, if the weight trains. A cast weight is held beside it: a storage may
    treat what is saved as activations."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, ctx.needs_bias = ctx.needs_input_grad
        copy = weight.to(x.dtype)
        ctx.save_for_backward(x if needs_weight else None)
        ctx.weight = copy if needs_x else None
        return product(x, copy, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight = ctx.saved_tensors, ctx.weight
        flat = grad.flatten(0, -2)
        return (None if weight is None else (flat @ weight).view(*grad.shape[:-1], -1),
                None if x is None else flat.t() @ x.flatten(0, -2),
                flat.sum(0) if ctx.needs_bias else None)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """(..., in) -> (..., out) in the compute dtype."""
    return _Linear.apply(x.to(compute_dtype(x)), layer.weight, layer.bias)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = x.dtype
        return F.linear(x.float(), weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        return ((grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None,
                None if x is None else grad.t() @ x.float())


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of (T, in) in float32 whatever the type of x, which is kept as it came."""
    with torch.autocast(x.device.type, enabled=False):
        return _Float32Linear.apply(x, weight)
