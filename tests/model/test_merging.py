"""Token merging against loops over images and tokens (values and gradients), and in whole networks."""

import math

import pytest
import torch
from tiny_models import gradients, make_model, make_vit, normal, saved_for_backward
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.config import Config, ConfigError, PlanConfig, TokensConfig
from moe_bsr.model import merging
from moe_bsr.model.merging import log_sizes, merge, sizes
from moe_bsr.model.plan import make_plan, token_counts
from moe_bsr.model.replay import Replay
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.attention import attention
from moe_bsr.ops.first_attention import first_attention

BATCH, WIDTH, PATCHES = 3, 8, 23
MERGE = TokensConfig(reduce="merge")


def stream(candidates: int, prefix: int, merged_before: bool, seed: int = 0) -> tuple[Tokens, torch.Tensor]:
    """Return random tokens of one or several patches each, and keys. The keys of the first image have ties."""
    x, keys = normal(BATCH, prefix + candidates, WIDTH, seed=seed), normal(BATCH, prefix + candidates, 2, seed=seed + 1)
    keys[0] = F.one_hot(keys[0].abs().argmax(1), 2) * keys[0].sign()
    if not merged_before:
        return Tokens(x, torch.arange(candidates).expand(BATCH, -1)), keys
    place = torch.stack(
        [torch.randperm(PATCHES, generator=torch.Generator().manual_seed(seed + b)) % candidates for b in range(BATCH)]
    )
    firsts = [[row.index(token) for token in range(candidates)] for row in place.tolist()]
    return Tokens(x, torch.tensor(firsts), place=place), keys


def reference_merge(x, keys, patches, keep, prefix):
    """Merge one image by loops; return its tokens and the patches of each.

    Args:
        patches: for each token after the prefix, the list of patches it stands for.
    """

    def cosine(i, j):
        one, other = keys[prefix + i].tolist(), keys[prefix + j].tolist()
        lengths = [max(math.hypot(*each), 1e-12) for each in (one, other)]
        return sum((a / lengths[0]) * (b / lengths[1]) for a, b in zip(one, other, strict=True))

    count = len(patches)
    merged = count - max(1, math.ceil(keep * count - 1e-9))
    sources, targets = range(0, count, 2), range(1, count, 2)
    best = {i: max(targets, key=lambda j, i=i: (round(cosine(i, j), 5), -j)) for i in sources} if merged else {}
    order = sorted(best, key=lambda i: (-round(cosine(i, best[i]), 5), i))
    gone = set(order[:merged])
    tokens, made_of = [x[i] for i in range(prefix)], []
    groups = [[i] for i in sources if i not in gone] + [
        [j, *(i for i in sorted(gone) if best[i] == j)] for j in targets
    ]
    for group in groups if merged else [[i] for i in range(count)]:
        total = sum(len(patches[i]) for i in group)
        tokens.append(sum(x[prefix + i] * len(patches[i]) for i in group) / total)
        made_of.append(sorted(patch for i in group for patch in patches[i]))
    return torch.stack(tokens), made_of


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("candidates, keep", [(1, 0.5), (2, 0.5), (11, 0.5), (11, 0.8), (12, 0.5), (12, 0.9)])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_merging_equals_loops_in_value_and_gradient(prefix, candidates, keep, merged_before, reference):
    tokens, keys = stream(candidates, prefix, merged_before)
    leaf, slow_leaf = (tokens.x.clone().requires_grad_() for _ in range(2))
    place = torch.arange(candidates).expand(BATCH, -1) if tokens.place is None else tokens.place
    before = [[[p for p, at in enumerate(row) if at == t] for t in range(candidates)] for row in place.tolist()]
    slow = [reference_merge(slow_leaf[b], keys[b], before[b], keep, prefix) for b in range(BATCH)]
    tokens.x = leaf
    if reference:
        with ops.reference():
            after, record = merge(tokens, keys, keep, prefix, Replay())
    else:
        after, record = merge(tokens, keys, keep, prefix, Replay())

    expected = torch.stack([made for made, _ in slow])
    torch.testing.assert_close(after.x, expected, rtol=1e-5, atol=1e-6)
    for b, (_, made_of) in enumerate(slow):
        if after.place is not None:
            left = range(len(made_of))
            assert [[p for p, at in enumerate(after.place[b].tolist()) if at == t] for t in left] == made_of
        assert after.origin[b].tolist() == [patches[0] for patches in made_of]
        assert sizes(after)[b].tolist() == [len(patches) for patches in made_of]
    assert record.origin_in is tokens.origin and record.origin is after.origin and record.place is after.place
    weight = normal(*expected.shape, seed=5)
    (after.x * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, slow_leaf.grad, rtol=1e-5, atol=1e-6)


