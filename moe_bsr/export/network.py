"""A ViT with its plan and one task's head as ONNX operators: images -> logits.

It computes the same function as `model/block.py`, `model/tokens.py` and `model/merging.py`, with two differences in the
operators. Kept tokens are ordered by score, since the order does not matter without later position embeddings. If only
the class token of the last block is read, that block computes only this token.

    B images, N tokens of which P prefix tokens, D width, H heads, C candidates of a drop, K kept
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from moe_bsr.config import ConfigError, require
from moe_bsr.export import layers, merging
from moe_bsr.export.graph import Graph
from moe_bsr.export.layers import Names, tokens_from
from moe_bsr.export.low_rank import low_rank
from moe_bsr.export.mixture import mixture
from moe_bsr.model.adapters import BESIDE_BLOCK, BESIDE_FFN
from moe_bsr.model.adapters.repnet import SideBlock
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import count_kept


@dataclass(frozen=True, slots=True)
class Part:
    """The model of one task, and which of its tensors other tasks share.

    Attributes:
        shared_blocks: number of first blocks whose tensors are the same for all tasks. None: those of all blocks and
            of the final norm are. Routers and heads always belong to their task.
        experts: by block, the indices of the run's experts that the model has. A block without an entry has all.
    """

    model: MultitaskViT
    task: str
    shared_blocks: int | None = None
    experts: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = "a side network cannot be exported, other adapters can"
        require(self.model.ladder is None, "adapter", "ladder", f"{allowed}; `moe-bsr share` shares the run itself")

    def owner(self, block: int) -> str:
        """Return the task that a block's tensors belong to, "" if they are shared."""
        return "" if self.shared_blocks is None or block < self.shared_blocks else self.task


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens between two blocks.

    Attributes:
        x: (B, N, D). count: N. fused: whether the last token is a fused one. merged: record of merges, if any.
    """

    x: str
    count: int
    fused: bool = False
    merged: merging.Merged | None = None


def write(g: Graph, part: Part, images: str) -> str:
    """Normalized images (B, 3, S, S) -> logits (B, classes) of the part's task."""
    model, vit = part.model, part.model.vit
    stream = _embed(g, vit, images, Names(owner=part.owner(0)))
    read = []
    for index in range(len(model.plan)):
        stream = _block(g, part, index, stream)
        if index in model.head_blocks:
            read.append(_first(g, stream.x))
    names = Names(owner=part.owner(len(model.plan)))
    features = _pool(g, vit, stream, names)
    if read:
        features = g.op("Concat", features, *read, axis=1)
    head = model.heads[part.task]
    own = Names("head.", part.task)
    y = g.op("MatMul", features, own.weight(g, "weight", head.weight.t()), name=f"{part.task}/head")
    return g.op("Add", y, own.weight(g, "bias", head.bias))


def _embed(g: Graph, vit: nn.Module, images: str, names: Names) -> Stream:
    patches, conv = names / "patch_embed", vit.patch_embed.proj
    inputs = [(patches / "proj").weight(g, "weight", conv.weight)]
    if conv.bias is not None:
        inputs.append((patches / "proj").weight(g, "bias", conv.bias))
    x = g.op("Conv", images, *inputs, kernel_shape=list(conv.kernel_size), strides=list(conv.stride))
    count, width = vit.patch_embed.num_patches, conv.out_channels
    x = g.op("Transpose", g.op("Reshape", x, g.constant([0, width, -1])), perm=[0, 2, 1])
    x = layers.norm(g, vit.patch_embed.norm, x, patches / "norm")
    prefix, places = _prefix_and_positions(vit, count, width)
    if places is not None:
        x = g.op("Add", x, names.weight(g, "pos_embed", places))
    if prefix is not None:
        batch = g.op("Shape", images, start=0, end=1)
        shape = g.op("Concat", batch, g.constant([prefix.shape[1], width]), axis=0)
        x = g.op("Concat", g.op("Expand", names.weight(g, "prefix_tokens", prefix), shape), x, axis=1)
    x = layers.norm(g, vit.norm_pre, x, names / "norm_pre")
    return Stream(x, count + vit.num_prefix_tokens)


