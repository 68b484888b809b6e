"""The one forward of a transformer block: attention -> select tokens -> FFN or experts.

It reads the submodules of a timm `Block` and calls none of their forwards that would hide the class
token's attention or the routing. Nothing else in this package overrides a timm forward.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from moe_bsr.config import TokensConfig
from moe_bsr.cost.ledger import INDEX, ROW, Backward, Held, Ledger, add_bytes, norm_bytes
from moe_bsr.model.moe import MoE, Routing, moe_bytes
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Dropped, Tokens, count_kept, drop, drop_bytes, received_attention
from moe_bsr.ops.attention import attention, attention_bytes, join_heads, split_heads
from moe_bsr.ops.linear import activated_linear, activated_linear_bytes, linear, linear_bytes


@dataclass(slots=True)
class Record:
    """What a block reports beside its output; None where it does not apply."""

    dropped: Dropped | None = None
    routing: Routing | None = None


def supported(block: nn.Module) -> bool:
    """Whether `forward` below is this block's forward."""
    return type(block) is Block and type(block.attn) is Attention


def forward(
    block: Block,
    tokens: Tokens,
    *,
    plan: BlockPlan,
    config: TokensConfig,
    prefix: int,
    has_class_token: bool,
    task: str,
    replay: Replay,
    noise_key: tuple[int, ...] | None = None,
    needs_output: bool = True,
) -> tuple[Tokens, Record]:
    """One block on (B, N, D) tokens, leaving (B, N', D) with N' <= N.

    Args:
        prefix: number of prefix tokens (class and register tokens), never dropped.
        decisions: kept tokens, experts and gate noise: made here at first, replayed ever after.
        valued: whether the output's values are wanted; a block that runs again for its backward pass wants
            the graph alone, and needs no last product for it.
    """
    record = Record()
    hidden, *scores = attend(block.attn, block.norm1(tokens.x), plan.keep_rate < 1, has_class_token, config.attached)
    x = tokens.x + block.drop_path1(scale(block.ls1, hidden))
    tokens = Tokens(x, tokens.origin, tokens.fused)
    del hidden, x  # or they would live through the FFN, the widest part
    if plan.keep_rate < 1:
        tokens, record.dropped = drop(tokens, *scores, keep=plan.keep_rate, prefix=prefix, config=config, replay=replay)
    needs_output = needs_output or needs_last_product(block)
    if isinstance(block.mlp, MoE):
        hidden, record.routing = block.mlp(block.norm2(tokens.x), task, replay, noise_key, needs_output)
    else:
        hidden = feed_forward(block.mlp, block.norm2(tokens.x), needs_output)
    x = tokens.x + block.drop_path2(scale(block.ls2, hidden))
    return Tokens(x, tokens.origin, tokens.fused), record


def needs_last_product(block: Block) -> bool:
    """Whether something behind the FFN's last product keeps it: a LayerScale that trains."""
    return any(p.requires_grad for p in block.ls2.parameters())


def scale(layer: nn.Module, x: Tensor) -> Tensor:
    """LayerScale in the type of x: float32 factors would widen a bf16 stream for all that follows."""
    return x * layer.gamma.to(x.dtype) if type(layer) is LayerScale and not layer.inplace else layer(x)


def attend(
    layer: Attention, hidden: Tensor, scores: bool, has_class_token: bool, attached: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention over all tokens, (B, N, D), and if wanted the scores of the tokens: no N x N map is kept.

    Scores are (B, N) probabilities and logits: the class token's attention, or without a class token
    the mean attention received.
    """
    qkv = project(layer, hidden)
    y, *given = attention(qkv, layer.num_heads, layer.scale, scores and has_class_token, attached)
    if scores and not has_class_token:
        with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
            given = received_attention(*split_heads(qkv, layer.num_heads)[:2], layer.scale)
    del qkv
    y = layer.norm(y)
    if layer.gate is not None:
        y = y * linear(layer.gate, hidden).sigmoid()
    return linear(layer.proj, y), *given


def project(layer: Attention, hidden: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, 3 D) queries, keys and values, as the attention product takes them."""
    qkv = linear(layer.qkv, hidden)
    if isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity):
        return qkv
    q, k, v = split_heads(qkv, layer.num_heads)
    return torch.cat([join_heads(t) for t in (layer.q_norm(q), layer.k_norm(k), v)], -1)


