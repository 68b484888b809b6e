"""The BSR paper's accounting of "Train Mem." and "FLOPs": its released estimator, derived from TinyTL's.

Memory = batch x (peak activations of an image) + 4 bytes for each trainable + 1 byte for each frozen parameter. It
leaves out gradients and optimizer state, and assumes frozen weights in 8 bits whatever the run has. MB are 2^20 bytes.
Activations are float32. The rule visits the leaf modules in the order of the forward pass, and adds up in g what is
kept. Before each leaf

    peak = max(peak, g + tmp + res)

Here tmp is the input and output of a linear layer, or the input of a norm or an activation function. res is one token
tensor while inside an attention. After each leaf, g grows by the leaf's input, if the leaf is a linear layer or a norm
with a trained weight, or an activation function on the gradient path. An attention on the gradient path keeps its map
and q, k and v, which are charged on entry. The rule leaves out the inputs of frozen norms, which autograd does keep,
and all temporaries of the backward pass.

If only the head trains, g is reset to 0 on entering an attention, after its own charge. There is no gradient path then,
and the activation functions of all blocks are charged.

The released estimator does not cover mixture-of-experts layers. They are not torch's own layers, so that it counts only
the activation function between them, and the paper prints no estimate for them. Here the same rule is applied to them:
router and experts are linear layers, and the experts' have top_k rows for each token.

"FLOPs" in the paper are multiply-adds of the forward pass alone, in units of 1e9 ("GMacs").
"""

from dataclasses import dataclass

from moe_bsr.paper.shapes import EXPERTS, BlockShape, Leaf, Shape

FLOAT = 4  # bytes
MB = 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a training step according to a published rule, in bytes.

    Attributes:
        kept: per image, by section ("embedding", "block 0" ..., "head").
        peak: activations of one image at the peak of the forward pass.
        parameters: 4 bytes for each trainable parameter and 1 for each frozen one.
    """

    kept: dict[str, float]
    peak: float
    parameters: int
    batch: int

    @property
    def total(self) -> float:
        return self.batch * self.peak + self.parameters

    @property
    def activations_mb(self) -> float:
        return self.peak / MB

    @property
    def total_mb(self) -> float:
        return self.total / MB


class RunningSum:
    """State of an estimator while it visits the leaves: g (`kept`), `peak` and res (`residual`), in bytes per image."""

    def __init__(self) -> None:
        self.kept = self.peak = self.residual = 0.0
        self.by_section: dict[str, float] = {}

    def charge(self, section: str, size: float) -> None:
        self.kept += size
        self.by_section[section] = self.by_section.get(section, 0.0) + size

    def visit(self, section: str, leaf: Leaf, keeps: float) -> None:
        temporary = leaf.input + (leaf.output if leaf.kind == "linear" else 0)
        self.peak = max(self.peak, self.kept + FLOAT * temporary + self.residual)
        self.charge(section, keeps)

    def estimate(self, shape: Shape, batch: int) -> Estimate:
        return Estimate(self.by_section, self.peak, FLOAT * shape.trainable + shape.frozen, batch)


def memory(shape: Shape, batch: int = 1) -> Estimate:
    """Return the paper's "Train Mem." according to its released estimator."""
    walk = RunningSum()
    for leaf in shape.embedding:
        walk.visit("embedding", leaf, kept(leaf, False))
    for block in shape.blocks:
        section, charged = block.name, block.on_path or shape.head_only
        for leaf in block.norm1:
            walk.visit(section, leaf, kept(leaf, charged))
        if charged:
            walk.charge(section, attention_kept(block))
        if shape.head_only:
            walk.kept = 0.0
        walk.residual = FLOAT * block.attention[0].input
        for leaf in block.attention:
            walk.visit(section, leaf, kept(leaf, charged))
        walk.residual = 0.0
        for leaf in block.norm2 + block.ffn:
            walk.visit(section, leaf, kept(leaf, charged))
    for leaf in shape.head:
        walk.visit("head", leaf, kept(leaf, False))
    return walk.estimate(shape, batch)


def kept(leaf: Leaf, on_path: bool) -> float:
    """Return the bytes that a leaf keeps per image."""
    return FLOAT * leaf.input * (on_path if leaf.kind == "activation" else leaf.trained)


def attention_kept(block: BlockShape) -> float:
    """Return the bytes of the attention map and of q, k and v: H n^2 and 3 n D elements."""
    return FLOAT * (block.heads * block.tokens**2 + 3 * block.tokens * block.width)


def forward_macs(shape: Shape) -> int:
    """Return the multiply-adds of one image's forward pass: 4 D^2 n + 2 D n^2 + 8 D^2 m per block, embedding and head.

    Experts and router count. The second row of scores for the class token, a millionth of the total, does not.
    """
    layers = sum(
        leaf.input * leaf.outputs for leaves in shape.sections.values() for leaf in leaves if leaf.kind == "linear"
    )
    return layers + sum(2 * block.tokens**2 * block.width for block in shape.blocks)


def thop_count(shape: Shape) -> int:
    """Return the count behind the paper's MoE rows, that of the thop library: torch's layers and 4 x each norm's input.

    It misses the products within the attention, which are not layers, and router and experts, which are not torch's.
    """
    total = 0
    for leaf in (leaf for leaves in shape.sections.values() for leaf in leaves):
        if leaf.kind == "norm":
            total += 4 * leaf.input
        elif leaf.kind == "linear" and not leaf.name.startswith((EXPERTS, "mlp.router")):
            total += leaf.input * leaf.outputs
    return total
