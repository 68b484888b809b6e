"""Token dropping against loops over a dense softmax: values and gradients."""

import itertools
import math

import pytest
import torch
from tiny_models import normal, saved_for_backward

from moe_bsr.config import TokensConfig
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import FUSED, Tokens, count_kept, drop
from moe_bsr.ops.attention import attention, join_heads
from moe_bsr.ops.tokens import received_attention, select, select_reference, take

BATCH, HEADS, HEAD_WIDTH = 3, 2, 4
WIDTH = HEADS * HEAD_WIDTH
SCALE = HEAD_WIDTH**-0.5


def inputs(tokens: int, prefix: int, seed: int = 0, fused: bool = False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, tokens, WIDTH, generator=generator)
    q = 2 * torch.randn(BATCH, HEADS, tokens, HEAD_WIDTH, generator=generator)
    k = 2 * torch.randn(BATCH, HEADS, tokens, HEAD_WIDTH, generator=generator)
    origin = torch.arange(10, 10 + tokens - prefix).repeat(BATCH, 1)
    if fused:
        origin[:, -1] = FUSED
    return x, q, k, origin


def reference_drop(x, q, k, origin, fused, keep, prefix, has_class_token, config):
    """Compute the whole drop by loops; return the shorter sequence, its origins and the scores."""
    logits = (q * SCALE) @ k.transpose(-2, -1)
    attention = logits.softmax(-1)
    rows = [0] if has_class_token else range(x.shape[1])
    scores = torch.stack([attention[:, :, r].mean(1) for r in rows]).mean(0)[:, prefix:]
    ranks = torch.stack([logits[:, :, r].mean(1) for r in rows]).mean(0)[:, prefix:]
    ranking = scores if config.rank_by == "probabilities" else ranks
    if config.detach_fusion_weights:
        scores = scores.detach()
    protected = config.protect_fused and fused
    candidates = scores.shape[1] - int(protected)
    count = max(1, math.ceil(keep * candidates - 1e-9))
    if count == candidates:
        return x, origin, scores
    streams, origins = [], []
    for b in range(len(x)):
        order = sorted(range(candidates), key=lambda i, b=b: (-ranking[b, i].item(), i))
        kept, dropped = sorted(order[:count]), sorted(order[count:])
        stream = [x[b, i] for i in range(prefix)] + [x[b, prefix + i] for i in kept]
        trace = [origin[b, i].item() for i in kept]
        if config.fuse != "none":
            total = sum(scores[b, i] for i in dropped) if config.fuse == "normalized" else 1.0
            token = sum(scores[b, i] / total * x[b, prefix + i] for i in dropped)
            stream.append(token + x[b, -1] if protected else token)
            trace.append(FUSED)
        streams.append(torch.stack(stream))
        origins.append(trace)
    return torch.stack(streams), torch.tensor(origins), scores


def scores(q, k, has_class_token, attached=True, scale=SCALE):
    if not has_class_token:
        return received_attention(q, k, scale)
    qkv = torch.cat([join_heads(t) for t in (q, k, k)], -1)
    return attention(qkv, q.shape[1], scale, True, attached)[1:]


def dropped_stream(x, q, k, origin, fused, keep, prefix, has_class_token, config, replay=None):
    attached = config.fuse != "none" and not config.detach_fusion_weights
    return drop(
        Tokens(x, origin, fused),
        *scores(q, k, has_class_token, attached),
        keep_rate=keep,
        prefix=prefix,
        config=config,
        replay=replay or Replay(),
    )


OPTIONS = [
    TokensConfig(fuse=fuse, detach_fusion_weights=detach, protect_fused=protect, rank_by=rank)
    for fuse, detach, protect, rank in itertools.product(
        ("raw", "normalized", "none"), (False, True), (False, True), ("probabilities", "logits")
    )
    if fuse != "none" or not (detach or protect)
]


