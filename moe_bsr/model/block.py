"""The one forward of a transformer block: attention -> drop or merge tokens -> FFN or experts.

It calls the submodules of a timm `Block`, whose layers `layers.adopt` has given our kernels, and none of their
forwards that would hide the class token's attention or the routing. Nothing else overrides a timm forward.
"""

from dataclasses import dataclass, replace

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from moe_bsr.config import TokensConfig
from moe_bsr.model.adapters import BESIDE_BLOCK, BESIDE_FFN, is_beside
from moe_bsr.model.layers import Given, Mlp, feed_forward, has_hooks
from moe_bsr.model.merging import log_sizes, merge
from moe_bsr.model.moe import MoE, Routing
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Dropped, Tokens, drop


@dataclass(frozen=True, slots=True)
class BlockContext:
    """What does not change from step to step.

    Attributes:
        prefix: number of prefix tokens (class and register tokens), never dropped or merged.
        class_token_alone: whether nothing reads the other tokens the block leaves, so that it leaves none.
    """

    plan: BlockPlan
    tokens: TokensConfig
    prefix: int
    has_class_token: bool
    class_token_alone: bool = False


def contexts(vit: VisionTransformer, plan: list[BlockPlan], tokens: TokensConfig) -> list[BlockContext]:
    """Of each block. Where heads read the class token alone, the last block leaves out what the others would get.

    Its experts keep all tokens: the balance loss and the statistics of their routers are over all. So does a block that
    a side network reads.
    """
    made = [BlockContext(each, tokens, vit.num_prefix_tokens, vit.has_class_token) for each in plan]
    if reads_class_token_alone(vit) and not plan[-1].moe and not is_beside(plan[-1].adapter):
        made[-1] = replace(made[-1], class_token_alone=True)
    return made


def reads_class_token_alone(vit: VisionTransformer) -> bool:
    return vit.has_class_token and vit.global_pool == "token"


@dataclass(slots=True)
class Record:
    """What a block reports beside its output; None where it does not apply."""

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
    """One block on (B, N, D) tokens, leaving (B, N', D) with N' <= N, of the class token alone N' = 1.

    Args:
        replay: kept or merged tokens, experts and gate noise: decided here at first, replayed ever after.
        needs_output: whether the output's values are wanted; a block that runs again for its backward pass
            wants the graph alone, and needs no last product for it.
    """
    record, plan, merges, entering = Record(), context.plan, context.tokens.merges, tokens
    reduces = plan.keep_rate < 1
    y, given = block.attn(
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
    del y  # or it would live through the FFN, the widest part
    if reduces:
        tokens, record.dropped = _reduce(tokens, given, context, replay)
    y, record.routing = _feed_forward(block, block.norm2(tokens.x), task, replay, noise_key, needs_output)
    y = block.drop_path2(block.ls2(y))
    beside = getattr(block, BESIDE_FFN, None)
    tokens = tokens.add(y if beside is None else y + beside(tokens.x))
    if (side := getattr(block, BESIDE_BLOCK, None)) is not None:
        del y
        if reduces:  # the same choice once more
            entering, _ = _reduce(entering, given, context, replay)
        tokens = tokens.add(side(entering.x, log_sizes(entering), context.class_token_alone, needs_output))
    return tokens, record


def _reduce(tokens: Tokens, given: Given, context: BlockContext, replay: Replay) -> tuple[Tokens, Dropped]:
    """Drop or merge tokens.

    Args:
        given: what the attention told of them.
    """
    rate, prefix = context.plan.keep_rate, context.prefix
    if context.tokens.merges:
        return merge(tokens, *given, rate, prefix, replay)
    return drop(tokens, *given, rate, prefix, context.tokens, replay)


def _feed_forward(
    block: Block, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None, needs_output: bool
) -> tuple[Tensor, Routing | None]:
    """The experts or the FFN of a block, (B, N, D) -> (B, N, D), and what the experts report."""
    # A LayerScale that trains keeps the last product for its own gradient.
    needs_output = needs_output or any(p.requires_grad for p in block.ls2.parameters())
    if isinstance(block.mlp, MoE):
        return block.mlp(x, task, replay, noise_key, needs_output)
    if type(block.mlp) is Mlp and not has_hooks(block.mlp):
        return feed_forward(block.mlp, x, needs_output), None
    return block.mlp(x), None
