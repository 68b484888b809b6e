"""Low-rank experts and covering slices against loops over experts, and equivalences between gates."""

import copy
from functools import cache

import pytest
import torch
from tiny_models import TASKS, WIDTH, gradients, make_mlp, make_model, make_moe, normal, scale_routers
from torch.nn import functional as F

from moe_bsr.config import ConfigError, MoEConfig
from moe_bsr.model.moe import MoE
from moe_bsr.model.replay import Replay
from moe_bsr.model.storage import STORAGES
from moe_bsr.ops.low_rank import gated_linear

GATES = ["token", "image", "prototype", "task", "constant", "random"]
LOW_RANK = {"experts": "low_rank", "rank": 3}
SLICES = {"experts": "covering_slices", "num_experts": 6, "top_k": 2}


def trained(moe: MoE) -> MoE:
    """Return the layer with random nonzero experts and, for gate "prototype", random prototypes."""
    with torch.no_grad():
        for seed, parameter in enumerate(moe.experts.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=20 + seed))
        if moe.gate == "prototype":
            for weight in moe.router.parameters():
                weight.copy_(normal(*weight.shape, seed=30))
    return moe


def one_by_one(moe: MoE, x: torch.Tensor, routing) -> torch.Tensor:
    """Compute FFN(x) + sum of gate * B act(A x + a), one token and one expert at a time."""
    experts, y = moe.experts, []
    by_token = (t.flatten(0, 1) for t in (x, routing.experts, routing.gates))
    for token, chosen, gates in zip(*by_token, strict=True):
        total = moe.shared(token)
        for e, gate in zip(chosen, gates, strict=True):
            hidden = F.gelu(experts.fc1_weight[e] @ token + experts.fc1_bias[e])
            total = total + gate * (experts.fc2_weight[e] @ hidden)
        y.append(total)
    return torch.stack(y).view_as(x)


def results(moe: MoE, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Return the output and all gradients, the input's gradient first."""
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    leaves = [leaf, *(p for p in moe.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), leaves, allow_unused=True)]