def test_among_equal_tokens_the_first_ones_merge_into_the_first_target():
    tokens, keys = stream(8, 1, False)
    after, _ = merge(tokens, torch.ones_like(keys), 0.7, 1, Replay())  # six of eight remain
    assert after.place.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]] * BATCH
    assert log_sizes(after)[0].exp().round().tolist() == [1, 1, 1, 3, 1, 1, 1]
    torch.testing.assert_close(after.x[:, 3], tokens.x[:, 1:4].mean(1))


def test_merging_saves_only_indices_and_weights_for_the_backward_pass():
    tokens, keys = stream(12, 1, False)
    tokens.x.requires_grad_()
    kept = saved_for_backward(lambda: merge(tokens, keys, 0.5, 1, Replay()))
    assert sorted((tuple(t.shape), t.dtype) for t in kept) == [
        ((BATCH, 12), torch.int64),
        ((BATCH, 12, 1), torch.float32),
    ]


def repeated(qkv, sizes):
    """Compute two-head attention by loops, with each key repeated as often as its size says."""
    found = []
    for image, counts in zip(qkv, sizes, strict=True):
        rows = image[[token for token, count in enumerate(counts) for _ in range(int(count))]]
        q, (_, k, v) = image.view(len(image), 3, 2, -1)[:, 0], rows.view(len(rows), 3, 2, -1).unbind(1)
        heads = [((q[:, h] @ k[:, h].T) / 2).softmax(1) @ v[:, h] for h in range(2)]
        found.append(torch.cat(heads, 1))
    return torch.stack(found)


