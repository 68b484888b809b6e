"""The balance loss: its statistics, both kinds, and the expected load under gate noise."""

import math

import numpy as np
import pytest
import torch
from tiny_models import TASKS, normal

from moe_bsr.config import MoEConfig
from moe_bsr.model.balance import Balance, squared_cv
from moe_bsr.model.moe import Routing, smooth_load


def routing(importance: list[float], load: list[float]) -> Routing:
    """Return a record in which only the two statistics are set."""
    nothing = torch.zeros(0)
    return Routing(nothing, nothing, nothing, torch.tensor(importance, requires_grad=True), torch.tensor(load))


def cv2(values) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(np.var(values) / np.mean(values) ** 2)


def make(kind: str, blocks: list[int], tasks: list[str] = TASKS, weight: float = 0.1) -> Balance:
    config = MoEConfig(num_experts=4, top_k=2, balance_loss=kind, balance_loss_weight=weight)
    return Balance(config, tasks, blocks)


def test_squared_cv_is_population_variance_over_squared_mean():
    amount = normal(3, 16).abs()
    torch.testing.assert_close(squared_cv(amount), torch.tensor([cv2(row) for row in amount]))


def test_squared_cv_has_a_finite_gradient_at_perfect_balance_and_for_one_expert():
    for amount in (torch.full((16,), 3.0), torch.tensor([7.0])):
        amount.requires_grad_()
        value = squared_cv(amount)
        value.backward()
        assert value == 0 and torch.equal(amount.grad, torch.zeros_like(amount))


def test_squared_cv_gradient():
    amount = normal(5).abs().double().requires_grad_()
    assert torch.autograd.gradcheck(squared_cv, amount)


def test_per_task_is_the_weighted_mean_over_layers_of_both_variations():
    first = routing([4.0, 2.0, 1.0, 1.0], [4.0, 4.0, 0.0, 0.0])
    second = routing([1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 1.0, 1.0])
    balance = make("per_task", [3, 7])
    loss = balance({3: first, 7: second}, "one")
    # variances 1.5, 4, 0, 1 divided by squared means 4, 4, 1, 4
    assert loss.item() == pytest.approx(0.1 * (1.5 / 4 + 4 / 4 + 0 + 1 / 4) / 2)
    loss.backward()
    assert first.importance.grad.abs().sum() > 0 and second.importance.grad.abs().sum() == 0
    before = loss.item()
    balance.update({3: first, 7: second}, "two")
    assert balance({3: first, 7: second}, "one").item() == before, "other tasks do not matter"


@pytest.mark.parametrize("kind, weight", [("none", 0.1), ("per_task", 0.0)])
def test_no_balance_loss(kind, weight):
    record = {0: routing([4.0, 2.0, 1.0, 1.0], [4.0, 4.0, 0.0, 0.0])}
    assert make(kind, [0], weight=weight)(record, "one") == 0
    assert make("per_task", [])({}, "one") == 0


def test_across_tasks_adds_the_running_shares_of_other_tasks():
    balance = make("across_tasks", [5])
    balance.update({5: routing([2.0, 2.0, 0.0, 0.0], [6.0, 2.0, 0.0, 0.0])}, "two")
    balance.update({5: routing([0.0, 0.0, 9.0, 1.0], [0.0, 0.0, 1.0, 1.0])}, "three")
    balance.update({5: routing([0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 8.0])}, "one")
    now = routing([1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.0])
    loss = balance({5: now}, "one")
    # The sum of this task's current shares and the running shares of the two others. Its own past does not count.
    importance = [0.5 + 0.5, 0.5, 0.9, 0.5 + 0.1]
    load = [0.75 + 0.75, 0.25, 0.5, 0.25 + 0.5]
    assert loss.item() == pytest.approx(0.1 * (cv2(importance) + cv2(load)), rel=1e-5)
    loss.backward()
    assert now.importance.grad.isfinite().all() and now.importance.grad.abs().sum() > 0
    assert not balance.importance.requires_grad