def _prefix_and_positions(vit: nn.Module, patches: int, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return prefix tokens (1, P, D), with any position embeddings added, and those of the patches (1, C, D)."""
    tokens = [each.detach().float() for each in (vit.cls_token, vit.reg_token) if each is not None]
    prefix = torch.cat(tokens, 1) if tokens else None
    if vit.pos_embed is None:
        return prefix, None
    places = vit.pos_embed.detach().float()
    if places.shape[1] == patches:
        return prefix, places
    return prefix + places[:, : prefix.shape[1]], places[:, prefix.shape[1] :]


def _block(g: Graph, part: Part, index: int, stream: Stream) -> Stream:
    """One block as in `model.block.forward`: attention, drop or merge if planned, FFN or experts."""
    model, layer = part.model, part.model.vit.blocks[index]
    plan, names = model.plan[index], Names(f"blocks.{index}.", part.owner(index))
    drops = plan.keep_rate < 1
    only_first = index == len(model.plan) - 1 and _reads_first_alone(model.vit) and not drops
    if isinstance(layer.mlp, MoE) and layer.mlp.gate == "image":  # its gates depend on all tokens
        only_first = False
    x = layers.norm(g, layer.norm1, stream.x, names / "norm1")
    bias = None if stream.merged is None else merging.bias(g, stream.merged, model.vit.num_prefix_tokens)
    y, maps, keys = _attention(g, layer.attn, x, bias, names / "attn", only_first)
    x = tokens_from(g, stream.x, 0, 1) if only_first else stream.x
    x = g.op("Add", x, layers.layer_scale(g, layer.ls1, y, names / "ls1"))
    entering, stream = stream, replace(stream, x=x, count=1 if only_first else stream.count)

    def reduced(stream: Stream) -> Stream:
        if model.tokens_config.merges:
            return _merge(g, model, stream, keys, plan.keep_rate)
        return _drop(g, model, stream, maps, plan.keep_rate)

    stream = reduced(stream) if drops else stream
    x = layers.norm(g, layer.norm2, stream.x, names / "norm2")
    if isinstance(layer.mlp, MoE):
        y = _mixture(g, part, index, x, names / "mlp")
    else:
        y = layers.feed_forward(g, layer.mlp, x, names / "mlp")
    y = layers.layer_scale(g, layer.ls2, y, names / "ls2")
    if (beside := getattr(layer, BESIDE_FFN, None)) is not None:
        y = g.op("Add", y, layers.beside_ffn(g, beside, stream.x, names / BESIDE_FFN))
    x = g.op("Add", stream.x, y)
    if (side := getattr(layer, BESIDE_BLOCK, None)) is not None:
        entering = reduced(entering) if drops else entering
        bias = None if entering.merged is None else merging.bias(g, entering.merged, model.vit.num_prefix_tokens)
        x = g.op("Add", x, _beside_block(g, side, entering.x, bias, names / BESIDE_BLOCK, only_first))
    return replace(stream, x=x)


def _beside_block(g: Graph, side: SideBlock, x: str, bias: str | None, names: Names, only_first: bool) -> str:
    """Output of a parallel block, which is added to the block's: `SideBlock.forward`."""
    y, _, _ = _attention(g, side.attn, layers.norm(g, side.norm1, x, names / "norm1"), bias, names / "attn", only_first)
    middle = g.op("Add", tokens_from(g, x, 0, 1) if only_first else x, y)
    z = layers.feed_forward(g, side.mlp, layers.norm(g, side.norm2, middle, names / "norm2"), names / "mlp")
    return g.op("Add", middle if side.published else y, z)


def _mixture(g: Graph, part: Part, index: int, x: str, names: Names) -> str:
    moe, width = part.model.vit.blocks[index].mlp, part.model.vit.embed_dim
    if moe.shared is not None:
        return low_rank(g, moe, x, width, part.task, names, index in part.experts)
    experts = part.experts.get(index, list(range(len(moe.experts.fc1_weight))))
    return mixture(g, moe, x, width, part.task, names, experts)


def _reads_first_alone(vit: nn.Module) -> bool:
    return vit.attn_pool is None and vit.global_pool == "token"


def _attention(
    g: Graph, attn: nn.Module, x: str, key_bias: str | None, names: Names, only_first: bool
) -> tuple[str, tuple[str, str], str]:
    """Self-attention of tokens (B, N, D).

    Args:
        key_bias: (B, 1, 1, N), added to the logits of each key.
        only_first: whether to compute only the first token's output.
    Returns:
        The output (B, N, D), or (B, 1, D) with `only_first`; the attention maps and their logits (B, H, N, N); the
        keys (B, H, d, N).
    """
    weight, bias = layers.merged(attn.qkv, names / "qkv")
    inner = attn.num_heads * attn.head_dim
    if only_first:  # only the first token has a query
        bias_q, bias_kv = (None, None) if bias is None else bias.split([inner, 2 * inner])
        q = layers.product(g, tokens_from(g, x, 0, 1), weight[:inner], bias_q, names / "q")
        kv = layers.product(g, x, weight[inner:], bias_kv, names / "kv")
        k, v = g.op("Split", kv, axis=-1, num_outputs=2, outputs=2)
    else:
        qkv = layers.product(g, x, weight, bias, names / "qkv")
        q, k, v = g.op("Split", qkv, axis=-1, num_outputs=3, outputs=3)
    q = layers.norm(g, attn.q_norm, layers.heads_apart(g, q, attn.num_heads, inner), names / "q_norm")
    if isinstance(attn.k_norm, layers.INACTIVE):
        k = layers.heads_apart(g, k, attn.num_heads, inner, transposed=True)
    else:
        k = layers.norm(g, attn.k_norm, layers.heads_apart(g, k, attn.num_heads, inner), names / "k_norm")
        k = g.op("Transpose", k, perm=[0, 1, 3, 2])
    logits = g.op("MatMul", g.op("Mul", q, g.constant(attn.scale, np.float32)), k)
    if key_bias is not None:
        logits = g.op("Add", logits, key_bias)
    maps = g.op("Softmax", logits, axis=-1)
    y = layers.heads_joined(g, g.op("MatMul", maps, layers.heads_apart(g, v, attn.num_heads, inner)), inner)
    y = layers.norm(g, attn.norm, y, names / "norm")
    if attn.gate is not None:
        first = tokens_from(g, x, 0, 1) if only_first else x
        y = g.op("Mul", y, g.op("Sigmoid", layers.linear(g, attn.gate, first, names / "gate")))
    return layers.linear(g, attn.proj, y, names / "proj"), (maps, logits), k


def _merge(g: Graph, model: MultitaskViT, stream: Stream, keys: str, keep_rate: float) -> Stream:
    """Merge similar tokens into their mean: `model.merging.merge`."""
    prefix = model.vit.num_prefix_tokens
    candidates = stream.count - prefix
    left = count_kept(candidates, keep_rate)
    if left == candidates:
        return stream
    x, merged = merging.merge(g, stream.x, keys, stream.merged, prefix, candidates, left)
    return Stream(x, prefix + left, merged=merged)


def _drop(g: Graph, model: MultitaskViT, stream: Stream, maps: tuple[str, str], keep_rate: float) -> Stream:
    """Keep the tokens with the highest scores and fuse the others into one, placed last: `model.tokens.drop`."""
    vit, config = model.vit, model.tokens_config
    prefix, protected = vit.num_prefix_tokens, config.protect_fused and stream.fused
    candidates = stream.count - prefix - protected
    kept = count_kept(candidates, keep_rate)
    if kept == candidates:
        return stream
    scores, ranking = (_scores(g, each, vit.has_class_token, prefix, prefix + candidates) for each in maps)
    ranking = scores if config.rank_by == "probabilities" else ranking
    _, chosen = g.op("TopK", ranking, g.constant([kept]), axis=-1, outputs=2)  # ties go to the lower position
    patches = tokens_from(g, stream.x, prefix, prefix + candidates)
    parts = [tokens_from(g, stream.x, 0, prefix)] if prefix else []
    parts.append(g.op("GatherND", patches, g.op("Unsqueeze", chosen, g.constant([2])), batch_dims=1))
    if config.fuses:
        nothing = g.op("Mul", g.op("Cast", chosen, to=1), g.constant(0, np.float32))
        weights = g.op("ScatterElements", scores, chosen, nothing, axis=1)  # scores of the dropped tokens, else 0
        if config.fuse == "normalized":
            weights = g.op("Div", weights, g.op("ReduceSum", weights, g.constant([1]), keepdims=1))
        fused = g.op("MatMul", g.op("Unsqueeze", weights, g.constant([1])), patches)  # (B, 1, C) (B, C, D)
        if protected:  # the fused token of an earlier drop is added with weight 1
            fused = g.op("Add", fused, tokens_from(g, stream.x, stream.count - 1))
        parts.append(fused)
    x = g.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    return Stream(x, prefix + kept + config.fuses, config.fuses)


def _scores(g: Graph, maps: str, has_class_token: bool, start: int, end: int) -> str:
    """Scores (B, C) from maps (B, H, N, N): the class token's row, or else the mean of all rows; mean over heads."""
    if has_class_token:
        row = g.op("Gather", maps, g.constant(0), axis=2)
        scores = g.op("ReduceMean", row, g.constant([1]), keepdims=0)
    else:
        scores = g.op("ReduceMean", maps, g.constant([1, 2]), keepdims=0)
    return tokens_from(g, scores, start, end)


def _pool(g: Graph, vit: nn.Module, stream: Stream, names: Names) -> str:
    """Final norm and the backbone's pooling: tokens of the last block -> features (B, D)."""
    x, prefix = layers.norm(g, vit.norm, stream.x, names / "norm"), vit.num_prefix_tokens
    if stream.merged is not None and not _reads_first_alone(vit):
        patches = merging.spread(g, tokens_from(g, x, prefix), stream.merged)
        x = g.op("Concat", tokens_from(g, x, 0, prefix), patches, axis=1) if prefix else patches
    prefix = 0 if vit.pool_include_prefix else prefix
    patches = tokens_from(g, x, prefix) if prefix else x
    if vit.attn_pool is not None:
        x = layers.attention_pool(g, vit.attn_pool, patches, names / "attn_pool")
    elif vit.global_pool == "token":
        x = _first(g, x)
    elif vit.global_pool in ("avg", "avgmax", "max"):
        parts = [("ReduceMean", "avg"), ("ReduceMax", "max")]
        found = [g.op(kind, patches, g.constant([1]), keepdims=0) for kind, word in parts if word in vit.global_pool]
        x = found[0] if len(found) == 1 else g.op("Mul", g.op("Add", *found), g.constant(0.5, np.float32))
    else:
        raise ConfigError(f"backbone.name: pools by {vit.global_pool!r}, which cannot be exported to ONNX")
    return layers.norm(g, vit.fc_norm, x, names / "fc_norm")


def _first(g: Graph, x: str) -> str:
    """Class token: (B, N, D) -> (B, D)."""
    return g.op("Squeeze", tokens_from(g, x, 0, 1), g.constant([1]))