@pytest.mark.parametrize("fused", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("prefix, has_class_token", [(1, True), (4, True), (0, False), (2, False)])
@pytest.mark.parametrize(
    "config", OPTIONS, ids=lambda c: f"{c.fuse}-{c.detach_fusion_weights}-{c.protect_fused}-{c.rank_by}"
)
def test_drop_equals_plain_loops_in_value_and_gradient(config, prefix, has_class_token, fused):
    x, q, k, origin = inputs(prefix + 11, prefix, fused=fused)
    keep = 0.4
    leaves = [t.clone().requires_grad_() for t in (x, q, k)]
    tokens, record = dropped_stream(*leaves, origin, fused, keep, prefix, has_class_token, config)
    slow_leaves = [t.clone().requires_grad_() for t in (x, q, k)]
    slow, slow_origin, slow_scores = reference_drop(*slow_leaves, origin, fused, keep, prefix, has_class_token, config)

    assert torch.equal(tokens.origin, slow_origin)
    assert torch.equal(record.origin_in, origin) and torch.equal(record.origin, slow_origin)
    torch.testing.assert_close(tokens.x, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(record.scores, slow_scores.detach(), rtol=1e-5, atol=1e-7)
    assert tokens.fused == (config.fuse != "none") and not record.scores.requires_grad

    weight = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1))
    (tokens.x * weight).sum().backward()
    (slow * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, slow_leaves[0].grad, rtol=1e-5, atol=1e-6)
    for fast, exact in zip(leaves[1:], slow_leaves[1:], strict=True):
        if config.fuse == "none" or config.detach_fusion_weights:
            assert fast.grad is None, "the scores must not enter the graph"
        else:
            assert exact.grad.abs().sum() > 0
            torch.testing.assert_close(fast.grad, exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 13, 39])
def test_the_reference_selects_the_same_without_sorting(kept):
    """Half of the scores are ties."""
    scores = (normal(5, 40) * 4).round()
    for fast, reference in zip(select(scores, kept), select_reference(scores, kept), strict=True):
        assert torch.equal(fast, reference)


def test_ties_go_to_the_lower_index_and_order_is_kept():
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    kept, dropped = select(scores, 3)
    assert kept.tolist() == [[0, 1, 4], [0, 1, 2]]
    assert dropped.tolist() == [[2, 3], [3, 4]]