def feed_forward(mlp: Mlp, x: Tensor, needs_output: bool = True) -> Tensor:
    """(B, N, D) -> (B, N, D): a plain two-layer FFN; other kinds run as timm wrote them."""
    if type(mlp) is not Mlp:
        return mlp(x)
    x = linear(mlp.fc1, x)
    if torch.is_grad_enabled() and isinstance(mlp.norm, nn.Identity):
        return activated_linear(mlp.act, mlp.fc2, x, needs_output)
    x = mlp.act(x)
    return linear(mlp.fc2, mlp.norm(x))


def unstated(block: Block, plan: BlockPlan, has_class_token: bool) -> list[str]:
    """The parts of a block that run, but that `block_bytes` knows nothing of."""
    layer, mlp = block.attn, block.mlp
    moe = isinstance(mlp, MoE)
    act = mlp.experts.act if moe else getattr(mlp, "act", None)
    kinds = {
        f"FFN ({type(mlp).__name__})": moe or type(mlp) is Mlp,
        "norm within the FFN": moe or isinstance(getattr(mlp, "norm", None), nn.Identity | None),
        f"activation ({type(act).__name__})": act is None or isinstance(act, nn.GELU),
        "norm of queries and keys": isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity),
        "norm within the attention": isinstance(layer.norm, nn.Identity),
        "gate of the attention": layer.gate is None,
        f"norm ({type(block.norm1).__name__})": all(isinstance(n, nn.LayerNorm) for n in (block.norm1, block.norm2)),
        "scaling of a branch": all(
            isinstance(s, nn.Identity) or type(s) is LayerScale and not s.inplace for s in (block.ls1, block.ls2)
        ),
        "drop path": all(isinstance(d, nn.Identity) for d in (block.drop_path1, block.drop_path2)),
        "scores of tokens without a class token": has_class_token or plan.keep_rate == 1,
    }
    return [name for name, stated in kinds.items() if not stated]


def block_bytes(
    ledger: Ledger,
    block: Block,
    plan: BlockPlan,
    config: TokensConfig,
    x: Held,
    batch: int,
    before: int,
    after: int,
    prefix: int,
    needs_x: bool,
) -> tuple[Held, list[Held], Backward]:
    """What `forward` allocates and keeps for `batch` images of `before` tokens, `after` in the FFN.

    Args:
        needs_x: whether the input needs a gradient. Nothing of the block may be `unstated`.
    Returns:
        The output, what the record holds, and the backward.
    """
    layer, size = block.attn, ledger.size
    width, rows, rows_after = layer.qkv.in_features, batch * before, batch * after
    needs = needs_x or any(p.requires_grad for p in layer.parameters())
    records: list[Held] = []

    ledger.tokens = before
    hidden, of_norm1 = norm_bytes(ledger, block.norm1, x, rows, width, needs_x)
    qkv, of_qkv = linear_bytes(ledger, layer.qkv, hidden, rows, needs_x or needs)
    y, scores, of_attention = attention_bytes(
        ledger,
        qkv,
        batch,
        layer.num_heads,
        before,
        layer.num_heads * layer.head_dim,
        scores=plan.keep_rate < 1,
        attached=config.attached,
    )
    ledger.free(qkv)
    out, of_proj = linear_bytes(ledger, layer.proj, y, rows, True)
    ledger.free(y, hidden)
    scaled, of_scale1 = scale_bytes(ledger, block.ls1, out)
    stream = ledger.make(rows * width * size)
    ledger.free(scaled, out)
    of_drop = None
    candidates = before - prefix  # one dropped and fused leaves as many
    if after < before or count_kept(candidates, plan.keep_rate) < candidates:
        records.append(
            ledger.make(batch * (before + after - 2 * prefix) * INDEX + batch * (before - prefix) * ROW, packable=False)
        )
        shorter, of_drop = drop_bytes(ledger, batch, before, after, prefix, width, config, needs)
        ledger.free(stream)
        stream, ledger.tokens = shorter, after
    ledger.free(scores)
    needs_output = ledger.needs_output or needs_last_product(block)
    hidden, of_norm2 = norm_bytes(ledger, block.norm2, stream, rows_after, width, needs)
    if isinstance(block.mlp, MoE):
        out, held, of_ffn = moe_bytes(ledger, block.mlp, hidden, rows_after, needs_output)
        records += held
        ledger.free(hidden)
    else:
        out, of_ffn = mlp_bytes(ledger, block.mlp, hidden, rows_after, needs, needs_output)
    scaled, of_scale2 = scale_bytes(ledger, block.ls2, out)
    end = ledger.make(rows_after * width * size)
    ledger.free(scaled, out, stream)

    def backward(grad: Held) -> Held | None:
        branch = ledger.make(0)  # the incoming gradient goes down both ways at once, uncopied
        grad = add_bytes(ledger, grad, of_norm2(of_ffn(of_scale2(branch))))
        if of_drop is not None:
            grad = of_drop(grad)
        branch = of_scale1(ledger.make(0) if needs_x else grad)
        branch = of_norm1(of_qkv(of_attention(of_proj(branch))))
        return add_bytes(ledger, grad, branch) if needs_x else None

    return end, records, backward