def test_running_shares_start_at_the_first_value_and_move_by_a_tenth():
    balance = make("across_tasks", [5, 8])
    first = {
        5: routing([4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]),
        8: routing([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]),
    }
    balance.update(first, "two")
    assert balance.importance[1].tolist() == [[1, 0, 0, 0], [0.25] * 4]
    assert balance.load[1].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    assert balance.importance[[0, 2]].eq(0).all()
    second = {5: routing([0.0, 5.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]), 8: first[8]}
    balance.update(second, "two")
    torch.testing.assert_close(balance.importance[1, 0], torch.tensor([0.9, 0.1, 0.0, 0.0]))
    torch.testing.assert_close(balance.load[1, 0], torch.tensor([0.5, 0.5, 0.0, 0.0]))


def test_across_tasks_lets_two_tasks_use_disjoint_halves():
    halves = [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]
    left, right = ({0: routing(half, half)} for half in halves)
    losses = {}
    for kind in ("per_task", "across_tasks"):
        balance = make(kind, [0], ["one", "two"])
        balance.update(left, "one")
        balance.update(right, "two")
        losses[kind] = (balance(left, "one") + balance(right, "two")).item()
    assert losses["across_tasks"] == pytest.approx(0, abs=1e-7)
    assert losses["per_task"] == pytest.approx(2 * 0.1 * 2), "half unused: each variation is 1"


def test_across_tasks_penalizes_tasks_that_use_the_same_half():
    left = {0: routing([2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0])}
    balance = make("across_tasks", [0], ["one", "two"])
    balance.update(left, "two")
    assert balance(left, "one").item() == pytest.approx(0.1 * 2)


def test_with_one_task_both_kinds_agree():
    record = {0: routing([4.0, 2.0, 1.0, 1.0], [4.0, 4.0, 0.0, 0.0])}
    losses = []
    for kind in ("per_task", "across_tasks"):
        balance = make(kind, [0], ["one"])
        balance.update(record, "one")
        losses.append(balance(record, "one").item())
    assert losses[0] == pytest.approx(losses[1])


# --- expected load under gate noise ---


def slow_smooth_load(clean: torch.Tensor, noisy: torch.Tensor, k: int, std: float) -> torch.Tensor:
    """Compute the load per expert: its logit must exceed the k-th best of the other experts' noisy logits."""
    load = []
    for e in range(clean.shape[1]):
        expected = 0.0
        for t in range(clean.shape[0]):
            others = sorted((noisy[t, o] for o in range(clean.shape[1]) if o != e), key=lambda value: -value.item())
            margin = (clean[t, e] - others[k - 1]) / std
            expected = expected + 0.5 * (1 + torch.erf(margin / math.sqrt(2)))
        load.append(expected)
    return torch.stack(load)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load_and_its_gradient_equal_a_slow_reference(k):
    noise = 0.5 * normal(6, 5, seed=1)
    results = []
    for function in (smooth_load, slow_smooth_load):
        clean = normal(6, 5).requires_grad_()
        noisy = clean + noise
        load = (
            smooth_load(clean, noisy, noisy.topk(k).indices, 0.5)
            if function is smooth_load
            else slow_smooth_load(clean, noisy, k, 0.5)
        )
        (load * normal(5, seed=2)).sum().backward()
        results.append((load.detach(), clean.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_smooth_load_is_the_probability_of_selection_under_fresh_noise():
    std, k, draws = 0.7, 2, 40_000
    clean = normal(4, 5, seed=3)
    noisy = clean + std * normal(4, 5, seed=4)
    load = smooth_load(clean, noisy, noisy.topk(k).indices, std)
    fresh = clean.unsqueeze(2) + std * normal(4, 5, draws, seed=5)
    counted = torch.zeros(5)
    for e in range(5):
        others = torch.cat([noisy[:, :e], noisy[:, e + 1 :]], 1)
        bar = others.topk(k).values[:, -1:]
        counted[e] = (fresh[:, e] > bar).float().mean(1).sum()
    assert (load - counted).abs().max() < 4 * math.sqrt(4 * 0.25 / draws)


def test_smooth_load_with_all_experts_chosen_counts_every_token():
    clean = normal(6, 5)
    load = smooth_load(clean, clean, clean.topk(5).indices, 0.5)
    assert torch.equal(load, torch.full((5,), 6.0))
