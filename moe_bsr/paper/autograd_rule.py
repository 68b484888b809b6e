"""What autograd keeps of the published forward pass in plain PyTorch, by closed form.

This is what a user gets who writes the method down as the papers do: timm's block with the attention map
computed, tokens taken with `gather` (which keeps its source), the fused token a sum of products, experts one
after the other on gathered rows. float32, two images or more (with one, q and k need no copy of their own
and the whole of qkv is kept instead). Bytes of the distinct storages that the saved-tensor hooks see,
parameters excluded, the images included where the patch embedding trains; without the loss. Blocks of the
classic form only: norms of q and k, layer scale and gates are not in here, nor blocks beside one that drops tokens.
"""

from moe_bsr.paper.bsr_rule import FLOAT
from moe_bsr.paper.shapes import BlockShape, Leaf, Shape

INDEX = 8  # bytes of an int64


def kept(shape: Shape) -> dict[str, int]:
    """Bytes of one image kept for the backward pass, by section ("embedding", "block 0" ..., "head")."""
    flows = any(leaf.trained for leaf in shape.embedding)  # whether the residual stream requires a gradient
    result = {"embedding": sum(FLOAT * leaf.input for leaf in shape.embedding if leaf.trained)}
    entered = flows
    for block in shape.blocks:
        before = flows
        size, flows = _block(block, shape, flows)
        if block.name.startswith("beside") and entered:  # the block keeps their common input already
            size -= FLOAT * block.norm1[0].input
        entered = before
        result[block.name] = size
    norm, head = shape.head
    size, flows = _layers((norm,), flows)
    result["head"] = size + FLOAT * norm.output  # the head's input is a view into all of the norm's output
    return result


def _block(block: BlockShape, shape: Shape, flows: bool) -> tuple[int, bool]:
    """Bytes, and whether what comes out requires a gradient; `flows`: whether what goes in does."""
    qkv, proj = block.attention
    ffn_tokens = block.norm2[0].rows
    size, branch = _layers((*block.norm1, qkv), flows)
    if branch:  # q, k and v are copied for the batched products; the map is softmax's result
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
    """Gathering keeps the tokens and the indices; fusing also dropped tokens, scores and weights."""
    width, candidates = block.norm1[0].inputs, block.tokens - shape.prefix
    taken = left - shape.prefix - shape.fuses
    size = FLOAT * block.tokens * width + INDEX * taken
    if shape.fuses:  # the places of the dropped are a part of all candidates' places, sorted
        dropped = candidates - taken
        size += INDEX * candidates + FLOAT * (candidates + dropped + dropped * width)
    return size


def _routing(leaves: tuple[Leaf, ...]) -> int:
    """Probabilities and choices of each token; of each of its rows the output, before and after the gate, the
    gate and two indices (`index_add` keeps what it adds)."""
    router, first, _, second = leaves
    return FLOAT * (router.output + 2 * second.output + first.rows) + 3 * INDEX * first.rows


def _layers(leaves: tuple[Leaf, ...], flows: bool) -> tuple[int, bool]:
    """Kept by leaves one after the other, and whether what comes out requires a gradient.

    A norm keeps its input, mean and deviation also when frozen: the gradient that passes needs them.
    """
    size = 0
    for leaf in leaves:
        flows = flows or leaf.trained
        if leaf.kind == "norm" and flows:
            size += FLOAT * (leaf.input + 2 * leaf.rows)
        elif leaf.kind == "activation" and flows or leaf.kind == "linear" and leaf.trained:
            size += FLOAT * leaf.input
    return size, flows