def scale_bytes(ledger: Ledger, scale: nn.Module, x: Held) -> tuple[Held, Backward]:
    """LayerScale makes one tensor more; kept: its input, if its factors train. Without it x itself comes back."""
    if isinstance(scale, nn.Identity):
        return x, lambda grad: grad
    trains = scale.gamma.requires_grad
    y = ledger.make(x.bytes)
    if trains:
        ledger.save(x, "scale inputs")

    def backward(grad: Held) -> Held:
        if trains:
            ledger.restore(x)
        out = ledger.make(x.bytes)
        if trains:
            ledger.scratch(x.bytes)
            ledger.release(x)
        ledger.free(grad)
        return out

    return y, backward


def mlp_bytes(ledger: Ledger, mlp: Mlp, x: Held, rows: int, needs: bool, needs_output: bool) -> tuple[Held, Backward]:
    """Kept: fc1's input, if it trains, and the hidden values before the activation. Takes x over."""
    hidden, of_fc1 = linear_bytes(ledger, mlp.fc1, x, rows, needs)
    ledger.free(x)
    if ledger.grad:
        out, of_fc2 = activated_linear_bytes(ledger, mlp.fc2, hidden, rows, needs_output)
        return out, lambda grad: of_fc1(of_fc2(grad))
    after = ledger.make(hidden.bytes)
    ledger.free(hidden)
    out, of_fc2 = linear_bytes(ledger, mlp.fc2, after, rows, needs)
    ledger.free(after)
    return out, of_fc2


def macs(block: Block, plan: BlockPlan, attention_tokens: int, ffn_tokens: int, has_class_token: bool = True) -> int:
    """Multiply-adds of one image's forward pass: 4 D^2 n + 2 D n^2 for the attention, the scores, the FFN."""
    n, layer = attention_tokens, block.attn
    total = n * (layer.qkv.weight.numel() + layer.proj.weight.numel()) + 2 * n * n * _inner(block)
    if layer.gate is not None:
        total += n * layer.gate.weight.numel()
    total += _scores(block, plan, n, has_class_token)
    if isinstance(block.mlp, MoE):
        return total + block.mlp.macs(ffn_tokens)
    return total + ffn_tokens * sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)


def backward_macs(
    block: Block,
    plan: BlockPlan,
    attention_tokens: int,
    ffn_tokens: int,
    has_class_token: bool = True,
    attached: bool = True,
) -> tuple[int, int]:
    """Multiply-adds of one image's backward pass: (for the inputs, for the weights that train).

    The two products of attention have two operands each, and the map is computed once more.

    Args:
        attached: whether the scores have a gradient (their product has two operands as well).
    """
    n = attention_tokens
    maps, scores = n * n * _inner(block), _scores(block, plan, n, has_class_token)
    of_matrices = macs(block, plan, n, ffn_tokens, has_class_token) - 2 * maps - scores
    again = 0 if has_class_token else scores  # a whole map, computed once more as well
    inputs = of_matrices + 5 * maps + (2 * scores + again if attached else 0)
    if not plan.trainable:
        return inputs, 0
    frozen = isinstance(block.mlp, MoE) and not any(p.requires_grad for p in block.mlp.router.parameters())
    return inputs, of_matrices - (block.mlp.router_macs(ffn_tokens) if frozen else 0)


def skipped_macs(block: Block, ffn_tokens: int) -> int:
    """Of one image: what `forward` leaves out where its values are not wanted."""
    if needs_last_product(block) or type(block.mlp) not in (Mlp, MoE):
        return 0
    if isinstance(block.mlp, MoE):
        return ffn_tokens * block.mlp.top_k * block.mlp.experts.fc2_weight[0].numel()
    return ffn_tokens * block.mlp.fc2.weight.numel()


def _inner(block: Block) -> int:
    """Width of all heads together."""
    return block.attn.num_heads * block.attn.head_dim


def _scores(block: Block, plan: BlockPlan, tokens: int, has_class_token: bool) -> int:
    """Multiply-adds of the scores, if tokens are dropped: the class token's row, or without one the whole map."""
    return 0 if plan.keep_rate == 1 else (1 if has_class_token else tokens) * tokens * _inner(block)
