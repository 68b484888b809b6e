"""Closed form of the memory that autograd keeps for the published forward pass in plain PyTorch.

It describes a direct implementation of the papers: timm's block with an explicit attention map, token selection by
`gather` (which saves its source), a fused token computed as a sum of products, and experts that run one after the other
on gathered rows. It holds for float32 and at least two images. (With one image, q and k need no copies, and the whole
qkv tensor is kept instead.) It counts the distinct storages that the saved-tensor hooks see, without parameters and
without the loss. The images count if the patch embedding trains. Only blocks of the classic form are covered: no norms
of q and k, no layer scale, no gates, and no blocks beside one that drops tokens.
"""

from moe_bsr.paper.bsr_rule import FLOAT
from moe_bsr.paper.shapes import BlockShape, Leaf, Shape

INDEX = 8  # bytes of an int64


def kept(shape: Shape) -> dict[str, int]:
    """Return the bytes kept per image for the backward pass, by section ("embedding", "block 0" ..., "head")."""
    flows = any(leaf.trained for leaf in shape.embedding)  # whether the residual stream requires a gradient
    result = {"embedding": sum(FLOAT * leaf.input for leaf in shape.embedding if leaf.trained)}
    entered = flows
    for block in shape.blocks:
        before = flows
        size, flows = _block(block, shape, flows)
        if block.name.startswith("beside") and entered:  # both have the same input, which the block keeps already
            size -= FLOAT * block.norm1[0].input
        entered = before
        result[block.name] = size
    norm, head = shape.head
    size, flows = _layers((norm,), flows)
    result["head"] = size + FLOAT * norm.output  # the head's input is a view of the norm's whole output
    return result


def _block(block: BlockShape, shape: Shape, flows: bool) -> tuple[int, bool]:
    """Return a block's bytes, and whether its output requires a gradient. `flows`: whether its input does."""
    qkv, proj = block.attention
    ffn_tokens = block.norm2[0].rows
    size, branch = _layers((*block.norm1, qkv), flows)
    if branch:  # q, k and v are copied for the batched products. The map is the result of softmax.
        size += FLOAT * (block.heads * block.tokens**2 + 3 * block.tokens * block.width)
    more, branch = _layers((proj,), branch)
    size, flows = size + more, flows or branch
    if flows and ffn_tokens < block.tokens:
        size += _selection(block, shape, ffn_tokens)
    more, branch = _layers(block.norm2 + block.ffn, flows)
    if len(block.ffn) == 4:
        more += _routing(block.ffn)
    return size + more, flows or branch


def _selection(block: BlockShape, shape: Shape, left: int) -> int:
    """Return the bytes of token selection.

    Gathering keeps all tokens and the indices. Fusing also keeps the dropped tokens, the scores and the weights.
    """
    width, candidates = block.norm1[0].inputs, block.tokens - shape.prefix
    taken = left - shape.prefix - shape.fuses
    size = FLOAT * block.tokens * width + INDEX * taken
    if shape.fuses:  # the indices of the dropped tokens are a view of the sorted indices of all candidates
        dropped = candidates - taken
        size += INDEX * candidates + FLOAT * (candidates + dropped + dropped * width)
    return size


def _routing(leaves: tuple[Leaf, ...]) -> int:
    """Return the bytes of routing.

    Each token keeps its probabilities and choices. Each of its rows keeps the expert's output before and after the gate
    (`index_add` keeps what it adds), the gate and two indices.
    """
    router, first, _, second = leaves
    return FLOAT * (router.output + 2 * second.output + first.rows) + 3 * INDEX * first.rows


def _layers(leaves: tuple[Leaf, ...], flows: bool) -> tuple[int, bool]:
    """Return the bytes kept by consecutive leaves, and whether their output requires a gradient.

    A norm keeps its input, mean and deviation even if it is frozen, because its input's gradient needs them.
    """
    size = 0
    for leaf in leaves:
        flows = flows or leaf.trained
        if leaf.kind == "norm" and flows:
            size += FLOAT * (leaf.input + 2 * leaf.rows)
        elif leaf.kind == "activation" and flows or leaf.kind == "linear" and leaf.trained:
            size += FLOAT * leaf.input
    return size, flows
