"""Token merging as ONNX operators: `model.merging.merge`, and the expansion of merged tokens for pooling.

B images, N tokens of which P prefix tokens, d width of a head, C candidates, K left, S sources, T targets
"""

from dataclasses import dataclass

import numpy as np

from moe_bsr.export.graph import Graph
from moe_bsr.export.layers import tokens_from


@dataclass(frozen=True, slots=True)
class Merged:
    """Record of the merges so far.

    Attributes:
        sizes: (B, K, 1) float32, the number of patches in each token after the prefix.
        becomes: for each merge, (B, C) int64: the index of the token that each candidate was merged into.
    """

    sizes: str
    becomes: tuple[str, ...]


def bias(g: Graph, merged: Merged, prefix: int) -> str:
    """Return the logarithm of each key's size, (B, 1, 1, N), to be added to the attention's logits."""
    sizes = g.op("Squeeze", g.op("Log", merged.sizes), g.constant([2]))
    return g.op("Unsqueeze", g.op("Pad", sizes, g.constant([0, prefix, 0, 0])), g.constant([1, 2]))


def merge(
    g: Graph, x: str, keys: str, merged: Merged | None, prefix: int, candidates: int, left: int
) -> tuple[str, Merged]:
    """Merge tokens (B, N, D) by the similarity of their keys (B, H, d, N) to (B, P + K, D), and update the record."""
    becomes = _match(g, keys, prefix, candidates, left)
    place = g.constant(np.arange(left).reshape(1, left, 1))
    shares = g.op("Cast", g.op("Equal", g.op("Unsqueeze", becomes, g.constant([1])), place), to=1)  # (B, K, C)
    if merged is not None:
        shares = g.op("Mul", shares, g.op("Transpose", merged.sizes, perm=[0, 2, 1]))
    sizes = g.op("ReduceSum", shares, g.constant([2]), keepdims=1)
    y = g.op("Div", g.op("MatMul", shares, tokens_from(g, x, prefix, prefix + candidates)), sizes)
    if prefix:
        y = g.op("Concat", tokens_from(g, x, 0, prefix), y, axis=1)
    return y, Merged(sizes, (*(() if merged is None else merged.becomes), becomes))


def _match(g: Graph, keys: str, prefix: int, candidates: int, left: int) -> str:
    """`ops.merging.match`: (B, C) int64."""
    targets = candidates // 2
    sources, alone = candidates - targets, left - targets
    keys = g.op("ReduceMean", keys, g.constant([1]), keepdims=0)  # (B, d, N)
    length = g.op("ReduceL2", keys, g.constant([1]), keepdims=1)
    keys = g.op("Div", keys, g.op("Max", length, g.constant(1e-12, np.float32)))
    end, last, step = g.constant([prefix + candidates]), g.constant([2]), g.constant([2])
    of_sources = g.op("Slice", keys, g.constant([prefix]), end, last, step)
    of_targets = g.op("Slice", keys, g.constant([prefix + 1]), end, last, step)
    similar = g.op("MatMul", g.op("Transpose", of_sources, perm=[0, 2, 1]), of_targets)  # (B, S, T)
    partner = g.op("ArgMax", similar, axis=2, keepdims=0)  # among equal ones the first
    best = g.op("ReduceMax", similar, g.constant([2]), keepdims=0)
    _, chosen = g.op("TopK", best, g.constant([candidates - left]), axis=-1, outputs=2)  # among equal ones the first
    ones = g.op("Add", g.op("Mul", partner, g.constant(0)), g.constant(1))
    stays = g.op("ScatterElements", ones, chosen, g.op("Mul", chosen, g.constant(0)), axis=1)
    own = g.op("Sub", g.op("CumSum", stays, g.constant(1)), g.constant(1))
    joined = g.op("Add", partner, g.constant(alone))
    of_sources = g.op("Where", g.op("Cast", stays, to=9), own, joined)
    shape = g.op("Concat", g.op("Shape", partner, start=0, end=1), g.constant([targets]), axis=0)
    of_targets = g.op("Expand", g.constant([list(range(alone, left))]), shape)
    order = [i // 2 + sources * (i % 2) for i in range(candidates)]  # sources and targets alternate
    return g.op("Gather", g.op("Concat", of_sources, of_targets, axis=1), g.constant(order), axis=1)


def spread(g: Graph, patches: str, merged: Merged) -> str:
    """Give each patch of the image the token it was merged into: (B, K, D) -> (B, patches, D)."""
    place, *later = merged.becomes
    for becomes in later:
        place = g.op("GatherElements", becomes, place, axis=1)
    return g.op("GatherND", patches, g.op("Unsqueeze", place, g.constant([2])), batch_dims=1)
