"""The side network: the frozen network's logits at the start, no gradient in the backbone, and its formula."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from tiny_models import gradients, make_model, normal
from torch import nn

from moe_bsr.config import ConfigError, TokensConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES

LADDER = {"kind": "ladder", "reduction": 4}
FROZEN = {"train_blocks": (), "drop_blocks": (0, 1, 2)}
TOKENS = [
    TokensConfig(),
    TokensConfig(fuse="normalized", protect_fused=True),
    TokensConfig(fuse="raw", protect_fused=True),
    TokensConfig(fuse="none"),
]


def moved(adapter=LADDER, **changes) -> MultitaskViT:
    """Return a model with a ladder whose weights have moved from their initial values."""
    model = make_model(adapter=adapter, **FROZEN | changes)
    for i, parameter in enumerate(model.ladder.parameters()):
        parameter.data.add_(0.3 * normal(*parameter.shape, seed=i))
    return model


@pytest.mark.parametrize("kind", ["class-token", "registers", "average-pool", "attention-pool", "no-bias", "qk-norm"])
def test_logits_start_at_the_frozen_network_and_only_ladder_and_heads_train(kind):
    """Equal up to rounding: if heads read only the class token, the ladder makes the last block compute more tokens."""
    images = normal(2, 3, 16, 16)
    model, plain = (make_model(kind, adapter=adapter, **FROZEN) for adapter in (LADDER, None))
    logits = model(images, "one").logits
    torch.testing.assert_close(logits, plain(images, "one").logits, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    assert {name.split(".")[0] for name in gradients(model)} == {"ladder", "heads"}
    assert model.path_start == len(model.plan)
    assert not any(name.startswith("ladder.") for name in model.unchanged_backbone_names())


def test_gradients_are_the_same_with_a_graph_through_the_backbone():
    images, found = normal(2, 3, 16, 16), []
    for start in (4, 0):  # at 0, every block runs as on a gradient path
        model = moved()
        model.path_start = start
        model(images, "one").logits.square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and any("side.0.block" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def plain_logits(model: MultitaskViT, images: torch.Tensor, tokens: TokensConfig, kinds_of_drop: list) -> torch.Tensor:
    """Compute the logits of task "one" image by image and token by token, with timm's own blocks."""
    ladder, vit = model.ladder, model.vit
    with torch.no_grad():
        stream, _ = model.forward_features(images, upto=0)
        states, records = [stream.x], {}
        for index in range(len(model.plan)):
            stream = model.run_block(index, stream, "one", None, records)
            states.append(stream.x)
    sides = {i: plain(side.block) for i, side in ladder.side.items()}
    rows = []
    for b in range(len(images)):
        pool = [state[b].reshape(state.shape[1], -1, ladder.reduction).mean(2) for state in states[:-1]]
        s, fused = pool[0], False
        for index in range(len(model.plan)):
            if index in records and model.plan[index].keep_rate < 1:
                dropped = records[index].dropped
                s, fused = follow(s, dropped.scores[b], tokens, fused), tokens.fuses
                kinds_of_drop.append(s.shape[0])
            h = pool[index + 1] if index + 1 < len(pool) else whole_last(model, states[-2][b : b + 1], ladder)
            side = ladder.side[str(index)]
            mu = torch.sigmoid(side.gate / 0.1)
            s = sides[str(index)]((mu * s + (1 - mu) * h).unsqueeze(0)).squeeze(0)
        end = ladder.up(torch.nn.functional.layer_norm(s[:1], s.shape[-1:], ladder.norm.weight, ladder.norm.bias, 1e-6))
        rows.append(vit.norm(states[-1][b, :1] + end).squeeze(0))
    return model.heads["one"](torch.stack(rows))


