"""Storage by kind of tensor: recomputed values against plain autograd, and kept bytes against closed forms."""

import pytest
import torch
from tiny_models import gradients, make_model, normal, plain_autograd, saved_for_backward
from tiny_storages import MODELS, forward, kept_by, kept_by_block, predicted_and_step
from torch import nn

from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage.by_kind import Table, run_by_kind
from moe_bsr.model.storage.codecs import Int8Packed
from moe_bsr.ops import keep
from moe_bsr.ops.linear import activated_linear, linear
from moe_bsr.ops.norm import layer_norm
from moe_bsr.ops.softmax import narrow_softmax

IMAGES, SIDE, WIDTH, HEADS, TOKENS = 5, 16, 16, 2, 17
T = IMAGES * TOKENS * WIDTH  # values of one activation of shape (images, tokens, width)
STATISTICS = 4 * 4 * IMAGES * TOKENS  # bytes of the two norms' means and deviations
SUMS = 4 * HEADS * IMAGES * TOKENS  # bytes of the attention's log-sum-exps
SCALES = 2 * IMAGES * WIDTH  # bytes of the scales of one int8 activation


def outcome(model, bf16: bool = False) -> dict[str, torch.Tensor]:
    loss, logits = forward(model, 6, bf16)
    loss.backward()
    return gradients(model) | {"logits": logits.detach()}


def hooked(model) -> MultitaskViT:
    """Add a forward hook to a known layer, and put a module of an unknown type in place of another layer."""
    model.vit.blocks[1].attn.qkv.register_forward_hook(lambda layer, inputs, y: 1.5 * y)
    model.vit.blocks[3].mlp.fc1 = nn.Sequential(model.vit.blocks[3].mlp.fc1, nn.Linear(4 * WIDTH, 4 * WIDTH))
    with torch.no_grad():
        for i, parameter in enumerate(model.vit.blocks[3].mlp.fc1[1].parameters()):
            parameter.copy_(0.1 * normal(*parameter.shape, seed=i))
    return model


MODELS = MODELS | {"layer-scale": {"kind": "layer-scale"}, "hooks": {"change": hooked}}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_values_give_bitwise_equal_results(name, bf16):
    options = dict(MODELS[name])
    change = options.pop("change", lambda model: model)
    with plain_autograd():
        expected = outcome(change(make_model(**options)), bf16)
    for storage in ("exact", "segments"):
        found = outcome(change(make_model(storage=storage, **options)), bf16)
        assert found.keys() == expected.keys()
        assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == [], storage


