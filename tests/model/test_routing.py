"""The choice of experts for each token: routers, the routing record, gate noise and replay."""

import itertools

import pytest
import torch
from tiny_models import TASKS, WIDTH, make_mlp, make_moe, normal
from torch.nn import functional as F

from moe_bsr.config import ConfigError, MoEConfig
from moe_bsr.model.moe import MoE
from moe_bsr.model.replay import Replay
from moe_bsr.model.routers import ROUTERS as REGISTERED
from moe_bsr.model.routers import PerTaskRouter, TaskConditionedRouter
from moe_bsr.runtime.rng import generator

ROUTERS = ["per_task", "task_conditioned"]


# --- routers ---


def test_the_router_of_a_task_does_not_depend_on_the_other_tasks():
    alone = PerTaskRouter(WIDTH, 4, ["two"], (7, 1)).weight["two"]
    among = PerTaskRouter(WIDTH, 4, ["three", "two", "one"], (7, 1)).weight
    assert torch.equal(among["two"], alone)
    assert not torch.equal(among["two"], among["one"])
    assert not torch.equal(PerTaskRouter(WIDTH, 4, ["two"], (8, 1)).weight["two"], alone)


@pytest.mark.parametrize("router", ROUTERS)
def test_router_weights_start_at_std_002(router):
    made = MoE(make_mlp(), MoEConfig(router=router, num_experts=512), TASKS, (0, 0)).router
    weight = made.weight["one"] if router == "per_task" else made.weight
    assert 0.019 < weight.std() < 0.021 and weight.dtype == torch.float32


def test_only_the_active_tasks_router_gets_a_gradient():
    moe = make_moe()
    moe(normal(1, 6, WIDTH), "two", Replay())[0].sum().backward()
    assert moe.router.weight["two"].grad.abs().sum() > 0
    assert moe.router.weight["one"].grad is None and moe.router.weight["three"].grad is None


def test_task_conditioned_router_is_a_linear_map_of_token_and_task_embedding():
    router = TaskConditionedRouter(WIDTH, 5, TASKS, (0, 1))
    x = normal(7, WIDTH)
    for index, task in enumerate(TASKS):
        embedding = router.embed(F.one_hot(torch.tensor(index), 3).float())
        together = torch.cat([x, embedding.expand(7, -1)], 1)
        torch.testing.assert_close(router(x, task), together @ router.weight.T)
    assert not torch.allclose(router(x, "one"), router(x, "two"))
    same = TaskConditionedRouter(WIDTH, 5, TASKS, (0, 1))
    pairs = zip(router.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_is_float32_under_autocast(router):
    moe = make_moe(router=router)
    x = normal(2, 5, WIDTH).bfloat16()
    expected = moe.router(x.float(), "one")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.router(x, "one"), expected)


# --- the routing record ---


@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_record_equals_a_slow_loop(renormalize):
    moe = make_moe(renormalize_gates=renormalize, top_k=3)
    x = normal(2, 5, WIDTH)
    _, routing = moe(x, "one", Replay())
    importance, load = torch.zeros(6), torch.zeros(6)
    for b in range(2):
        for n in range(5):
            p = (moe.router.weight["one"] @ x[b, n]).softmax(0)
            best = sorted(range(6), key=lambda e, p=p: -p[e].item())[:3]
            gates = p[best] / p[best].sum() if renormalize else p[best]
            assert routing.experts[b, n].tolist() == best
            torch.testing.assert_close(routing.gates[b, n], gates)
            torch.testing.assert_close(routing.probabilities[b, n], p.detach())
            for e, gate in zip(best, gates, strict=True):
                importance[e] += gate.item()
                load[e] += 1
    torch.testing.assert_close(routing.importance.detach(), importance)
    assert torch.equal(routing.load, load)
    assert routing.importance.requires_grad and not routing.load.requires_grad
    assert not routing.probabilities.requires_grad


def test_importance_has_the_gradient_of_its_gates():
    moe = make_moe(top_k=3)
    x = normal(1, 5, WIDTH)
    weight = normal(6, seed=2)
    _, routing = moe(x, "one", Replay())
    (fast,) = torch.autograd.grad((routing.importance * weight).sum(), moe.router.weight["one"])
    p = (x[0] @ moe.router.weight["one"].T).softmax(1)
    chosen = torch.zeros_like(p).scatter(1, routing.experts[0], 1.0)
    kept = p * chosen / (p * chosen).sum(1, keepdim=True)
    (slow,) = torch.autograd.grad((kept.sum(0) * weight).sum(), moe.router.weight["one"])
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


# --- every legal setting trains the router, and close logits are ranked ---