def assert_close(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_a_layer_equals_a_loop_over_its_experts(kernels, gate):
    moe, x = trained(make_moe(**LOW_RANK, gate=gate)), normal(2, 5, WIDTH)
    for weight in moe.router.parameters():
        weight.requires_grad_(gate not in ("task", "constant", "random"))

    def dense(leaf):
        return one_by_one(moe, leaf, moe(leaf, "one", Replay())[1])

    assert_close(results(moe, x, lambda leaf: moe(leaf, "one", Replay())[0]), results(moe, x, dense))


@pytest.mark.parametrize("gate", GATES)
def test_a_new_layer_is_bitwise_equal_to_the_ffn(gate):
    moe, x = make_moe(**LOW_RANK, gate=gate), normal(2, 5, WIDTH)
    assert torch.equal(moe(x, "two", Replay())[0], make_mlp()(x))


def test_constant_gates_equal_one_adapter_of_rank_times_experts():
    moe, x = trained(make_moe(**LOW_RANK, gate="constant")), normal(2, 5, WIDTH)
    y, routing = moe(x, "one", Replay())
    first = moe.experts.fc1_weight.reshape(18, WIDTH)
    second = torch.cat(list(moe.experts.fc2_weight), 1)
    adapter = F.linear(F.gelu(F.linear(x, first, moe.experts.fc1_bias.reshape(18))), second) / 6
    assert torch.allclose(y, moe.shared(x) + adapter, atol=1e-5)
    assert routing.experts.shape == (2, 5, 6) and torch.allclose(routing.gates, torch.tensor(1 / 6))


def test_learned_gates_that_are_equal_for_all_experts_equal_constant_gates():
    x, layers = normal(2, 5, WIDTH), []
    for options in ({"gate": "constant"}, {"gate": "token", "top_k": 6}):
        layers.append(trained(make_moe(**LOW_RANK | options)))
    for weight in layers[1].router.parameters():
        weight.data.zero_()
    assert torch.allclose(*(moe(x, "one", Replay())[0] for moe in layers), atol=1e-5)


@pytest.mark.parametrize(
    "experts, own, common", [(16, 5, 1), (6, 2, 0), (7, 2, 1), (2, 0, 2)], ids=["rest", "even", "odd", "few"]
)
def test_task_gates_divide_the_experts_and_share_the_rest(experts, own, common):
    moe = make_moe(**LOW_RANK, num_experts=experts, gate="task")
    gates = {task: moe.route(normal(3, WIDTH), task, Replay(), None) for task in TASKS}
    used = {task: set(routing.experts[0][routing.gates[0] > 0].tolist()) for task, routing in gates.items()}
    assert all(len(each) == own + common for each in used.values())
    assert len(set.intersection(*used.values())) == common and set.union(*used.values()) == set(range(experts))
    assert all(torch.allclose(r.gates.max(), torch.tensor(1 / (own + common))) for r in gates.values())


def test_the_image_gate_makes_one_choice_per_image_and_prototypes_start_at_zero():
    moe, x = make_moe(**LOW_RANK, gate="image"), normal(3, 5, WIDTH)
    routing = moe(x, "one", Replay())[1]
    assert (routing.experts == routing.experts[:, :1]).all() and len(routing.experts[:, 0].unique(dim=0)) > 1
    alone = moe(x[1:2], "one", Replay())[1]
    assert torch.equal(alone.experts, routing.experts[1:2]) and routing.load.sum() == 3 * 5 * 2
    assert not any(weight.any() for weight in make_moe(**LOW_RANK, gate="prototype").router.parameters())


@cache
def gradients_of(storage: str, gate: str) -> dict[str, torch.Tensor]:
    model = make_model(moe_blocks=(1, 3), storage=storage, **LOW_RANK, gate=gate)
    scale_routers(model, 50.0) if gate != "task" else None
    for index in (1, 3):
        trained(model.vit.blocks[index].mlp)
    output = model.train()(normal(3, 3, 16, 16), "one")
    (output.logits.square().mean() + output.auxiliary_loss).backward()
    return gradients(model)


@pytest.mark.parametrize("gate", ["token", "image", "task"])
@pytest.mark.parametrize("kind", [kind for kind in STORAGES if not STORAGES[kind].coarse and kind != "exact"])
def test_every_storage_gives_the_gradients_of_the_exact_one(kind, gate):
    expected, found = gradients_of("exact", gate), gradients_of(kind, gate)
    assert found.keys() == expected.keys()
    rounded = 0.1 if kind != "recompute" else 1e-5
    for name, exact in expected.items():
        assert (found[name] - exact).norm() <= rounded * max(exact.norm(), 1e-3), name


def test_gate_gradients_equal_finite_differences():
    h, gates, weight = (normal(*shape).double().requires_grad_() for shape in ((3, 6), (3, 2), (2, 4, 3)))
    assert torch.autograd.gradcheck(lambda *x: gated_linear(torch.nn.GELU(), *x), (h, gates, weight))


def test_fixed_gates_have_no_balance_loss_and_no_trained_router():
    for gate in ("task", "constant", "random"):
        model = make_model(moe_blocks=(1, 3), **LOW_RANK, gate=gate)
        assert model(normal(2, 3, 16, 16), "one").auxiliary_loss == 0
        assert not any(p.requires_grad for p in model.vit.blocks[3].mlp.router.parameters())
    assert make_model(moe_blocks=(1, 3), **LOW_RANK)(normal(2, 3, 16, 16), "one").auxiliary_loss > 0


# --- covering slices ---


def test_covering_slices_equal_the_ffn_at_the_start_for_any_choice(kernels):
    x = normal(2, 5, WIDTH)
    for seed in range(3):
        moe = make_moe(distinct=False, **SLICES)
        for weight in moe.router.parameters():
            weight.data.copy_(normal(*weight.shape, seed=seed))
        assert torch.allclose(moe(x, "one", Replay())[0], make_mlp()(x), atol=1e-5)
    assert sum(p.numel() for p in moe.experts.parameters()) == pytest.approx(
        3 * sum(p.numel() for p in make_mlp().parameters()), rel=0.05
    )


def test_one_copy_of_each_slice_is_chosen_and_learns_by_its_log_probability(kernels):
    moe, x = trained(make_moe(**SLICES)), normal(4, 5, WIDTH)
    moe = copy.deepcopy(moe)

    def loop(leaf):
        routing, experts, y = moe(leaf, "one", Replay())[1], moe.experts, torch.zeros_like(leaf)
        logits = moe.router(leaf.reshape(-1, WIDTH), "one").view(4, 5, 6)
        for part in range(2):
            of_part = logits[..., part::2].softmax(-1)
            best = of_part.argmax(-1)
            assert torch.equal(routing.experts[..., part], 2 * best + part)
            for copy_ in range(3):
                e = 2 * copy_ + part
                hidden = F.gelu(F.linear(leaf, experts.fc1_weight[e], experts.fc1_bias[e]))
                p = of_part[..., copy_, None]
                chosen = (best == copy_)[..., None] * p / p.detach()
                y = y + chosen * F.linear(hidden, experts.fc2_weight[e], experts.fc2_bias[e])
        return y

    assert_close(results(moe, x, lambda leaf: moe(leaf, "one", Replay())[0]), results(moe, x, loop))


def test_covering_slices_fill_the_routing_record():
    routing = make_moe(**SLICES)(normal(2, 5, WIDTH), "one", Replay())[1]
    assert torch.allclose(routing.probabilities.sum(-1), torch.ones(2, 5)) and (routing.gates == 1).all()
    assert torch.equal(routing.load, torch.bincount(routing.experts.flatten(), minlength=6).float())


# --- refusals ---


@pytest.mark.parametrize(
    "options, key",
    [
        ({"gate": "task"}, "moe.gate"),
        ({"experts": "covering_slices", "num_experts": 6, "top_k": 4}, "moe.num_experts"),
        ({"experts": "covering_slices", "num_experts": 4, "top_k": 4}, "moe.num_experts"),
        ({"experts": "low_rank", "rank": 0}, "moe.rank"),
        ({"experts": "low_rank", "gate": "constant", "gate_noise": 1.0}, "moe.gate_noise"),
        ({"gate": "prototype", "router": "task_conditioned"}, "moe.router"),
        ({"experts": "low_rank", "top_k": 1}, "moe.top_k"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_key(options, key):
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        MoEConfig(**options)


def test_slices_must_divide_the_ffn():
    with pytest.raises(ConfigError, match="moe.top_k = 3: must divide the FFN's hidden width 32"):
        MoE(make_mlp(), MoEConfig(experts="covering_slices", num_experts=6, top_k=3), TASKS, (0,))


@pytest.mark.parametrize("options", [{"experts": "covering_slices"}, {"experts": "low_rank", "gate": "constant"}])
def test_a_single_expert_per_token_is_allowed_where_its_gate_does_not_need_others(options):
    assert MoEConfig(top_k=1, **options).top_k == 1


def test_the_plan_table_names_the_experts_of_a_block():
    from moe_bsr.config import Config
    from moe_bsr.model.summary import table

    for moe, words in (
        (MoEConfig(experts="low_rank"), "top-4 of 16 of rank 16 beside the FFN"),
        (MoEConfig(experts="low_rank", gate="task"), "16 of rank 16 beside the FFN by task"),
        (MoEConfig(experts="covering_slices"), "top-4 of 16 slices"),
    ):
        assert words in table(make_model(moe_blocks=(1,)), Config(moe=moe))[2]