@pytest.mark.parametrize("size", [17, 196, 1025])
def test_ties_go_to_the_lower_index_at_any_size(size):
    scores = torch.randint(0, 3, (4, size), generator=torch.Generator().manual_seed(0)).float()
    kept, dropped = select(scores, size // 2)
    for b in range(4):
        order = sorted(range(size), key=lambda i, b=b: (-scores[b, i].item(), i))
        assert kept[b].tolist() == sorted(order[: size // 2])
        assert dropped[b].tolist() == sorted(order[size // 2 :])


def test_a_constant_image_keeps_its_first_tokens():
    x, q, k, origin = inputs(9, 1)
    tokens, _ = dropped_stream(x, torch.zeros_like(q), k, origin, False, 0.5, 1, True, TokensConfig())
    assert tokens.origin.tolist() == [[10, 11, 12, 13, FUSED]] * BATCH


def test_ranking_by_logits_still_fuses_by_probabilities():
    # Patch 2 has most of head 1's attention but a very low logit in head 0. Patch 1 is in between.
    logits = torch.tensor([[0.0, 10.0, 6.0, -20.0, 0.0], [0.0, 10.0, 6.0, 12.0, 0.0]])
    q = torch.zeros(1, 2, 5, 1)
    q[:, :, 0] = 1.0
    k = logits.view(1, 2, 5, 1)
    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    origin = torch.arange(4).view(1, 4)
    weights = logits.softmax(-1).mean(0)[1:]
    kept = {}
    for rank in ("probabilities", "logits"):
        tokens, _ = drop(
            Tokens(x, origin),
            *scores(q, k, True, scale=1.0),
            keep_rate=0.5,
            prefix=1,
            config=TokensConfig(rank_by=rank),
            replay=Replay(),
        )
        kept[rank] = tokens.origin[0, :-1].tolist()
        lost = [i for i in range(4) if i not in kept[rank]]
        expected = sum(weights[i] * x[0, 1 + i] for i in lost)
        torch.testing.assert_close(tokens.x[0, -1], expected)
    assert kept == {"probabilities": [0, 2], "logits": [0, 1]}


@pytest.mark.parametrize(
    "candidates, keep, kept",
    [
        (196, 0.5, 98),
        (99, 0.5, 50),
        (51, 0.5, 26),
        (10, 0.7, 7),
        (30, 0.1, 3),
        (100, 0.29, 29),
        (100, 0.55, 55),
        (100, 0.07, 7),
        (3, 0.01, 1),
        (1, 0.5, 1),
        (7, 1.0, 7),
        (196, 0.7, 138),
        (196, 0.999, 196),
        (1024, 1 / 3, 342),
    ],
)
def test_count_kept(candidates, keep, kept):
    assert count_kept(candidates, keep) == kept


@pytest.mark.parametrize(
    "config, counts",
    [
        (TokensConfig(), [100, 52, 28]),
        (TokensConfig(fuse="none"), [99, 50, 26]),
        (TokensConfig(protect_fused=True), [100, 51, 27]),
    ],
    ids=["fuse", "none", "protect"],
)
def test_three_drops_of_197_tokens(config, counts):
    tokens = Tokens(torch.randn(2, 197, WIDTH), torch.arange(196).expand(2, -1))
    seen = []
    for step in range(3):
        q, k = torch.randn(2, 2, HEADS, tokens.x.shape[1], HEAD_WIDTH, generator=torch.Generator().manual_seed(step))
        tokens, _ = drop(tokens, *scores(q, k, True), keep_rate=0.5, prefix=1, config=config, replay=Replay())
        seen.append(tokens.x.shape[1])
        patches = [i for i in tokens.origin[0].tolist() if i != FUSED]
        assert patches == sorted(set(patches)), "kept patches in their order, each once"
        assert tokens.origin.shape == (2, tokens.x.shape[1] - 1)
    assert seen == counts


@pytest.mark.parametrize("candidates, keep", [(1, 0.5), (3, 0.7), (5, 1.0)])
def test_when_all_tokens_are_kept_nothing_is_copied(candidates, keep):
    x, q, k, origin = inputs(1 + candidates, 1)
    before = Tokens(x, origin, True)
    after, record = drop(before, *scores(q, k, True), keep_rate=keep, prefix=1, config=TokensConfig(), replay=Replay())
    assert after is before and torch.equal(record.origin, origin)
    assert record.scores.shape == origin.shape


def test_a_protected_token_is_kept_even_with_the_lowest_score():
    x, q, k, origin = inputs(10, 1, fused=True)
    k[:, :, -1] = -100 * q[:, :, 0]  # the class token pays no attention to the fused token
    config = TokensConfig(protect_fused=True)
    tokens, _ = dropped_stream(x, q, k, origin, True, 0.5, 1, True, config)
    _, record = dropped_stream(x, q, k, origin, False, 0.5, 1, True, TokensConfig(fuse="none"))
    assert (tokens.origin[:, -1] == FUSED).all() and (tokens.origin[:, :-1] != FUSED).all()
    assert (record.origin != FUSED).all(), "as an ordinary candidate it is dropped"
    assert tokens.x.shape[1] == 1 + 4 + 1


def test_register_tokens_are_neither_dropped_nor_scored():
    x, q, k, origin = inputs(5 + 8, 5)
    k[:, :, 1:5] = -100 * q[:, :, :1]
    tokens, record = dropped_stream(x, q, k, origin, False, 0.25, 5, True, TokensConfig())
    assert torch.equal(tokens.x[:, :5], x[:, :5]) and record.scores.shape == (BATCH, 8)
    assert tokens.x.shape[1] == 5 + 2 + 1


@pytest.mark.parametrize("chunk", [1, 3, 12, 64])
def test_without_a_class_token_a_score_is_the_mean_attention_received(chunk):
    x, q, k, _ = inputs(12, 2)
    logits = SCALE * torch.einsum("bhnd,bhmd->bhnm", q, k)
    probabilities, raw = received_attention(q, k, SCALE, chunk=chunk)
    torch.testing.assert_close(probabilities, logits.softmax(-1).mean((1, 2)))
    torch.testing.assert_close(raw, logits.mean((1, 2)))


def test_received_attention_has_the_right_gradient_and_keeps_no_attention_map():
    _, q, k, _ = inputs(12, 2)
    weights = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(3))
    grads, kept = [], []
    for chunked in (True, False):
        q, k = (t.detach().requires_grad_() for t in (q, k))
        if chunked:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
                received, _ = received_attention(q, k, SCALE, chunk=5)
        else:
            received = (SCALE * q @ k.transpose(-2, -1)).softmax(-1).mean((1, 2))
        (received * weights).sum().backward()
        grads.append((q.grad, k.grad))
    torch.testing.assert_close(*grads)
    assert set(kept) == {q.shape}


def test_scores_are_float32_under_autocast_and_tokens_keep_their_dtype():
    x, q, k, origin = inputs(10, 1)
    expected = scores(q.bfloat16().float(), k.bfloat16().float(), True)
    with torch.autocast("cpu", torch.bfloat16):
        given = scores(q.bfloat16(), k.bfloat16(), True)
        tokens, _ = dropped_stream(x, q, k, origin, False, 0.5, 1, True, TokensConfig())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(given, expected, strict=True))
    assert tokens.x.dtype == x.dtype


def test_replay_keeps_the_same_tokens_for_another_input():
    x, q, k, origin = inputs(12, 1)
    other_x, other_q, other_k, _ = inputs(12, 1, seed=9)
    replay = Replay()
    first, _ = dropped_stream(x, q, k, origin, False, 0.5, 1, True, TokensConfig(), replay)
    again, record = dropped_stream(other_x, other_q, other_k, origin, False, 0.5, 1, True, TokensConfig(), replay)
    fresh, _ = dropped_stream(other_x, other_q, other_k, origin, False, 0.5, 1, True, TokensConfig())
    assert torch.equal(again.origin, first.origin) and not torch.equal(again.origin, fresh.origin)
    positions = first.origin[:, :-1] - 10
    assert torch.equal(again.x[:, 1:-1], take(other_x[:, 1:], positions)), "values are not replayed"
    lost = [[i for i in range(11) if i not in row] for row in positions.tolist()]
    weights = take(record.scores, torch.tensor(lost))
    torch.testing.assert_close(again.x[:, -1], (weights.unsqueeze(2) * take(other_x[:, 1:], torch.tensor(lost))).sum(1))


def test_a_decision_is_made_once_and_outside_the_graph():
    made = []
    leaf = torch.ones(2, requires_grad=True)

    def decide():
        made.append(1)
        return leaf * 2

    replay = Replay()
    first = replay.record("a", decide)
    assert replay.record("a", decide) is first and len(made) == 1
    assert not first.requires_grad and replay.record("b", lambda: 3) == 3


def test_take_saves_the_positions_but_not_the_source():
    x = torch.randn(4, 20, 16, requires_grad=True)
    positions = torch.tensor([[1, 5, 7]] * 4)
    saved = saved_for_backward(lambda: take(x, positions))
    assert saved and all(not t.is_floating_point() for t in saved)
    slow = torch.stack([torch.stack([x[b, i] for i in positions[b]]) for b in range(4)])
    assert torch.equal(take(x, positions), slow)


@pytest.mark.parametrize(
    "config", [TokensConfig(fuse="none"), TokensConfig(detach_fusion_weights=True)], ids=["none", "detach"]
)
def test_without_gradient_through_the_scores_nothing_is_kept_for_them(config):
    x, q, k, origin = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(12, 1))
    given = scores(q, k, True, attached=False)
    saved = saved_for_backward(
        lambda: drop(Tokens(x, origin), *given, keep_rate=0.5, prefix=1, config=config, replay=Replay())
    )
    kept_whole = [
        t for t in saved if t.untyped_storage().data_ptr() in {s.untyped_storage().data_ptr() for s in (x, q, k)}
    ]
    assert not kept_whole
    assert all(t.numel() < x.numel() for t in saved)
