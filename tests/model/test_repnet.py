"""Rep-Net side blocks beside frozen blocks: no change at the start, and values and gradients by their formula."""

import pytest
import torch
from tiny_models import gradients, make_model, normal
from torch.nn import functional as F

from moe_bsr.config import TokensConfig
from moe_bsr.model.adapters.repnet import SideBlock
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES

FROZEN = {"train_blocks": ()}
IMAGES = normal(2, 3, 16, 16)


def beside(blocks=(1, 3), published: bool = False) -> list[dict]:
    return [{"kind": "repnet", "published": published, "blocks": list(blocks)}]


def moved(published: bool = False, **changes) -> MultitaskViT:
    """Return a model with side blocks whose weights have moved, beside a block that drops and beside the last block."""
    model = make_model(**{"adapter": beside(published=published)} | FROZEN | changes)
    for side in (module for module in model.modules() if isinstance(module, SideBlock)):
        for i, parameter in enumerate(side.parameters()):
            parameter.data.add_(0.2 * normal(*parameter.shape, seed=i))
    return model


@pytest.mark.parametrize("kind", ["class-token", "average-pool", "qk-norm"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_blocks": (1, 3)}, {"storage": "recompute"}, {"tokens": TokensConfig(reduce="merge")}],
    ids=["dense", "moe", "again", "merged"],
)
def test_at_the_start_the_network_is_the_pretrained_one(kind, changes):
    plain, adapted = make_model(kind, **changes), make_model(kind, adapter="repnet", **changes)
    assert torch.equal(adapted(IMAGES, "one").logits, plain(IMAGES, "one").logits)
    assert sum(isinstance(layer, SideBlock) for layer in adapted.modules()) == 4


def test_only_side_blocks_and_heads_train_and_the_path_starts_at_the_first():
    model = moved()
    assert model.path_start == 1
    model(IMAGES, "one").logits.square().sum().backward()
    trained = {f"vit.blocks.{i}.beside_block.{n}" for i in (1, 3) for n, _ in side_of(model, i).named_parameters()}
    assert gradients(model).keys() == trained | {"heads.one.weight", "heads.one.bias"} and len(trained) == 24
    assert not trained & model.unchanged_backbone_names()
    assert model.layers()[id(side_of(model, 1).mlp.fc1.weight)] == 2


def side_of(model: MultitaskViT, block: int) -> SideBlock:
    return model.vit.blocks[block].beside_block


def plain_logits(model: MultitaskViT, published: bool) -> torch.Tensor:
    """Compute the logits of task "one" image by image, with all tokens up to the end, by plain torch functions."""
    with torch.no_grad():
        stream, _ = model.forward_features(IMAGES, upto=0)
    rows = []
    for x in stream.x:
        for index, (block, plan) in enumerate(zip(model.vit.blocks, model.plan, strict=True)):
            entering = x
            y, scores = attention(block, x)
            x = x + y
            if plan.keep_rate < 1:
                x, entering = drop_half(x, scores), drop_half(entering, scores)
            x = x + ffn(block, x)
            if index in (1, 3):
                side = side_of(model, index)
                middle = entering + attention(side, entering)[0]
                x = x + middle + ffn(side, middle) - (0 if published else entering)
        rows.append(F.layer_norm(x[0], x.shape[1:], model.vit.norm.weight, model.vit.norm.bias, 1e-6))
    return model.heads["one"](torch.stack(rows))


def attention(block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map (N, D) to (N, D); also return the class token's attention to the other tokens, mean over heads."""
    layer, (n, width) = block.attn, x.shape
    normed = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = F.linear(normed, layer.qkv.weight, layer.qkv.bias).view(n, 3, layer.num_heads, -1).permute(1, 2, 0, 3)
    maps = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(2)
    joined = (maps @ v).transpose(0, 1).reshape(n, width)
    return F.linear(joined, layer.proj.weight, layer.proj.bias), maps[:, 0, 1:].mean(0)


def ffn(block, x: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    hidden = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias))
    return F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


def drop_half(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Keep half of the tokens and sum the others, weighted by their scores."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    kept = sorted(order[: -(-len(scores) // 2)])
    fused = sum(scores[i] * x[1 + i] for i in range(len(scores)) if i not in kept)
    return torch.stack([x[0], *(x[1 + i] for i in kept), fused])


@pytest.mark.parametrize("published", [False, True], ids=["identity once", "published"])
def test_logits_and_gradients_equal_a_plain_implementation(published, kernels):
    model = moved(published, tokens=TokensConfig(fuse="raw"))
    trained = [p for i in (1, 3) for p in side_of(model, i).parameters()] + [model.heads["one"].weight]
    found, expected = model(IMAGES, "one").logits, plain_logits(model, published)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = normal(*found.shape, seed=9)
    have, want = (torch.autograd.grad((y * weights).sum(), trained) for y in (found, expected))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_published_variant_doubles_the_tokens_and_so_changes_the_start():
    published = make_model(adapter=beside([0], published=True), drop_blocks=())
    side, plain = side_of(published, 0), make_model(drop_blocks=())
    assert side.attn.proj.weight.std() > 0.01 and side.mlp.fc2.weight.std() > 0.01
    for last in (side.attn.proj, side.mlp.fc2):
        last.weight.data.zero_()
    tokens, _ = plain.forward_features(IMAGES, upto=0)
    with torch.no_grad():
        found, expected = (model.run_block(0, tokens, "one").x for model in (published, plain))
    assert torch.equal(found, expected + tokens.x)


@pytest.mark.parametrize("reduce", ["drop", "merge"])
@pytest.mark.parametrize("storage", list(STORAGES))
def test_every_storage_leaves_the_forward_pass_unchanged(storage, reduce):
    logits, found = [], []
    for kind in ("exact", storage):
        model = moved(storage=kind, tokens=TokensConfig(reduce=reduce), train_blocks=(3,))
        logits.append(model(IMAGES, "one").logits)
        logits[-1].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for i in (1, 3) for p in side_of(model, i).parameters()]))
    assert torch.equal(*logits)
    exact = storage in ("exact", "segments", "recompute")
    assert torch.cosine_similarity(*found, dim=0) > (1 - 1e-6 if exact else 0.2 if STORAGES[storage].coarse else 0.98)
