"""The one forward of a transformer block: attention -> select tokens -> FFN or experts.

It reads the submodules of a timm `Block` and calls none of their forwards that would hide the class
token's attention or the routing. Nothing else in this package overrides a timm forward.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moe_bsr.attention import attention, join_heads, split_heads
from moe_bsr.config import TokensConfig
from moe_bsr.decisions import Decisions
from moe_bsr.linear import linear
from moe_bsr.moe import MoE, Routing
from moe_bsr.plan import BlockPlan
from moe_bsr.tokens import Dropped, Tokens, drop, received_attention


@dataclass(slots=True)
class Record:
    """What a block reports beside its output; None where it does not apply."""

    dropped: Dropped | None = None
    routing: Routing | None = None


def supported(block: nn.Module) -> bool:
    """Whether `forward` below is this block's forward."""
    return type(block) is Block and type(block.attn) is Attention


def forward(block: Block, tokens: Tokens, *, plan: BlockPlan, config: TokensConfig, prefix: int,
            has_class_token: bool, task: str, decisions: Decisions,
            noise_key: tuple[int, ...] | None = None) -> tuple[Tokens, Record]:
    """One block on (B, N, D) tokens, leaving (B, N', D) with N' <= N.

    Args:
        prefix: number of prefix tokens (class and register tokens), never dropped.
        decisions: kept tokens, experts and gate noise: made here at first, replayed ever after.
    """
    record = Record()
    hidden = block.norm1(tokens.x)
    qkv = project(block.attn, hidden)
    attached = config.fuse != "none" and not config.detach  # only the fused token's weights have a gradient
    hidden, *scores = attend(block.attn, hidden, qkv, plan.keep < 1, has_class_token, attached)
    x = tokens.x + block.drop_path1(block.ls1(hidden))
    tokens = Tokens(x, tokens.origin, tokens.fused)
    if plan.keep < 1:
        tokens, record.dropped = drop(tokens, *scores, keep=plan.keep, prefix=prefix, config=config,
                                      decisions=decisions)
    hidden = block.norm2(tokens.x)
    if isinstance(block.mlp, MoE):
        hidden, record.routing = block.mlp(hidden, task, decisions, noise_key)
    else:
        hidden = feed_forward(block.mlp, hidden)
    x = tokens.x + block.drop_path2(block.ls2(hidden))
    return Tokens(x, tokens.origin, tokens.fused), record


def project(layer: Attention, hidden: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, 3 D) queries, keys and values, as the attention product takes them."""
    qkv = linear(layer.qkv, hidden)
    if isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity):
        return qkv
    q, k, v = split_heads(qkv, layer.num_heads)
    return torch.cat([join_heads(t) for t in (layer.q_norm(q), layer.k_norm(k), v)], -1)


def attend(layer: Attention, hidden: Tensor, qkv: Tensor, scores: bool, has_class_token: bool,
           attached: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention over all tokens, (B, N, D), and if wanted the scores of the tokens: no N x N map is kept.

    Scores are (B, N) probabilities and logits: the class token's attention, or without a class token
    the mean attention received.
    """
    y, *given = attention(qkv, layer.num_heads, layer.scale, scores and has_class_token, attached)
    if scores and not has_class_token:
        with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
            given = received_attention(*split_heads(qkv, layer.num_heads)[:2], layer.scale)
    y = layer.norm(y)
    if layer.gate is not None:
        y = y * linear(layer.gate, hidden).sigmoid()
    return linear(layer.proj, y), *given


def feed_forward(mlp: Mlp, hidden: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, D): a plain two-layer FFN; other kinds run as timm wrote them."""
    if type(mlp) is not Mlp:
        return mlp(hidden)
    return linear(mlp.fc2, mlp.norm(mlp.act(linear(mlp.fc1, hidden))))


def multiply_adds(block: Block, plan: BlockPlan, attention_tokens: int, ffn_tokens: int) -> int:
    """Multiply-adds of one image's forward pass: 4 D^2 n + 2 D n^2 for the attention, the scores, the FFN."""
    n, layer = attention_tokens, block.attn
    inner = layer.num_heads * layer.head_dim
    total = n * (layer.qkv.weight.numel() + layer.proj.weight.numel()) + 2 * n * n * inner
    if layer.gate is not None:
        total += n * layer.gate.weight.numel()
    if plan.keep < 1:
        total += n * inner  # the class token's row of scores
    if isinstance(block.mlp, MoE):
        return total + block.mlp.multiply_adds(ffn_tokens)
    return total + ffn_tokens * sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
