"""Forward pass of a transformer block: attention -> drop or merge tokens -> FFN or experts.

It calls the submodules of a timm `Block`, whose layers use our kernels after `layers.adopt`. It replaces the forward of
timm's `Block`, which returns neither the class token's attention nor the routing.
"""

from dataclasses import dataclass, replace

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from moe_bsr.config import TokensConfig
from moe_bsr.model.adapters import BESIDE_BLOCK, BESIDE_FFN, is_beside
from moe_bsr.model.layers import Criteria, Mlp, feed_forward, has_hooks
from moe_bsr.model.merging import log_sizes, merge
from moe_bsr.model.moe import MoE, Routing
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Dropped, Tokens, drop


@dataclass(frozen=True, slots=True)
class BlockContext:
    """Static settings of one block.

    Attributes:
        prefix: number of prefix tokens (class and register tokens), which are never dropped or merged.
        class_token_alone: output only the class token, because nothing reads the other tokens.
    """

    plan: BlockPlan
    tokens: TokensConfig
    prefix: int
    has_class_token: bool
    class_token_alone: bool = False


def contexts(vit: VisionTransformer, plan: list[BlockPlan], tokens: TokensConfig) -> list[BlockContext]:
    """Return one context per block. If the heads read only the class token, the last block computes only that token.

    A last block with experts still computes all tokens, because its balance loss and router statistics cover all of
    them. So does a last block that a side network reads.
    """
    made = [BlockContext(each, tokens, vit.num_prefix_tokens, vit.has_class_token) for each in plan]
    if reads_class_token_alone(vit) and not plan[-1].moe and not is_beside(plan[-1].adapter):
        made[-1] = replace(made[-1], class_token_alone=True)
    return made


def reads_class_token_alone(vit: VisionTransformer) -> bool:
    return vit.has_class_token and vit.global_pool == "token"


@dataclass(slots=True)
class Record:
    """What a block reports in addition to its output. None if the block does not drop, merge or route."""

    dropped: Dropped | None = None
    routing: Routing | None = None


def forward(
    block: Block,
    tokens: Tokens,
    context: BlockContext,
    task: str,
    replay: Replay,
    noise_key: tuple[int, ...] | None = None,
    needs_output: bool = True,
) -> tuple[Tokens, Record]:
    """Run one block.

    Args:
        tokens: (B, N, D).
        replay: kept or merged tokens, chosen experts and gate noise. They are recorded in the first forward pass and
            replayed in recomputation.
        noise_key: seeds the gate noise; needed in training if there is any.
        needs_output: False if only the graph is needed, as in recomputation; the last matrix product is then skipped.
    Returns:
        (B, N', D) tokens with N' <= N (N' = 1 if the block computes only the class token), and the block's record.
    """
    record, plan, merges, entering = Record(), context.plan, context.tokens.merges, tokens
    reduces = plan.keep_rate < 1
    y, criteria = block.attn(
        block.norm1(tokens.x),
        scores=reduces and not merges,
        has_class_token=context.has_class_token,
        attached=context.tokens.attached,
        keys=reduces and merges,
        bias=log_sizes(tokens),
        first_alone=context.class_token_alone,
    )
    if context.class_token_alone:
        tokens = tokens.first()
    tokens = tokens.add(block.drop_path1(block.ls1(y)))
    del y  # free it before the FFN, which needs the most memory
    if reduces:
        tokens, record.dropped = _reduce(tokens, criteria, context, replay)
    y, record.routing = _feed_forward(block, block.norm2(tokens.x), task, replay, noise_key, needs_output)
    y = block.drop_path2(block.ls2(y))
    beside = getattr(block, BESIDE_FFN, None)
    tokens = tokens.add(y if beside is None else y + beside(tokens.x))
    if (side := getattr(block, BESIDE_BLOCK, None)) is not None:
        del y
        if reduces:  # repeats the choice recorded above
            entering, _ = _reduce(entering, criteria, context, replay)
        tokens = tokens.add(side(entering.x, log_sizes(entering), context.class_token_alone, needs_output))
    return tokens, record


def _reduce(tokens: Tokens, criteria: Criteria, context: BlockContext, replay: Replay) -> tuple[Tokens, Dropped]:
    """Drop or merge tokens, by the scores or keys that the attention returned."""
    rate, prefix = context.plan.keep_rate, context.prefix
    if context.tokens.merges:
        return merge(tokens, *criteria, rate, prefix, replay)
    return drop(tokens, *criteria, rate, prefix, context.tokens, replay)


def _feed_forward(
    block: Block, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None, needs_output: bool
) -> tuple[Tensor, Routing | None]:
    """Run the experts or the FFN of a block, (B, N, D) -> (B, N, D). Return also the routing of experts."""
    # A trained LayerScale saves the last product for its own gradient.
    needs_output = needs_output or any(p.requires_grad for p in block.ls2.parameters())
    if isinstance(block.mlp, MoE):
        return block.mlp(x, task, replay, noise_key, needs_output)
    if type(block.mlp) is Mlp and not has_hooks(block.mlp):
        return feed_forward(block.mlp, x, needs_output), None
    return block.mlp(x), None
