"""Describe a model as the published estimators see it: by its leaf modules and their shapes.

The estimators of TinyTL, Back Razor and BSR visit the leaf modules of a network (linear layers, norms, activation
functions) in the order of the forward pass, and add up what each of them would keep. This module has all that such a
rule depends on. The rules are in `bsr_rule` and `backrazor_rule`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from moe_bsr.model import summary as describe
from moe_bsr.model.adapters import BESIDE_BLOCK
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT

EXPERTS = "mlp.experts"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf module applied to `rows` vectors of one image. A patch embedding is a linear layer on patches.

    Attributes:
        name: timm's name for it within its block.
        inputs, outputs: width of a vector that enters and leaves.
        trained: whether its weight requires a gradient.
    """

    name: str
    kind: Literal["linear", "norm", "activation"]
    rows: int
    inputs: int
    outputs: int
    trained: bool

    @property
    def input(self) -> int:
        """Number of elements of the input."""
        return self.rows * self.inputs

    @property
    def output(self) -> int:
        """Number of elements of the output."""
        return self.rows * self.outputs


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One block: norm1, attention, norm2, and FFN or experts, each as leaves in order.

    Attributes:
        name: "block 3", or "beside block 3" for a block that an adapter added.
        tokens: number of tokens that enter. width: inner width of the attention, heads x head width.
        on_path: whether its backward pass must run.
    """

    name: str
    tokens: int
    heads: int
    width: int
    on_path: bool
    norm1: tuple[Leaf, ...]
    attention: tuple[Leaf, ...]
    norm2: tuple[Leaf, ...]
    ffn: tuple[Leaf, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.norm1 + self.attention + self.norm2 + self.ffn


@dataclass(frozen=True, slots=True)
class Shape:
    """A model under a plan, with the head of one task, for one image.

    Attributes:
        trainable, frozen: numbers of parameters, including the heads and routers of all tasks.
        prefix: number of tokens that are never dropped. fuses: whether dropped tokens are fused into one.
        head_only: whether only heads train.
    """

    embedding: tuple[Leaf, ...]
    blocks: tuple[BlockShape, ...]
    head: tuple[Leaf, ...]
    trainable: int
    frozen: int
    prefix: int
    fuses: bool
    head_only: bool

    @property
    def sections(self) -> dict[str, tuple[Leaf, ...]]:
        """All leaves in the order of the forward pass: "embedding", "block 0" ..., "head"."""
        blocks = {block.name: block.leaves for block in self.blocks}
        return {"embedding": self.embedding} | blocks | {"head": self.head}


def from_model(model: MultitaskViT) -> Shape:
    """Return the shape of a model on any device, including "meta", with the head of its first task."""
    vit = model.vit
    patches, prefix = vit.patch_embed.num_patches, vit.num_prefix_tokens
    counts = describe.counts(model)
    convolution = vit.patch_embed.proj
    embedding = (
        Leaf(
            "patch_embed.proj",
            "linear",
            patches,
            convolution.weight[0].numel(),
            convolution.out_channels,
            convolution.weight.requires_grad,
        ),
    )
    embedding += _leaves(vit.norm_pre, patches + prefix, "norm_pre")
    blocks: list[BlockShape] = []
    for index, (block, (n, m)) in enumerate(zip(vit.blocks, counts, strict=True)):
        side = getattr(block, BESIDE_BLOCK, None)
        # The path's first block counts only if its own parameters train, not just those of the block beside it.
        own = any(p.requires_grad for name, p in block.named_parameters() if not name.startswith(BESIDE_BLOCK))
        on_path = index > model.path_start or index == model.path_start and (own or side is None)
        blocks.append(_block(f"block {index}", block, n, m, on_path))
        if side is not None:
            blocks.append(_block(f"beside block {index}", side, m, m, index >= model.path_start))
    last = counts[-1][1]
    head = _leaves(vit.norm, last, "norm")
    if vit.attn_pool is not None:  # its query is one latent token
        head += tuple(
            leaf if leaf.name.endswith(".kv") else replace(leaf, rows=1)
            for leaf in _leaves(vit.attn_pool, last, "attn_pool")
        )
    head += _leaves(vit.fc_norm, 1, "fc_norm") + _leaves(model.heads[model.tasks[0]], 1, "head")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Shape(
        embedding,
        tuple(blocks),
        head,
        sum(n for n, trains in sizes if trains),
        sum(n for n, trains in sizes if not trains),
        prefix,
        model.tokens_config.fuses,
        not any(p.requires_grad for p in vit.parameters()),
    )


def _block(name: str, block: nn.Module, tokens: int, ffn_tokens: int, on_path: bool) -> BlockShape:
    layer = block.attn
    moe = isinstance(block.mlp, MoE)
    return BlockShape(
        name,
        tokens,
        layer.num_heads,
        layer.num_heads * layer.head_dim,
        on_path,
        _leaves(block.norm1, tokens, "norm1"),
        _leaves(layer, tokens, "attn"),
        _leaves(block.norm2, ffn_tokens, "norm2"),
        _moe(block.mlp, ffn_tokens) if moe else _leaves(block.mlp, ffn_tokens, "mlp"),
    )


def _leaves(module: nn.Module, rows: int, name: str) -> tuple[Leaf, ...]:
    """Return the linear layers, norms and activation functions in a module, in the order of registration."""
    found: list[Leaf] = []
    width = 0  # input width of the next linear layer, which is the width of the activation before it
    for inner, leaf in reversed(list(module.named_modules(prefix=name))):
        if isinstance(leaf, nn.Linear):
            found.append(Leaf(inner, "linear", rows, leaf.in_features, leaf.out_features, leaf.weight.requires_grad))
            width = leaf.in_features
        elif hasattr(leaf, "normalized_shape"):
            size = leaf.normalized_shape[-1]
            heads = module.num_heads if inner.endswith(("q_norm", "k_norm")) else 1
            found.append(
                Leaf(inner, "norm", rows * heads, size, size, leaf.weight is not None and leaf.weight.requires_grad)
            )
        elif inner.endswith(".act"):
            found.append(Leaf(inner, "activation", rows, width, width, False))
    return tuple(reversed(found))


def _moe(moe: MoE, tokens: int) -> tuple[Leaf, ...]:
    """Return router and experts as linear layers. A token is one row of the router and top_k rows of the experts."""
    experts, hidden, width = moe.experts.fc1_weight.shape
    trained = moe.experts.fc1_weight.requires_grad
    rows = moe.top_k * tokens
    router = any(p.requires_grad for p in moe.router.parameters())
    shared: tuple[Leaf, ...] = ()
    if moe.shared is not None:  # the FFN, and all experts side by side on every token
        shared, rows, hidden = _leaves(moe.shared, tokens, "mlp.shared"), tokens, experts * hidden
    return (
        *shared,
        Leaf("mlp.router", "linear", tokens, width, experts, router),
        Leaf(f"{EXPERTS}.fc1", "linear", rows, width, hidden, trained),
        Leaf(f"{EXPERTS}.act", "activation", rows, hidden, hidden, False),
        Leaf(f"{EXPERTS}.fc2", "linear", rows, hidden, width, trained),
    )