def pruned(groups: int, values: int, sparsity: float) -> int:
    """Return the bytes of pruned groups: 16 bits for each value kept, and one mask bit for every value."""
    return groups * (2 * (values + 1 - max(1, int(sparsity * values))) + -(-values // 8))


IMAGE = TOKENS * WIDTH  # values of an activation of one image
SPARSE = 7 * pruned(IMAGES, IMAGE, 0.9) + pruned(IMAGES, IMAGE, 0.9)
BY_FORMULA = {
    "exact": 10 * 4 * T + STATISTICS + SUMS,
    "segments": 3 * 4 * T + STATISTICS + SUMS,
    "segments_int8": 3 * (T + SCALES) + STATISTICS,
    "back_razor": SPARSE + 2 * 4 * T + STATISTICS,
}


@pytest.mark.parametrize("storage", BY_FORMULA)
def test_bytes_kept_by_a_trained_block_match_the_formula(storage):
    """Exact keeps two norm inputs, queries, keys, values, the attention's result, and hidden values of four widths."""
    cost, step = predicted_and_step(storage, IMAGES)
    by_block = kept_by_block(cost)
    assert by_block["block 1"] == by_block["block 2"] == BY_FORMULA[storage]
    assert cost.kept == pytest.approx(kept_by(step), abs=64)


def test_a_frozen_block_on_the_gradient_path_keeps_as_much_as_a_trained_one():
    cost, step = predicted_and_step("exact", IMAGES, train_blocks=[0])
    assert kept_by_block(cost)["block 1"] == BY_FORMULA["exact"]
    assert cost.kept == pytest.approx(kept_by(step), abs=64)


def test_operations_name_every_wide_tensor_they_keep():
    """Every saved tensor of a block that is at least as wide as a token is kept under one of the names."""
    named = []

    class Recorder:
        reruns_products = False
        derive = is_coarse = lambda *_: None

        def keep(self, kind, x):
            named.append((kind, x.data_ptr()))

        def keep_alike(self, kind, parts):
            named.extend((kind, part.data_ptr()) for part in parts)

    model = make_model(train_blocks="all", drop_blocks=(), moe_blocks=(1,))
    with plain_autograd(), keep.keeping(Recorder()):
        saved = saved_for_backward(lambda: model.run_block(1, model.run_block(0, *_tokens(model)), "one"))
        last = make_model(train_blocks="all", drop_blocks=(), moe_blocks=())
        saved += saved_for_backward(lambda: last.run_block(len(last.plan) - 1, *_tokens(last)))
    weights = {p.data_ptr() for each in (model, last) for p in each.parameters()}
    activations = [t for t in saved if t.is_floating_point() and not isinstance(t._base, torch.nn.Parameter)]
    wide = {t.data_ptr() for t in activations if t.shape[-1] >= WIDTH}
    assert wide - weights == {pointer for _, pointer in named}
    assert {kind for kind, _ in named} == set(keep.KINDS)


def _tokens(model):
    with torch.no_grad():
        model.path_start = 0
        tokens, _ = model.forward_features(normal(IMAGES, 3, SIDE, SIDE), "one")
    tokens.x.requires_grad_()
    return tokens, "one"


class Halved:
    """Codec with an obvious error: it restores half of each value."""

    def __init__(self, x):
        self.kept = 0.5 * x

    def restore(self):
        return self.kept


@pytest.mark.parametrize("kind", [keep.NORM_INPUTS, keep.LINEAR_INPUTS, keep.ACTIVATION_INPUTS])
def test_a_codec_is_used_only_for_its_kind(kind):
    """Compute all gradients of norm -> linear -> activation and linear, with one kind halved in the backward pass."""
    x, gamma = normal(3, 4, WIDTH).requires_grad_(), nn.Parameter(1 + normal(WIDTH, seed=1))
    first, second = (nn.Parameter(normal(WIDTH, WIDTH, seed=seed)) for seed in (2, 3))

    def forward(x):
        y = linear(layer_norm(x, gamma, None, 1e-6), first, None)
        return activated_linear(nn.GELU(), y, second, None).square().sum()

    def found(table):
        return torch.autograd.grad(run_by_kind(table, forward, x, []), (x, gamma, first, second))

    exact = found(Table(reruns=False))
    halved = found(Table({kind: Halved}, reruns=False))
    changed = [not torch.equal(a, b) for a, b in zip(exact, halved, strict=True)]
    assert (
        changed
        == {
            keep.NORM_INPUTS: [True, True, False, False],
            keep.LINEAR_INPUTS: [False, False, True, False],
            keep.ACTIVATION_INPUTS: [True, True, True, True],
        }[kind]
    )
    if kind == keep.LINEAR_INPUTS:
        torch.testing.assert_close(halved[2], 0.5 * exact[2])


def test_an_output_changed_in_place_is_kept_with_its_new_values():
    x, weight = normal(3, 4, WIDTH).requires_grad_(), nn.Parameter(normal(WIDTH, WIDTH, seed=1))

    def forward(x):
        y = layer_norm(x, None, None, 1e-6)
        with torch.no_grad():
            y.mul_(2)
        return linear(y, weight, None).square().sum()

    expected = torch.autograd.grad(forward(x), weight)
    assert torch.equal(torch.autograd.grad(run_by_kind(Table(), forward, x, []), weight)[0], expected[0])


def test_the_probabilities_of_a_router_are_not_compressed():
    weights, found = normal(40, 32, seed=1), {}
    for softmax in (narrow_softmax, lambda x: x.softmax(-1)):
        x = (3 * normal(40, 32)).requires_grad_()
        (softmax(x) * weights).sum().backward()
        exact, x.grad = x.grad, None
        y = run_by_kind(Table(other=Int8Packed), softmax, x, [])
        (y * weights).sum().backward()
        found[softmax] = torch.equal(x.grad, exact)
    assert list(found.values()) == [True, False]
