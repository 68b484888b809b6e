"""Keep the block input alone and run the block again in the backward pass.

Chen et al. 2016, "Training deep nets with sublinear memory cost". One more forward of the block for
nearly all of its activation memory; gradients are identical, because everything the block decided is
replayed and nothing in it draws random numbers. `recompute_int8` keeps the input itself in eight bits.
"""

import torch
from torch import Tensor

from moe_bsr.storage import register
from moe_bsr.storage.packed import Quantised
from moe_bsr.tokens import Tokens


class Again(torch.autograd.Function):
    """(x, parameters) -> the block's tokens and what of its record has a gradient.

    Unlike `torch.utils.checkpoint` the first pass builds no graph, so nothing of it outlives the call.
    """

    @staticmethod
    def forward(ctx, forward, tokens: Tokens, report: dict, pack, x: Tensor, *parameters: Tensor):
        ctx.forward, ctx.origin, ctx.fused = forward, tokens.origin, tokens.fused
        ctx.autocast = {"device_type": x.device.type, "dtype": torch.get_autocast_dtype(x.device.type),
                        "enabled": torch.is_autocast_enabled(x.device.type)}
        ctx.packed = None if pack is None else pack(x)
        ctx.save_for_backward(x if pack is None else None, *parameters)
        after, record = forward(Tokens(x, tokens.origin, tokens.fused))
        report["tokens"], report["record"] = after, record
        return tuple(_differentiable(after, record))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        kept, *parameters = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[4]
        x = (ctx.packed.restore() if kept is None else kept.detach()).requires_grad_(needs_x)
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = _differentiable(*ctx.forward(Tokens(x, ctx.origin, ctx.fused)))
        wanted = [x, *parameters] if needs_x else parameters
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        return None, None, None, None, *([] if needs_x else [None]), *found


def _differentiable(tokens: Tokens, record) -> list[Tensor]:
    routing = record.routing
    return [tokens.x] + ([] if routing is None else [routing.importance, routing.load])


def _run(pack, forward, tokens, parameters):
    report: dict = {}
    x, *amounts = Again.apply(forward, tokens, report, pack, tokens.x, *parameters)
    after, record = report["tokens"], report["record"]
    if amounts:
        record.routing.importance, record.routing.load = amounts
    return Tokens(x, after.origin, after.fused), record


@register("recompute")
def run(forward, tokens, parameters):
    return _run(None, forward, tokens, parameters)


@register("recompute_int8")
def run_int8(forward, tokens, parameters):
    return _run(Quantised, forward, tokens, parameters)
