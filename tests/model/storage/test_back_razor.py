"""Back Razor against a direct implementation of its rule: the values it keeps, and the gradients of a block."""

import pytest
import torch
from tiny_models import gradients, make_model, normal
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.config import ConfigError
from moe_bsr.model.storage.codecs import Pruned
from moe_bsr.ops.attention import join_heads, split_heads

HEADS = 2


def dense(x: Tensor, sparsity: float) -> Tensor:
    """Return x * mask as in the paper: per image, the magnitudes from the k-th smallest on, in float16."""
    k = min(max(int(sparsity * x[0].numel()), 1), x[0].numel())
    threshold = x.flatten(1).abs().kthvalue(k, 1).values
    return (x * (x.abs() >= threshold.view(-1, *[1] * (x.ndim - 1)))).half().to(x.dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(3, 7, 24), (1, 1, 16), (2, 3, 5, 9)])
def test_the_largest_magnitudes_of_each_image_are_kept(shape, sparsity):
    x = normal(*shape)
    assert torch.equal(Pruned(x, sparsity).restore(), dense(x, sparsity))
    assert Pruned(x.bfloat16(), sparsity).restore().dtype == torch.bfloat16


def test_a_matrix_without_image_dimension_is_pruned_as_a_whole():
    x = normal(20, 16)
    assert torch.equal(Pruned(x, 0.9).restore(), dense(x[None], 0.9)[0])


def test_queries_keys_and_values_are_pruned_separately():
    qkv = normal(3, 7, 24) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(8)
    apart = torch.cat([dense(part, 0.8) for part in qkv.chunk(3, -1)], -1)
    assert torch.equal(Pruned(qkv, 0.8, parts=3).restore(), apart)


def test_ties_take_no_more_memory_than_distinct_values():
    ties, others = Pruned(torch.ones(2, 5, 16), 0.9), Pruned(normal(2, 5, 16), 0.9)
    assert ties.values.shape == others.values.shape == (2, 80 + 1 - 72)
    assert (ties.restore() != 0).sum() == ties.values.numel()


class PrunedNorm(torch.autograd.Function):
    """Backward pass of the norm with a pruned input and exact statistics, from the formula."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, sparsity):
        mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward((dense(x, sparsity) - mean) * rstd, rstd, weight)
        return (x - mean) * rstd * weight + bias

    @staticmethod
    def backward(ctx, grad):
        normalized, rstd, weight = ctx.saved_tensors
        g = grad * weight
        back = rstd * (g - g.mean(-1, keepdim=True) - normalized * (g * normalized).mean(-1, keepdim=True))
        return back, (grad * normalized).sum((0, 1)), grad.sum((0, 1)), None, None


def at(function, x: Tensor, changed: Tensor) -> Tensor:
    """Return function(x), with the gradient taken at `changed`."""
    changed = x + (changed - x).detach()
    y = function(changed)
    return y + (function(x) - y).detach()


def back_razor_block(block, x: Tensor, sparsity: float) -> Tensor:
    """Compute a block's forward pass, each operation with the gradient that Back Razor gives it."""

    def norm(layer, x):
        return PrunedNorm.apply(x, layer.weight, layer.bias, layer.eps, sparsity)

    def linear(layer, x):
        return at(lambda x: F.linear(x, layer.weight, layer.bias), x, dense(x, sparsity))

    def attention(qkv):
        q, k, v = split_heads(qkv, HEADS)
        return join_heads((q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1) @ v)

    qkv = linear(block.attn.qkv, norm(block.norm1, x))
    y = at(attention, qkv, torch.cat([dense(part, sparsity) for part in qkv.chunk(3, -1)], -1))
    x = x + linear(block.attn.proj, y)
    hidden = linear(block.mlp.fc1, norm(block.norm2, x))
    return x + at(
        lambda h: F.linear(F.gelu(h), block.mlp.fc2.weight, block.mlp.fc2.bias), hidden, hidden.half().float()
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_gradients_of_a_network_follow_the_rule(sparsity):
    images, labels = normal(6, 3, 16, 16), torch.arange(6) % 3
    storage = {"kind": "back_razor", "sparsity": sparsity}
    kind = "class-token-average-pool"  # so that the last block computes and prunes all tokens
    model = make_model(kind, storage=storage, train_blocks=(1, 3), drop_blocks=())
    output = model(images, "one")
    F.cross_entropy(output.logits, labels).backward()
    found = gradients(model)

    twin = make_model(kind, train_blocks=(1, 3), drop_blocks=())
    tokens, _ = twin.forward_features(images, "one")
    assert torch.equal(output.logits, twin(images, "one").logits)
    x = tokens.x
    for layer in twin.vit.blocks[twin.path_start :]:
        x = back_razor_block(layer, x, sparsity)
    tokens.x = x
    F.cross_entropy(twin.logits(tokens, "one"), labels).backward()
    expected = gradients(twin)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_a_sparsity_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match="storage.sparsity = 1.0: at least 0, below 1"):
        make_model(storage={"kind": "back_razor", "sparsity": 1.0})


def test_low_rank_experts_keep_the_input_of_their_activation_in_16_bits():
    plan = {"train_blocks": (3,), "moe_blocks": (3,), "drop_blocks": (), "experts": "low_rank", "rank": 4}
    found = []
    for storage in ("exact", {"kind": "back_razor", "sparsity": 0.0}):
        model = make_model(storage=storage, **plan)
        F.cross_entropy(model(normal(6, 3, 16, 16), "one").logits, torch.arange(6) % 3).backward()
        found.append(gradients(model)["vit.blocks.3.mlp.experts.fc2_weight"])
    exact, rounded = found
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))
