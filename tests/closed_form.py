"""Closed-form FLOPs, as a paper would state them: a reference for the tracer. A multiply-add counts as two FLOPs.

Attention, routers and experts are counted. The backward pass of y = x W costs as much again for dx, if x is on the
gradient path, and once more for dW, if W trains. Elementwise work (norms, softmax, activations) is not counted.
"""

from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Block

from moe_bsr.model import summary
from moe_bsr.model.layers import Mlp
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import BlockPlan


def forward_flops(model: MultitaskViT, task: str) -> int:
    """Return the FLOPs of one image's forward pass to the logits of a task."""
    vit = model.vit
    blocks = sum(
        macs(b, p, n, m, vit.has_class_token, q)
        for b, p, (n, m), q in zip(vit.blocks, model.plan, counts(model), queries(model), strict=True)
    )
    return 2 * (_embedding(model) + model.heads[task].weight.numel() + blocks + pooling_macs(model))


def step_flops(model: MultitaskViT, task: str) -> int:
    """Return the FLOPs of one image in a training step: forward, backward where needed, and recomputation if any.

    Pooling by attention is left out.
    """
    vit, head = model.vit, model.heads[task].weight.numel()
    path = model.path_start < len(vit.blocks)
    total = _embedding(model) * (1 + model.embedding_trains) + head * (2 + path)
    for index, (block, plan, (n, m)) in enumerate(zip(vit.blocks, model.plan, counts(model), strict=True)):
        q = queries(model)[index]
        forward = macs(block, plan, n, m, vit.has_class_token, q)
        total += forward
        if index < model.path_start:
            continue
        total += sum(backward_macs(block, plan, n, m, vit.has_class_token, model.tokens_config.attached, q))
        if plan.storage.kind.startswith("recompute"):
            total += forward - skipped_macs(block, m)
    return 2 * total


def counts(model: MultitaskViT) -> list[tuple[int, int]]:
    """Return (tokens in attention, tokens in FFN) of each block."""
    alone = [context.class_token_alone for context in model.contexts]
    return [(n, 1 if one else m) for (n, m), one in zip(summary.counts(model), alone, strict=True)]


def queries(model: MultitaskViT) -> list[int | None]:
    """Return the number of queries in each block's attention, None if every token is a query."""
    return [1 if context.class_token_alone else None for context in model.contexts]


def macs(
    block: Block,
    plan: BlockPlan,
    attention_tokens: int,
    ffn_tokens: int,
    has_class_token: bool,
    queries: int | None = None,
) -> int:
    """Return the multiply-adds of one image's forward pass: attention (4 D^2 n + 2 D n^2), scores and FFN."""
    n, layer = attention_tokens, block.attn
    q = n if queries is None else queries
    total = (2 * n + q) * layer.qkv.weight.numel() // 3 + q * layer.proj.weight.numel() + 2 * q * n * _inner(block)
    if layer.gate is not None:
        total += q * layer.gate.weight.numel()
    total += _scores(block, plan, n, has_class_token)
    if isinstance(block.mlp, MoE):
        one_expert = block.mlp.experts.fc1_weight[0].numel() + block.mlp.experts.fc2_weight[0].numel()
        return total + ffn_tokens * block.mlp.top_k * one_expert + router_macs(block.mlp, ffn_tokens)
    return total + ffn_tokens * sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)


def backward_macs(
    block: Block,
    plan: BlockPlan,
    attention_tokens: int,
    ffn_tokens: int,
    has_class_token: bool,
    attached: bool,
    queries: int | None = None,
) -> tuple[int, int]:
    """Return the multiply-adds of one image's backward pass: (for input gradients, for weight gradients).

    Attention's two products have two operand gradients each, and the map is computed once more. With a single query
    the gradients of keys and values are outer products, which are elementwise and not counted.

    Args:
        attached: whether the scores have a gradient (their product then has two operand gradients as well).
    """
    n = attention_tokens
    maps, scores = (n if queries is None else queries) * n * _inner(block), _scores(block, plan, n, has_class_token)
    of_matrices = macs(block, plan, n, ffn_tokens, has_class_token, queries) - 2 * maps - scores
    again = 0 if has_class_token else scores  # the whole score map is computed once more as well
    inputs = of_matrices + (5 if queries is None else 3) * maps + (2 * scores + again if attached else 0)
    if not plan.trainable:
        return inputs, 0
    frozen = isinstance(block.mlp, MoE) and not any(p.requires_grad for p in block.mlp.router.parameters())
    return inputs, of_matrices - (router_macs(block.mlp, ffn_tokens) if frozen else 0)


def skipped_macs(block: Block, ffn_tokens: int) -> int:
    """Return the multiply-adds of one image that a block skips in recomputation: the FFN's last product."""
    if any(p.requires_grad for p in block.ls2.parameters()) or type(block.mlp) not in (Mlp, MoE):
        return 0
    if isinstance(block.mlp, MoE):
        return ffn_tokens * block.mlp.top_k * block.mlp.experts.fc2_weight[0].numel()
    return ffn_tokens * block.mlp.fc2.weight.numel()


def router_macs(moe: MoE, tokens: int) -> int:
    experts, width, _ = moe.experts.fc2_weight.shape
    return tokens * experts * width


def pooling_macs(model: MultitaskViT) -> int:
    """Return the multiply-adds of one image's attention pooling: a learned query attends to all tokens, then an FFN.

    It is 0 without such pooling. In pooling without parameters (timm's PRR) all tokens attend to one another.
    """
    vit, pool = model.vit, model.vit.attn_pool
    if pool is None:
        return 0
    tokens = counts(model)[-1][1] - (0 if vit.pool_include_prefix else vit.num_prefix_tokens)
    if not isinstance(pool, AttentionPoolLatent):
        return 2 * tokens * tokens * vit.embed_dim
    of_every_token = pool.kv.weight.numel() + 2 * vit.embed_dim
    of_one = sum(p.numel() for n, p in pool.named_parameters() if p.ndim == 2 and n != "kv.weight")
    return tokens * of_every_token + of_one


def _embedding(model: MultitaskViT) -> int:
    return model.vit.patch_embed.num_patches * model.vit.patch_embed.proj.weight.numel()


def _inner(block: Block) -> int:
    """Return the total width of all heads."""
    return block.attn.num_heads * block.attn.head_dim


def _scores(block: Block, plan: BlockPlan, tokens: int, has_class_token: bool) -> int:
    """Return the multiply-adds of the scores for dropping: the class token's row, or the whole map without one."""
    return 0 if plan.keep_rate == 1 else (1 if has_class_token else tokens) * tokens * _inner(block)