@pytest.mark.parametrize("router", sorted(REGISTERED))
@pytest.mark.parametrize("top_k, renormalize", [*itertools.product([1, 2, 5, 6], [True, False])])
def test_a_router_learns_from_the_task_or_its_settings_are_refused(router, top_k, renormalize):
    options = {"router": router, "top_k": top_k, "renormalize_gates": renormalize, "balance_loss": "none"}
    if top_k == 1 and renormalize:
        with pytest.raises(ConfigError, match=r"moe\.top_k = 1.*moe\.renormalize_gates"):
            make_moe(scale=1.0, **options)
        return
    moe = make_moe(scale=1.0, **options)
    moe(normal(2, 9, WIDTH), "one", Replay())[0].square().sum().backward()
    norm = torch.stack([p.grad.norm() for p in moe.router.parameters() if p.grad is not None]).norm()
    assert norm > 1e-3, norm


@pytest.mark.parametrize("router", sorted(REGISTERED))
@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_are_chosen_by_logits_where_probabilities_are_all_zero(router, renormalize):
    moe = make_moe(router=router, scale=1e4, top_k=3, renormalize_gates=renormalize)
    logits = moe.router(normal(40, WIDTH), "one")
    assert (logits.softmax(-1) == 0).sum(-1).min() > 3, "or nothing would be tied"
    routing = moe.route(normal(40, WIDTH), "one", Replay(), None)
    assert torch.equal(routing.experts, logits.sort(descending=True).indices[:, :3])
    assert routing.gates.isfinite().all()


# --- gate noise and replay ---


def route(moe: MoE, key, replay=None, seed: int = 0):
    return moe.route(normal(40, WIDTH, seed=seed), "one", replay or Replay(), key)


def test_gate_noise_depends_only_on_its_key():
    moe = make_moe(gate_noise=6.0).train()
    torch.manual_seed(1)
    first = route(moe, (0, 5, 1, 3))
    torch.manual_seed(2)
    torch.rand(7)
    again = route(moe, (0, 5, 1, 3))
    assert torch.equal(first.probabilities, again.probabilities)
    assert torch.equal(first.experts, again.experts)
    for other in [(1, 5, 1, 3), (0, 6, 1, 3), (0, 5, 0, 3), (0, 5, 1, 7)]:
        assert not torch.equal(first.probabilities, route(moe, other).probabilities)


def test_gate_noise_is_added_to_the_logits_with_std_over_experts():
    moe, replay = make_moe(gate_noise=3.0).train(), Replay()
    routing = route(moe, (0, 1), replay)
    noise = replay.record("gate noise", lambda: pytest.fail("the noise was not recorded"))
    assert noise.shape == (40, 6) and abs(noise.std() - 1) < 0.15 and abs(noise.mean()) < 0.2
    clean = moe.router(normal(40, WIDTH), "one")
    torch.testing.assert_close(routing.probabilities, (clean + 3.0 / 6 * noise).softmax(1).detach())


def test_no_gate_noise_in_evaluation_and_a_missing_key_is_an_error():
    moe = make_moe(gate_noise=6.0).eval()
    noiseless = route(make_moe(gate_noise=0.0).train(), None)
    for key in (None, (0, 1)):
        assert torch.equal(route(moe, key).probabilities, noiseless.probabilities)
        assert torch.equal(route(moe, key).load, noiseless.load)
    with pytest.raises(ValueError, match="noise_key"):
        route(moe.train(), None)


def test_keys_of_different_length_are_different_keys():
    draws = [torch.rand(1, generator=generator(*key)).item() for key in [(1,), (1, 0), (1, 0, 0)]]
    assert len(set(draws)) == 3


def test_generator_depends_on_order_and_on_large_values():
    keys = [(1, 2), (2, 1), (1, 2**31), (1, 2**32 - 1), (1, 3)]
    draws = [torch.rand(1, generator=generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == torch.rand(1, generator=generator(1, 2)).item()


def test_replayed_decisions_keep_experts_and_noise_of_another_input():
    moe, replay = make_moe(gate_noise=6.0).train(), Replay()
    first = route(moe, (0, 1), replay)
    noise = replay.record("gate noise", lambda: None)
    again = route(moe, (9, 9), replay, seed=4)
    fresh = route(moe, (9, 9), seed=4)
    assert torch.equal(again.experts, first.experts)
    assert not torch.equal(fresh.experts, first.experts)
    clean = moe.router(normal(40, WIDTH, seed=4), "one")
    torch.testing.assert_close(again.probabilities, (clean + noise).softmax(1).detach())
    torch.testing.assert_close(again.gates.sum(1), torch.ones(40))


def test_an_unknown_router_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match="moe.router = 'pertask'.*did you mean 'per_task'"):
        make_moe(router="pertask")
