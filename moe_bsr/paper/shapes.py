"""A model as the published estimators see it: leaf modules with their shapes, nothing else.

The estimators of TinyTL, Back Razor and BSR walk over the leaf modules of a network (linear layers,
norms, activations) in the order of the forward pass and add up what each of them would keep. Everything
such a rule may look at is here; the rules are `bsr_rule` and `backrazor_rule`.
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
    """A leaf module applied to `rows` vectors of one image. A patch convolution is a linear layer of patches.

    Attributes:
        name: as timm names it within its block.
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
        """Elements that come in."""
        return self.rows * self.inputs

    @property
    def output(self) -> int:
        """Elements that go out."""
        return self.rows * self.outputs


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One block: norm1 | attention | norm2 | FFN or experts, each as leaves in order.

    Attributes:
        name: "block 3", or "beside block 3" of one that an adapter put there.
        width: inner width of the attention, heads x head width.
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
    """A planned model with the head of one task, on one image.

    Attributes:
        trainable, frozen: numbers of parameters, all tasks' heads and routers included.
        prefix: tokens that are never dropped. fuses: whether the dropped ones become one token.
        head_only: nothing but heads trains.
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


def from_model(model: MultitaskViT, task: str | None = None) -> Shape:
    """The shape of one of our models (on any device, the meta device too), for the first task by default."""
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
        # Through the first block on the path a gradient goes only if it trains itself, not the one beside it.
        own = any(p.requires_grad for name, p in block.named_parameters() if not name.startswith(BESIDE_BLOCK))
        on_path = index > model.path_start or index == model.path_start and (own or side is None)
        blocks.append(_block(f"block {index}", block, n, m, on_path))
        if side is not None:
            blocks.append(_block(f"beside block {index}", side, m, m, index >= model.path_start))
    last = counts[-1][1]
    head = _leaves(vit.norm, last, "norm")
    if vit.attn_pool is not None:  # one latent token attends to all
        head += tuple(
            leaf if leaf.name.endswith(".kv") else replace(leaf, rows=1)
            for leaf in _leaves(vit.attn_pool, last, "attn_pool")
        )
    head += _leaves(vit.fc_norm, 1, "fc_norm") + _leaves(model.heads[task or model.tasks[0]], 1, "head")
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
    """The linear layers, norms and activations in a module, in the order they were registered."""
    found: list[Leaf] = []
    width = 0  # of what goes into the next linear layer, which is what an activation sees
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
    """Router and experts as the linear layers they are: a token is one row there, top_k rows here."""
    experts, hidden, width = moe.experts.fc1_weight.shape
    trained = moe.experts.fc1_weight.requires_grad
    rows = moe.top_k * tokens
    router = any(p.requires_grad for p in moe.router.parameters())
    shared: tuple[Leaf, ...] = ()
    if moe.shared is not None:  # all of them on every token, side by side, and the FFN
        shared, rows, hidden = _leaves(moe.shared, tokens, "mlp.shared"), tokens, experts * hidden
    return (
        *shared,
        Leaf("mlp.router", "linear", tokens, width, experts, router),
        Leaf(f"{EXPERTS}.fc1", "linear", rows, width, hidden, trained),
        Leaf(f"{EXPERTS}.act", "activation", rows, hidden, hidden, False),
        Leaf(f"{EXPERTS}.fc2", "linear", rows, hidden, width, trained),
    )
