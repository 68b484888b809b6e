"""An FFN with parallel low-rank experts as ONNX operators.

Fixed gates, which do not depend on the token, are multiplied into the experts' second layers. If all tasks have the
same gates, the experts become hidden units of the FFN, and the graph has a plain FFN that is wider by up to E r. If
each task has its own gates, the FFN stays shared, and the task's experts are computed beside it. Gates of a router are
computed in the graph.

    B images, N tokens, D width, E experts, K chosen, r rank
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.export.graph import Graph
from moe_bsr.export.layers import Names, activation, feed_forward, merged, product
from moe_bsr.export.mixture import route
from moe_bsr.model.low_rank import LowRankExperts
from moe_bsr.model.moe import MoE
from moe_bsr.model.routers import FixedGates


def low_rank(g: Graph, moe: MoE, x: str, width: int, task: str, names: Names, some: bool = False) -> str:
    """FFN and experts with the gates of a task, (B, N, D) -> (B, N, D).

    Args:
        some: whether the model has only some of the run's experts, selected for this task.
    """
    shared, experts = moe.shared, moe.experts
    assert shared is not None and isinstance(experts, LowRankExperts)
    if isinstance(moe.router, FixedGates):
        gates = moe.router.weight[task].detach()
        if all(torch.equal(gates, other) for other in moe.router.weight.values()):
            return feed_forward(g, widened(shared, experts, gates, names), x, names / "shared")
        y = feed_forward(g, shared, x, names / "shared")
        first, bias, second = _gated(experts, gates)
        own = Names(names.prefix + "experts.", task)
        h = activation(g, experts.act, product(g, x, first, bias, own / "fc1"), own / "act")
        return g.op("Add", y, product(g, h, second, None, own / "fc2"))
    y = feed_forward(g, shared, x, names / "shared")
    gates = _gates(g, moe, x, width, task, names)
    first, bias, second = _stacked(experts)
    inner = Names(names.prefix + "experts.", task) if some else names / "experts"
    h = activation(g, experts.act, product(g, x, first, bias, inner / "fc1"), inner / "act")
    by_expert = g.op("Reshape", h, g.constant([0, 0, len(experts.fc1_weight), -1]))
    h = g.op("Reshape", g.op("Mul", by_expert, gates), g.op("Shape", h))
    return g.op("Add", y, product(g, h, second, None, inner / "fc2"))


@torch.no_grad()
def widened(ffn: nn.Module, experts: LowRankExperts, gates: Tensor, names: Names) -> nn.Module:
    """Return a copy of the FFN with the gated experts as additional hidden units. It computes the same function."""
    wide = copy.deepcopy(ffn)
    first, bias, second = _gated(experts, gates)
    for name, more, dim in (("fc1", first, 0), ("fc2", second, 1)):
        weight, own_bias = merged(getattr(ffn, name), names / name)
        layer = nn.Linear(1, 1, bias=True)
        layer.weight = nn.Parameter(torch.cat([weight, more], dim))
        rows = torch.zeros(len(weight)) if own_bias is None else own_bias
        layer.bias = nn.Parameter(torch.cat([rows, bias]) if name == "fc1" else rows)
        setattr(wide, name, layer)
    return wide


def _stacked(experts: LowRankExperts) -> tuple[Tensor, Tensor, Tensor]:
    """Return first weights (E r, D), first biases (E r,) and second weights (D, E r) of all experts together."""
    return experts.fc1_weight.flatten(0, 1), experts.fc1_bias.flatten(), experts.fc2_weight.transpose(0, 1).flatten(1)


def _gated(experts: LowRankExperts, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for the experts with a gate above 0. The gates are multiplied into the second weights."""
    used = gates > 0
    first, second = experts.fc1_weight[used], experts.fc2_weight[used] * gates[used, None, None]
    return first.flatten(0, 1), experts.fc1_bias[used].flatten(), second.transpose(0, 1).flatten(1)


def _gates(g: Graph, moe: MoE, x: str, width: int, task: str, names: Names) -> str:
    """Tokens (B, N, D) -> gates (B, N, E, 1), or (B, 1, E, 1) for whole images; 0 for experts that are not chosen."""
    by_image = moe.gate == "image"
    routed = g.op("ReduceMean", x, g.constant([1]), keepdims=1) if by_image else x
    chosen, gates = route(g, moe, g.op("Reshape", routed, g.constant([-1, width])), width, task, names)
    count = len(moe.experts.fc1_weight)
    rows = g.op("Concat", g.op("Shape", chosen, start=0, end=1), g.constant([count]), axis=0)
    nothing = g.op("Expand", g.constant(0.0, np.float32), rows)
    whole = g.op("ScatterElements", nothing, chosen, gates, axis=1)  # (T, E)
    shape = g.op("Concat", g.op("Shape", routed, start=0, end=2), g.constant([count, 1]), axis=0)
    return g.op("Reshape", whole, shape)
