"""Routing statistics against loops over single tokens, and on routing with known properties."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import normal
from tiny_routing import by_logits, spread, to

from moe_bsr.evaluation.routing import RoutingStatistics


def entropy(values) -> float:
    return -sum(float(v) * math.log2(v) for v in values if v > 0)


def test_counts_are_exact_within_autocast():
    routing, statistics = to(4, [1, 2], 301), RoutingStatistics(["one"], 4)  # 301 is not representable in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics.add("one", routing)
    assert statistics.total("counts").tolist() == [[0, 301, 301, 0]]


@pytest.mark.parametrize(("tasks", "experts", "k"), [(5, 16, 4), (2, 2, 1), (3, 6, 6), (20, 64, 2), (1, 5, 3)])
def test_every_number_equals_a_loop_over_tokens(tasks, experts, k):
    names = [f"task{i}" for i in range(tasks)]
    statistics = RoutingStatistics(names, experts)
    counts, gates = np.zeros((tasks, experts)), np.zeros((tasks, experts))
    mean, nats, tokens = np.zeros(experts), 0.0, 0
    for part in range(2 * tasks):
        row = part % tasks
        routing = by_logits(2 * normal(2, 3 + row, experts, seed=part), k)
        statistics.add(names[row], routing)
        for image in range(2):
            for token in range(3 + row):
                chosen = routing.experts[image, token].tolist()
                for slot, expert in enumerate(chosen):
                    counts[row, expert] += 1
                    gates[row, expert] += routing.gates[image, token, slot].item()
                p = routing.probabilities[image, token].double()
                mean += p.numpy()
                nats -= sum(v * math.log(v) for v in p.tolist())
                tokens += 1
    shares = counts / counts.sum(1, keepdims=True)
    assert np.allclose(statistics.shares("count"), shares, atol=1e-12)
    assert np.allclose(statistics.shares("gate"), gates / gates.sum(1, keepdims=True), atol=1e-6)
    assert np.allclose([statistics.shares(of).sum(1) for of in ("count", "gate")], 1)
    assert statistics.top_k == k and statistics.total("tokens").sum() == tokens
    for a in range(tasks):
        for b in range(tasks):
            both = entropy((shares[a] + shares[b]) / 2)
            divergence = both - (entropy(shares[a]) + entropy(shares[b])) / 2
            assert statistics.distances()[a, b] == pytest.approx(math.sqrt(max(0, divergence)), abs=1e-6)
    load = counts.sum(0) / counts.sum()
    numbers = statistics.numbers()
    assert numbers["load_cv"] == pytest.approx(np.std(load) / np.mean(load))
    assert numbers["largest_share"] == pytest.approx(load.max())
    assert numbers["dead_experts"] == sum(share < 0.01 / experts for share in load)
    assert numbers["mean_entropy"] == pytest.approx(entropy(mean / tokens) / math.log2(experts), abs=1e-6)
    assert numbers["token_entropy"] == pytest.approx(nats / tokens / math.log(experts), abs=1e-6)
    if tasks == 1:
        assert np.isnan(numbers["mutual_information"])
    else:
        joint = shares / tasks
        bits = sum(
            joint[t, e] * math.log2(joint[t, e] / (joint[t].sum() * joint[:, e].sum()))
            for t in range(tasks)
            for e in range(experts)
            if joint[t, e] > 0
        )
        assert numbers["mutual_information"] == pytest.approx(bits / math.log2(min(tasks, experts)), abs=1e-9)


def test_collapse_to_one_expert_is_recognized():
    statistics = RoutingStatistics(["a", "b", "c"], 8)
    for task in "abc":
        statistics.add(task, to(8, [5]))
    numbers = statistics.numbers()
    assert numbers["load_cv"] == pytest.approx(math.sqrt(7))
    assert numbers["dead_experts"] == 7 and numbers["largest_share"] == 1
    assert numbers["mean_entropy"] == pytest.approx(0, abs=1e-9) == numbers["token_entropy"]
    assert numbers["mutual_information"] == 0
    assert (statistics.distances() == 0).all()
    assert statistics.reading().startswith("collapsed") and "share" in statistics.reading()


def test_collapse_to_four_of_sixteen_experts_is_recognized():
    statistics = RoutingStatistics(["a", "b"], 16)
    for task in "ab":
        statistics.add(task, to(16, [1, 2, 3, 9]))
    assert statistics.reading().startswith("collapsed")
    assert statistics.numbers()["dead_experts"] == 12


@pytest.mark.parametrize(("tasks", "experts"), [(4, 8), (2, 2), (4, 4), (8, 4)])
def test_a_specialization_has_mutual_information_one(tasks, experts):
    """Tasks have disjoint experts. With more tasks than experts, each group of tasks has one expert."""
    names = [f"task{i}" for i in range(tasks)]
    statistics, each = RoutingStatistics(names, experts), max(1, experts // tasks)
    for row, name in enumerate(names):
        first = row * each if experts >= tasks else row % experts
        # Token counts are unequal, but all tasks have equal weight.
        statistics.add(name, spread(experts, list(range(first, first + each)), rounds=10 + 7 * row))
    assert statistics.mutual_information() == pytest.approx(1)
    assert statistics.distances()[0, 1] == pytest.approx(1)
    assert "different" in statistics.reading() and not statistics.reading().startswith("collapsed")


def test_uniform_routing_is_even_and_has_no_mutual_information():
    statistics = RoutingStatistics(["a", "b"], 4)
    for task in "ab":
        statistics.add(task, spread(4, [0, 1, 2, 3]))
    numbers = statistics.numbers()
    assert numbers["load_cv"] == 0 == numbers["dead_experts"] == numbers["mutual_information"]
    assert numbers["mean_entropy"] == pytest.approx(1)
    assert numbers["token_entropy"] == pytest.approx(0, abs=1e-9)
    assert statistics.reading().startswith("even") and "share" in statistics.reading()


def test_a_task_without_tokens_has_nan_rows_and_changes_no_number():
    with_it, without = RoutingStatistics(["a", "never", "b"], 6), RoutingStatistics(["a", "b"], 6)
    for statistics in (with_it, without):
        for seed, task in enumerate("ab"):
            statistics.add(task, by_logits(normal(1, 9, 6, seed=seed), 2))
    assert with_it.numbers() == without.numbers()
    assert with_it.seen.tolist() == [True, False, True]
    for values in (with_it.shares("count"), with_it.shares("gate"), with_it.distances()):
        assert np.isnan(values[1]).all() and not np.isnan(values[[0, 2]][:, [0, 2]]).any()
    empty = RoutingStatistics(["a", "b"], 3)
    assert all(np.isnan(value) for value in empty.numbers().values())
    assert np.isnan(empty.load()).all() and empty.reading() == "no tokens yet"


def test_entropies_of_a_single_expert_are_undefined():
    statistics = RoutingStatistics(["a", "b"], 1)
    for task in "ab":
        statistics.add(task, to(1, [0]))
    numbers = statistics.numbers()
    assert numbers["load_cv"] == 0 and numbers["largest_share"] == 1 and numbers["dead_experts"] == 0
    assert all(np.isnan(numbers[name]) for name in ("mean_entropy", "token_entropy", "mutual_information"))


def test_statistics_can_be_merged_and_survive_json():
    parts = [RoutingStatistics(["a", "b"], 5) for _ in range(3)]
    for seed in range(6):
        routing = by_logits(normal(2, 4, 5, seed=seed), 2)
        for part in (parts[0], parts[1 + seed % 2]):
            part.add("ab"[seed // 3], routing)
    whole, merged, other = parts
    merged.merge(other)
    for name in ("tokens", "counts", "gates", "probabilities", "entropy"):
        assert np.allclose(whole.total(name), merged.total(name), rtol=1e-12, atol=0)
    back = RoutingStatistics.from_state(json.loads(json.dumps(whole.state())))
    assert back.state() == whole.state() and back.numbers() == whole.numbers()


def test_adding_changes_neither_the_record_nor_its_graph():
    routing = by_logits(normal(2, 3, 4).requires_grad_(), 2)
    before = [routing.experts.clone(), routing.gates.detach().clone(), routing.probabilities.detach().clone()]
    statistics = RoutingStatistics(["a"], 4)
    statistics.add("a", routing)
    assert not any(value.requires_grad for value in statistics._sums.values())
    for old, new in zip(before, (routing.experts, routing.gates, routing.probabilities), strict=True):
        assert torch.equal(old, new)
    routing.gates.sum().backward()  # the graph is still there
