"""The accounting of Back Razor (Jiang et al. 2022), the ancestor of the BSR paper's rule.

As `bsr_rule`, with four differences. The inputs of q, k and v are charged three times, once for each of three
separate layers. The FFN is charged as the attention is: its activation function on entry, and one token
tensor as a residual while inside. There is no gradient path: attention and activation function are charged
in every block. Where only the head trains, the running sum is set to 0 on entering an attention or an FFN.

With `prune` = p, the share of values set aside, what the blocks keep is sparse: a bit mask over all values
and the 1 - p largest in float16 (in float32 for the norms, whose layer knows no half precision). The input
of the activation function is not pruned but kept dense in float16. Patch embedding, final norm and head are
exact.
"""

from dataclasses import replace

from moe_bsr.paper.bsr_rule import FLOAT, Estimate, RunningSum, attention_kept, kept
from moe_bsr.paper.shapes import Leaf, Shape

MASK = 1 / 8  # bytes a value


def memory(shape: Shape, batch: int = 1, prune: float | None = None, half: bool = True) -> Estimate:
    """Back Razor's training memory by its released estimator.

    Args:
        prune: share of the kept values that is set aside, in [0, 1]; None keeps everything in float32.
        half: whether the pruned values that are left are kept in float16.
    """
    dense = pruned = pruned_norm = 1.0  # bytes kept of a float32 value, over 4
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
    """A leaf, or the three layers in place of the fused one of q, k and v."""
    if leaf.name != "attn.qkv":
        return [leaf]
    return [replace(leaf, name=f"attn.{name}", outputs=leaf.outputs // 3) for name in ("query", "key", "value")]
