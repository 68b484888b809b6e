"""The accounting of the BSR paper, "Train Mem." and "FLOPs": its released estimator, derived from TinyTL's.

Memory = batch x (peak activations of an image) + 4 bytes for each trainable + 1 byte for each frozen
parameter; no gradients, no optimizer state, and frozen weights in 8 bits whatever the run keeps. MB are
2^20 bytes. Activations are float32. Walking over the leaf modules in the order of the forward pass with
the running sum g of what is kept, before each leaf

    peak = max(peak, g + tmp + res)

where tmp is the leaf's input and output for a linear layer, its input for a norm or an activation, and
res one token tensor while inside an attention; after it g grows by what the leaf keeps: its input, if it
is a linear layer or a norm whose weight trains, or an activation function on the gradient path. An
attention on the gradient path keeps its map and q, k and v, charged on entry. What that leaves out: the
inputs of frozen norms, which autograd does keep, and every temporary of the backward pass.

Where only the head trains, g is set to 0 on entering an attention - after its own charge, and the rule
knows no path then, so that every block is charged its activation function.

Mixture-of-experts layers are unknown to the released estimator (their layers are none of torch's, so it
counts nothing of them but the activation function between, and the paper prints no estimate for them).
Here the rule is applied to them as it stands: router and experts are linear layers, the experts' on
top_k rows for each token.

"FLOPs" in the paper are multiply-adds of the forward pass alone, in units of 1e9 ("GMacs").
"""

from dataclasses import dataclass

from moe_bsr.paper.shapes import EXPERTS, BlockShape, Leaf, Shape

FLOAT = 4  # bytes
MB = 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a published rule says of a training step; bytes.

    Attributes:
        kept: of one image, by section ("embedding", "block 0" ..., "head").
        peak: activations of one image at the worst moment of the forward pass.
        parameters: 4 bytes for each trainable one, 1 for each frozen one.
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
    """The estimators' walk: g (`kept`), `peak` and res (`residual`), all in bytes of one image."""

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
    """The paper's "Train Mem." by its released estimator, step by step."""
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
    """Bytes that a leaf keeps of one image."""
    return FLOAT * leaf.input * (on_path if leaf.kind == "activation" else leaf.trained)


def attention_kept(block: BlockShape) -> float:
    """Bytes of the attention map and of q, k and v: H n^2 and 3 n D elements."""
    return FLOAT * (block.heads * block.tokens**2 + 3 * block.tokens * block.width)


def forward_macs(shape: Shape) -> int:
    """Multiply-adds of one image's forward pass: 4 D^2 n + 2 D n^2 + 8 D^2 m a block, embedding and head.

    Experts and router are counted. (The class token's second row of scores, a millionth, is not.)
    """
    layers = sum(
        leaf.input * leaf.outputs for leaves in shape.sections.values() for leaf in leaves if leaf.kind == "linear"
    )
    return layers + sum(2 * block.tokens**2 * block.width for block in shape.blocks)


def thop_count(shape: Shape) -> int:
    """What the counter behind the paper's MoE rows sees: torch's layers, and four times each norm's input.

    Neither the products within the attention, which are no layers, nor router and experts, which are none
    of torch's layers.
    """
    total = 0
    for leaf in (leaf for leaves in shape.sections.values() for leaf in leaves):
        if leaf.kind == "norm":
            total += 4 * leaf.input
        elif leaf.kind == "linear" and not leaf.name.startswith((EXPERTS, "mlp.router")):
            total += leaf.input * leaf.outputs
    return total
