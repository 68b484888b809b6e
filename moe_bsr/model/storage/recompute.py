"""Save only the block input, and run the block again in the backward pass.

Chen et al. 2016, "Training deep nets with sublinear memory cost". This costs one more forward pass of the block, except
its last product, and saves nearly all of its activation memory. Gradients are identical, because the block's choices
are replayed and nothing in it draws random numbers. `recompute_int8` saves the input in eight bits. `recompute_int4`
saves it in four bits, except the first token: it needs the least memory of all storages, and its gradients are some
percent off.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import run_by_kind
from moe_bsr.model.storage.codecs import Int4Packed, Int8Packed
from moe_bsr.model.storage.exact import EXACT
from moe_bsr.model.tokens import Tokens


class Recompute(torch.autograd.Function):
    """(x, parameters) -> the block's tokens, and the parts of its record that have a gradient.

    The first pass builds no graph, so it leaves nothing in memory. (torch's non-reentrant checkpoint builds one.)
    """

    @staticmethod
    def forward(ctx, forward, tokens: Tokens, report: dict, pack, x: Tensor, *parameters: Tensor):
        ctx.forward, ctx.trace = forward, tokens.trace
        ctx.autocast = {
            "device_type": x.device.type,
            "dtype": torch.get_autocast_dtype(x.device.type),
            "enabled": torch.is_autocast_enabled(x.device.type),
        }
        ctx.packed = None if pack is None else pack(x)
        ctx.save_for_backward(x if pack is None else None, *parameters)
        after, record = forward(Tokens(x, *tokens.trace))
        report["tokens"], report["record"] = after, record
        return tuple(_differentiable(after, record))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        kept, *parameters = ctx.saved_tensors
        if kept is None and ctx.packed is None:
            raise RuntimeError(
                "second backward pass through a block with storage = recompute_int8 or recompute_int4, whose "
                "input is freed by the first; use recompute"
            )
        needs_x = ctx.needs_input_grad[4]
        x = (ctx.packed.restore() if kept is None else kept.detach()).requires_grad_(needs_x)
        ctx.packed = None
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            again = partial(ctx.forward, needs_output=False)
            outputs = _differentiable(*run_by_kind(EXACT, again, Tokens(x, *ctx.trace), parameters))
        pairs = [(get_gradient_edge(o), g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        del outputs  # only their edges in the graph are needed
        wanted = [x, *parameters] if needs_x else parameters
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        return None, None, None, None, *([] if needs_x else [None]), *found


def _differentiable(tokens: Tokens, record) -> list[Tensor]:
    routing = record.routing
    return [tokens.x] + ([] if routing is None else [routing.importance, routing.load])


def _run(pack, forward, tokens, parameters, options):
    report: dict = {}
    trained = [p for p in parameters if p.requires_grad]
    x, *amounts = Recompute.apply(forward, tokens, report, pack, tokens.x, *trained)
    after, record = report["tokens"], report["record"]
    if amounts:
        record.routing.importance, record.routing.load = amounts
    return Tokens(x, *after.trace), record


STORAGES.register("recompute")(Storage(partial(_run, None)))
STORAGES.register("recompute_int8")(Storage(partial(_run, Int8Packed)))
STORAGES.register("recompute_int4")(Storage(partial(_run, Int4Packed), coarse=True))
