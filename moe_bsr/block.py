"""The one forward of a transformer block: attention -> select tokens -> FFN or experts.

It reads the submodules of a timm `Block` and calls none of their forwards that would hide the class
token's attention or the routing. Nothing else in this package overrides a timm forward.
"""

from dataclasses import dataclass

from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moe_bsr.attention import attention
from moe_bsr.config import TokensConfig
from moe_bsr.decisions import Decisions
from moe_bsr.moe import MoE, Routing
from moe_bsr.plan import BlockPlan
from moe_bsr.tokens import Dropped, Tokens, drop


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
    q, k, v = project(block.attn, hidden)
    x = tokens.x + block.drop_path1(block.ls1(attend(block.attn, hidden, q, k, v)))
    tokens = Tokens(x, tokens.origin, tokens.fused)
    if plan.keep < 1:
        tokens, record.dropped = drop(
            tokens, q, k, scale=block.attn.scale, keep=plan.keep, prefix=prefix,
            has_class_token=has_class_token, config=config, decisions=decisions)
    hidden = block.norm2(tokens.x)
    if isinstance(block.mlp, MoE):
        hidden, record.routing = block.mlp(hidden, task, decisions, noise_key)
    else:
        hidden = block.mlp(hidden)
    x = tokens.x + block.drop_path2(block.ls2(hidden))
    return Tokens(x, tokens.origin, tokens.fused), record


def project(layer: Attention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D) -> queries, keys, values, each (B, H, N, D/H), as the attention product takes them."""
    q, k, v = rearrange(layer.qkv(hidden), "b n (three h d) -> three b h n d", three=3,
                        h=layer.num_heads)
    return layer.q_norm(q), layer.k_norm(k), v


def attend(layer: Attention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all tokens on the fused path, (B, N, D): no N x N map is ever kept."""
    y = layer.norm(rearrange(attention(q, k, v, layer.scale), "b h n d -> b n (h d)"))
    if layer.gate is not None:
        y = y * layer.gate(hidden).sigmoid()
    return layer.proj(y)


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
