"""All low-rank experts as one two-layer network whose hidden units are gated in groups.

Each expert has r hidden units. The units of all experts are computed for every token and multiplied by the gate of
their expert, which is 0 for experts that were not chosen. As long as E r is at most D times the number of chosen
experts, this is cheaper than sorting tokens by expert: a gather would move more values than the products have.

    T tokens, D width, E experts, r rank
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_bsr import ops
from moe_bsr.ops.keep import ACTIVATION_INPUTS, keep
from moe_bsr.ops.linear import activation_backward, empty_output, input_gradient, linear_reference, product


def gated_linear(act: nn.Module, h: Tensor, gates: Tensor, weight: Tensor, needs_output: bool = True) -> Tensor:
    """Compute the sum over e of gates[:, e] act(h[:, e]) weight[e]^T.

    Args:
        h: (T, E r) in the compute dtype, expert by expert. gates: (T, E) float32. weight: (E, D, r).
        needs_output: False if only the graph is needed; the product is then skipped.
    Returns:
        (T, D).
    """
    if ops.is_reference():
        return linear_reference(_gated(act(h), gates), _in_one(weight), None)
    return _GatedLinear.apply(act, h, gates, weight, needs_output)


def _in_one(weight: Tensor) -> Tensor:
    """(E, D, r) -> (D, E r)."""
    return weight.transpose(0, 1).flatten(1)


def _by_expert(x: Tensor, gates: Tensor) -> Tensor:
    """(T, E r) -> (T, E, r)."""
    return x.view(*gates.shape, -1)


def _gated(x: Tensor, gates: Tensor) -> Tensor:
    return (_by_expert(x, gates) * gates.to(x.dtype).unsqueeze(-1)).flatten(1)


class _GatedLinear(torch.autograd.Function):
    """Saved for backward: h, the gates and the weight. The gated activations are computed again."""

    @staticmethod
    def forward(ctx, act: nn.Module, h: Tensor, gates: Tensor, weight: Tensor, needs_output: bool) -> Tensor:
        # Gates are saved as a column (T, E, 1), which no storage compresses.
        ctx.save_for_backward(keep(ACTIVATION_INPUTS, h), gates.unsqueeze(-1), weight)
        ctx.act = act
        if not needs_output:
            return empty_output(h, weight.shape[1])
        return product(_gated(act(h), gates), _in_one(weight.to(h.dtype)), repeats=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, column, weight = ctx.saved_tensors
        gates, activated = column.squeeze(-1), ctx.act(h)
        grad_weight = None
        if ctx.needs_input_grad[3]:
            grad_weight = (grad.t() @ _gated(activated, gates)).unflatten(1, (len(weight), -1)).transpose(0, 1)
        by_expert = _by_expert(input_gradient(grad, _in_one(weight.to(h.dtype))), gates)
        grad_gates = None
        if ctx.needs_input_grad[2]:
            grad_gates = (by_expert * _by_expert(activated, gates)).sum(-1, dtype=gates.dtype)
        del activated
        by_expert = by_expert * column.to(h.dtype)
        return None, activation_backward(ctx.act, h, by_expert.flatten(1)), grad_gates, grad_weight, None