def plain(block) -> Block:
    """Return the same block as a timm layer that shares the parameters."""
    width = block.norm1.weight.shape[0]
    made = Block(width, block.attn.num_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    return lambda x: torch.func.functional_call(made, dict(block.named_parameters()), (x,))


def whole_last(model: MultitaskViT, x: torch.Tensor, ladder) -> torch.Tensor:
    """Return the pooled output of the last block for all tokens; the model returns only the class token."""
    with torch.no_grad():
        y = plain(model.vit.blocks[-1])(x)[0]
    return y.reshape(y.shape[0], -1, ladder.reduction).mean(2)


def follow(s: torch.Tensor, scores: torch.Tensor, tokens: TokensConfig, fused: bool) -> torch.Tensor:
    protected = tokens.protect_fused and fused
    candidates = len(scores) - protected
    order = sorted(range(candidates), key=lambda i: (-float(scores[i]), i))
    kept = sorted(order[: -(-candidates // 2)])
    rows, left = [s[0], *(s[1 + i] for i in kept)], [i for i in range(candidates) if i not in kept]
    if tokens.fuses:
        total = sum(scores[i] for i in left) if tokens.fuse == "normalized" else 1.0
        one = sum(scores[i] / total * s[1 + i] for i in left)
        rows.append(one + s[1 + candidates] if protected else one)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_logits_and_gradients_equal_a_plain_implementation(tokens, kernels):
    images, lengths = normal(2, 3, 16, 16), []
    model = moved(tokens=tokens)
    trained = [*model.ladder.parameters(), model.heads["one"].weight]
    found = model(images, "one").logits
    expected = plain_logits(model, images, tokens, lengths)
    assert len(lengths) == 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = normal(*found.shape, seed=9)
    have, want = (torch.autograd.grad((y * weights).sum(), trained) for y in (found, expected))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("storage", list(STORAGES))
def test_every_storage_leaves_the_forward_pass_unchanged(storage):
    images, logits, found = normal(2, 3, 16, 16), [], []
    for kind in ("exact", storage):
        model = moved(storage=kind, adapter={"kind": "ladder", "reduction": 2})
        logits.append(model(images, "one").logits)
        logits[-1].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.ladder.parameters()]))
    assert torch.equal(*logits)
    exact = storage in ("exact", "segments", "recompute")
    assert torch.cosine_similarity(*found, dim=0) > (1 - 1e-6 if exact else 0.2 if STORAGES[storage].coarse else 0.99)


def test_only_some_blocks_may_have_a_side_block():
    model = moved([LADDER | {"blocks": [1, 3]}])
    images = normal(2, 3, 16, 16)
    tokens, _ = model.forward_features(images)
    assert [rung.read is not None for rung in tokens.rungs] == [True, True, False, True]
    assert [rung.kept is not None for rung in tokens.rungs] == [False, True, True, False]
    assert tokens.x.shape[1] == 1 and tokens.rungs[0].read.shape[2] == 4
    model(images, "one").logits.sum().backward()
    assert {name.split(".")[2] for name in gradients(model) if ".side." in name} == {"1", "3"}


@pytest.mark.parametrize("kind", ["class-token", "registers", "average-pool"])
def test_drops_after_the_last_side_block_do_not_change_the_start(kind):
    """If heads read only the class token, the side network ends there. Otherwise it follows the drops to the end."""
    images = normal(2, 3, 16, 16)
    model = make_model(kind, adapter=[LADDER | {"blocks": [0, 1]}], **FROZEN)
    plain = make_model(kind, **FROZEN)
    torch.testing.assert_close(model(images, "one").logits, plain(images, "one").logits, rtol=1e-4, atol=1e-4)
    tokens, _ = model.forward_features(images)
    followed = [rung.kept is not None for rung in tokens.rungs]
    assert followed == [False, True, True, kind == "average-pool", False]
    model.ladder.up.weight.data.normal_()
    model(images, "one").logits.square().sum().backward()
    assert any(".side.1." in name for name in gradients(model))


def test_initial_weights_depend_only_on_the_block():
    values = [make_model(adapter=LADDER, **FROZEN).ladder.side["2"].block.mlp.fc1.weight for _ in range(2)]
    assert torch.equal(*values)
    assert not torch.equal(values[0], make_model(adapter=LADDER, **FROZEN).ladder.side["1"].block.mlp.fc1.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_blocks": (3,)}, "plan.train_blocks = [3]: must be [] (and plan.moe_blocks too) with adapter: ladder"),
        ({"train_blocks": "all"}, "plan.train_blocks = 'all': must be []"),
        ({"adapter": {"kind": "ladder", "reduction": 3}}, "adapter.reduction = 3: a divisor of the width"),
        ({"adapter": {"kind": "ladder", "reduction": 1}}, "adapter.reduction = 1: 2 to 64"),
        (
            {"adapter": [LADDER | {"blocks": [0]}, {"kind": "lora", "blocks": [1]}]},
            "ladder with one reduction, and no other adapter in any block",
        ),
        ({"adapter": [LADDER | {"blocks": [0]}, {"kind": "ladder", "blocks": [1]}]}, "ladder with one reduction"),
    ],
)
def test_an_invalid_ladder_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        make_model(**{"adapter": LADDER} | FROZEN | changes)
    assert message in str(error.value)
