"""A mixture of experts as ONNX operators. No token is dropped, and an expert computes only tokens that chose it.

Assignments are sorted by expert (the nonzeros of the transposed choice). Their tokens are split into one piece per
expert, of any length, and the outputs are gathered back. So everything but the experts' two matrix products is done
once per layer, unlike in a loop over the experts that selects and adds tokens for each.

    T tokens, D width, E experts, K chosen of a token, R = T K rows grouped by expert
"""

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.config import ConfigError
from moe_bsr.export.graph import Graph
from moe_bsr.export.layers import Names, activation, product
from moe_bsr.model.experts import Experts
from moe_bsr.model.moe import MoE


def mixture(g: Graph, moe: MoE, x: str, width: int, task: str, names: Names, experts: list[int]) -> str:
    """Mixture of experts with the router of a task, (B, N, D) -> (B, N, D).

    Args:
        experts: indices of the layer's experts in the run. Their tensors are named by them.
    """
    flat = g.op("Reshape", x, g.constant([-1, width]))
    chosen, gates = route(g, moe, flat if moe.gate != "image" else _pooled(g, x, width), width, task, names)
    if moe.gate == "image":
        chosen, gates = (_for_each_token(g, t, x, moe.top_k) for t in (chosen, gates))
    y = _experts(g, moe.experts, flat, chosen, names / "experts", experts)
    y = g.op("MatMul", g.op("Unsqueeze", gates, g.constant([1])), y)  # (T, 1, K) (T, K, D)
    return g.op("Reshape", y, g.op("Shape", x))


@torch.no_grad()
def affine(router: nn.Module, width: int, task: str) -> tuple[Tensor, Tensor]:
    """Return weight (E, D) and bias (E,) of a router for one task, from its outputs for zeros and for unit vectors.

    Raises:
        ConfigError: the router is not linear in the token.
    """
    bias = router(torch.zeros(1, width), task)[0]
    weight = (router(torch.eye(width), task) - bias).t().nan_to_num()  # a fixed gate of 0 is a bias of minus infinity
    probe = torch.linspace(-2, 2, 3 * width).view(3, width)
    if not torch.allclose(router(probe, task), probe @ weight.t() + bias, rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"moe.router: a {type(router).__name__} is not linear in the token, so it cannot be exported to ONNX"
        )
    return weight, bias


def _pooled(g: Graph, x: str, width: int) -> str:
    """Mean of each image's tokens: (B, N, D) -> (B, D)."""
    return g.op("Reshape", g.op("ReduceMean", x, g.constant([1]), keepdims=0), g.constant([-1, width]))


def _for_each_token(g: Graph, of_images: str, x: str, count: int) -> str:
    """Repeat values of each image (B, K) for its tokens `x` (B, N, D): -> (B N, K)."""
    shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.constant([count]), axis=0)
    each = g.op("Expand", g.op("Unsqueeze", of_images, g.constant([1])), shape)
    return g.op("Reshape", each, g.constant([-1, count]))


def route(g: Graph, moe: MoE, flat: str, width: int, task: str, names: Names) -> tuple[str, str]:
    """Tokens (T, D) -> chosen experts (T, K) int64 and their gates (T, K)."""
    weight, bias = affine(moe.router, width, task)
    own = Names(names.prefix + "router.", task)
    # The node has a name by which int8.py excludes it: a rounded router would send tokens to other experts.
    logits = g.op("MatMul", flat, own.weight(g, "weight", weight.t()), name=f"{task}/{names.prefix}router")
    if bias.any():
        logits = g.op("Add", logits, own.weight(g, "bias", bias))
    if moe.covers:
        return _one_of_each_slice(g, logits, moe.top_k)
    best, chosen = g.op("TopK", logits, g.constant([moe.top_k]), axis=-1, outputs=2)
    if moe.renormalize:  # softmax over all, divided by the sum of the chosen, is the softmax over the chosen
        return chosen, g.op("Softmax", best, axis=-1)
    return chosen, g.op("GatherElements", g.op("Softmax", logits, axis=-1), chosen, axis=1)


def _one_of_each_slice(g: Graph, logits: str, slices: int) -> tuple[str, str]:
    """Choose the best copy of each slice, with gate 1. Expert e has slice e mod `slices`."""
    copies = g.op("Reshape", logits, g.constant([0, -1, slices]))
    best = g.op("ArgMax", copies, axis=1, keepdims=0)
    chosen = g.op("Add", g.op("Mul", best, g.constant(slices)), g.constant(list(range(slices))))
    return chosen, g.op(
        "Add", g.op("Mul", g.op("Cast", chosen, to=1), g.constant(0, np.float32)), g.constant(1, np.float32)
    )


def _experts(g: Graph, experts: Experts, flat: str, chosen: str, names: Names, ids: list[int]) -> str:
    """Outputs of each token's chosen experts: (T, D) and (T, K) -> (T, K, D)."""
    if type(experts) is not Experts:
        raise ConfigError(f"moe: experts of the kind {type(experts).__name__} cannot be exported to ONNX")
    count = len(ids)
    marks = g.op("OneHot", chosen, g.constant(count), g.constant([0, 1]), axis=-1)
    marks = g.op("ReduceSum", marks, g.constant([1]), keepdims=0)  # (T, E), 1 where chosen
    by_expert = g.op("Transpose", marks, perm=[1, 0])
    positions = g.op("NonZero", by_expert)  # (2, R), expert by expert
    token_of_row = g.op("Gather", positions, g.constant(1), axis=0)
    rows = g.op("Gather", flat, token_of_row, axis=0)
    lengths = g.op("ReduceSum", marks, g.constant([0]), keepdims=0)
    pieces = g.op("Split", rows, lengths, axis=0, outputs=count) if count > 1 else [rows]
    y = [_expert(g, experts, place, piece, names / str(ids[place])) for place, piece in enumerate(pieces)]
    # Row of an assignment: the number of assignments before it in the order of `positions`.
    counted = g.op("CumSum", g.op("Reshape", by_expert, g.constant([-1])), g.constant(0), exclusive=1)
    row_of = g.op("Transpose", g.op("Reshape", counted, g.op("Shape", by_expert)), perm=[1, 0])
    row_of = g.op("GatherElements", row_of, chosen, axis=1)
    return g.op("Gather", g.op("Concat", *y, axis=0) if count > 1 else y[0], row_of, axis=0)


def _expert(g: Graph, experts: Experts, place: int, x: str, names: Names) -> str:
    """One expert on its tokens, of any number r: (r, D) -> (r, D)."""

    def of(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter[place]

    x = product(g, x, experts.fc1_weight[place], of(experts.fc1_bias), names / "fc1")
    x = activation(g, experts.act, x, names / "act")
    return product(g, x, experts.fc2_weight[place], of(experts.fc2_bias), names / "fc2")
