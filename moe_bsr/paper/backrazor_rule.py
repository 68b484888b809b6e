"""The memory accounting of Back Razor (Jiang et al. 2022), from which the BSR paper's rule was derived.

It differs from `bsr_rule` in four points. The input of q, k and v is charged three times, once for each of three
separate layers. The FFN is charged like the attention: its activation function on entry, and one token tensor as the
residual while inside. There is no gradient path: attention and activation function are charged in every block. If only
the head trains, the running sum is reset to 0 on entering an attention or an FFN.

With pruning, a share `prune` = p of the kept values is dropped. Tensors kept by the blocks are then sparse: a bit mask
over all values, and the largest 1 - p of them in float16 (in float32 for norms, whose layer has no half precision). The
input of the activation function is not pruned, but kept dense in float16. Patch embedding, final norm and head keep
their inputs exactly.
"""

from dataclasses import replace

from moe_bsr.paper.bsr_rule import FLOAT, Estimate, RunningSum, attention_kept, kept
from moe_bsr.paper.shapes import Leaf, Shape

MASK = 1 / 8  # bytes a value


def memory(shape: Shape, batch: int = 1, prune: float | None = None, half: bool = True) -> Estimate:
    """Return Back Razor's training memory according to its released estimator.

    Args:
        prune: share of the kept values that is dropped, in [0, 1]; None keeps everything in float32.
        half: whether the remaining values are kept in float16.
    """
    dense = pruned = pruned_norm = 1.0  # bytes kept per value, relative to float32
    if prune is not None:
        dense = 0.5
        pruned_norm = (MASK + (1 - prune) * FLOAT) / FLOAT
        pruned = (MASK + (1 - prune) * FLOAT / 2) / FLOAT if half else pruned_norm
    walk = RunningSum()

    def visit(section: str, leaves: tuple[Leaf, ...], linear: float = 1.0, norm: float = 1.0) -> None:
        for leaf in leaves:
            share = {"linear": linear, "norm": norm, "activation": 0.0}[leaf.kind]
            for part in _separate(leaf):
                walk.visit(section, part, share * kept(part, True))

    def enter(section: str, leaves: tuple[Leaf, ...], charge: float) -> None:
        walk.charge(section, charge)
        if shape.head_only:
            walk.kept = 0.0
        walk.residual = FLOAT * leaves[0].input
        visit(section, leaves, pruned, pruned_norm)
        walk.residual = 0.0

    visit("embedding", shape.embedding)
    for block in shape.blocks:
        section = block.name
        visit(section, block.norm1, norm=pruned_norm)
        enter(section, block.attention, pruned * attention_kept(block))
        visit(section, block.norm2, norm=pruned_norm)
        activations = sum(kept(leaf, True) for leaf in block.ffn if leaf.kind == "activation")
        enter(section, block.ffn, dense * activations)
    visit("head", shape.head)
    return walk.estimate(shape, batch)


def _separate(leaf: Leaf) -> list[Leaf]:
    """Return the leaf itself, or three layers in place of the fused layer of q, k and v."""
    if leaf.name != "attn.qkv":
        return [leaf]
    return [replace(leaf, name=f"attn.{name}", outputs=leaf.outputs // 3) for name in ("query", "key", "value")]