@pytest.mark.parametrize("first", [False, True], ids=["all", "first alone"])
@pytest.mark.parametrize("dtype, fused", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_a_merged_token_gets_the_attention_of_all_its_patches(kernels, dtype, fused, first, monkeypatch):
    """Also where the forward pass consists of matrix products, as on CPUs without tile instructions for bf16."""
    monkeypatch.setattr("moe_bsr.ops.attention.is_fused", lambda dtype: fused)
    counts = torch.tensor([[1, 2, 5, 1, 3, 1, 1], [1, 1, 1, 1, 7, 1, 2]])
    qkv = normal(2, 7, 24).to(dtype)
    fast, slow = qkv.clone().requires_grad_(), qkv.float().requires_grad_()
    bias, expected = counts.float().log(), repeated(slow, counts)
    if first:
        y, expected = first_attention(fast[:, :1, :8], fast[:, :, 8:], 2, 0.5, bias), expected[:, :1]
    else:
        y, *_ = attention(fast, 2, 0.5, bias=bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    weight = normal(*expected.shape, seed=5)
    (y.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(fast.grad.float(), slow.grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_attention_with_sizes_keeps_no_attention_map():
    qkv, bias = normal(2, 40, 24).requires_grad_(), normal(2, 40)
    kept = saved_for_backward(lambda: attention(qkv, 2, 0.5, bias=bias))
    assert {tuple(t.shape) for t in kept} == {(2, 40, 24), (2, 40, 1), (2, 40, 8), (2, 2, 40, 1)}


def outcome(model, images):
    logits = model(images, "two").logits
    F.cross_entropy(logits, torch.tensor([1, 4, 0])).backward()
    return logits.detach(), gradients(model)


def assert_alike(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        bound = tolerance * float(expected[1][name].abs().max() + 0.1)
        torch.testing.assert_close(grad, expected[1][name], rtol=tolerance, atol=bound, msg=name)


@pytest.mark.parametrize("kind", ["class-token", "registers", "average-pool", "attention-pool", "qk-norm"])
def test_merging_equal_patches_changes_nothing(kernels, kind):
    """Groups of four neighboring patches are equal, and so are their position embeddings."""
    images = normal(3, 3, 16, 4).repeat_interleave(4, 3).unflatten(3, (4, 4)).transpose(3, 4).flatten(3)
    found = []
    for drop_blocks in ((0, 1), ()):
        vit = make_vit(kind)
        with torch.no_grad():
            patches = vit.pos_embed[:, -16:]
            patches.copy_(patches[:, ::4].repeat_interleave(4, 1))
        model = make_model(
            vit=vit, train_blocks="all", drop_blocks=drop_blocks, keep_rate=0.5, tokens=MERGE if drop_blocks else None
        )
        found.append(outcome(model, images))
    assert_alike(*found)


@pytest.fixture(scope="module")
def everywhere():
    """A function that runs a model with merging in all blocks but the last, and its result with exact storage."""

    def run(storage="exact", **options):
        options = {"train_blocks": "all", "drop_blocks": (0, 1, 2), "keep_rate": [0.9, 0.7, 0.5]} | options
        model = make_model(storage=storage, tokens=MERGE, moe_blocks=(1,), **options)
        return outcome(model, normal(3, 3, 16, 16))

    return run, run()


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "exact"])
def test_storages_give_bitwise_equal_logits_and_replay_the_merges(everywhere, storage, monkeypatch):
    run, exact = everywhere
    made = []
    match = merging.match
    monkeypatch.setattr(merging, "match", lambda *given: made.append(1) or match(*given))
    logits, grads = run(storage)
    assert torch.equal(logits, exact[0]) and len(made) == 3
    if storage in ("segments", "recompute"):
        assert_alike((logits, grads), exact, 1e-6)
    flat = [torch.cat([each.flatten() for each in found.values()]) for found in (grads, exact[1])]
    assert torch.cosine_similarity(*flat, dim=0) > (0.6 if STORAGES[storage].coarse else 0.99)


@pytest.mark.parametrize("keep", [1.0, 0.99])
def test_without_merged_tokens_the_result_is_bitwise_that_of_no_merging(everywhere, keep):
    run, _ = everywhere
    found, expected = run(keep_rate=keep), run(drop_blocks=(), keep_rate=1.0)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())


def test_frozen_blocks_merge_the_same_tokens(everywhere):
    run, exact = everywhere
    assert torch.equal(run(train_blocks=(1, 3), drop_blocks=(0, 1, 2))[0], exact[0])


@pytest.mark.parametrize("rates, counts", [([0.5] * 3, [99, 50, 26]), ([0.9, 0.8, 1.0], [178, 143, 143])])
def test_merging_leaves_as_many_tokens_as_dropping(rates, counts):
    plan = PlanConfig(train_blocks=[], moe_blocks=[], drop_blocks=[0, 1, 2], keep_rate=rates)
    rows = make_plan(Config(plan=plan, tokens=MERGE), 4)
    assert [m for _, m in token_counts(rows, 197, 1, MERGE.fuses, MERGE.protect_fused)] == [*counts, counts[-1]]
    tokens = Tokens(normal(2, 197, WIDTH), torch.arange(196).expand(2, -1))
    for rate, count in zip(rates, counts, strict=True):
        tokens, _ = merge(tokens, normal(2, tokens.x.shape[1], 4), rate, 1, Replay())
        assert tokens.x.shape[1] == count and sizes(tokens).sum() == 2 * 196


def test_invalid_settings_for_merging_are_refused():
    with pytest.raises(ConfigError, match="plan.keep_rate = 0.4: at least 0.5 with tokens.reduce = merge"):
        make_model(keep_rate=0.4, tokens=MERGE)
    for key, value in {"fuse": "none", "protect_fused": True, "rank_by": "logits"}.items():
        with pytest.raises(ConfigError, match=f"tokens.{key} = .*with tokens.reduce = merge"):
            TokensConfig(reduce="merge", **{key: value})
