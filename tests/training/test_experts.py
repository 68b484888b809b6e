"""Training with low-rank experts: learning rates, prototypes, warm starts, added tasks, merging and cost."""

import functools

import pytest
import torch
from measured_cost import assert_predicted_is_measured
from tiny_models import make_model, normal
from tiny_runs import TASK, make_config, make_trainer, state_of

import moe_bsr
from moe_bsr.config import TrainConfig, replace
from moe_bsr.evaluation.interventions import changed
from moe_bsr.model.replay import Replay
from moe_bsr.runs import warm_start
from moe_bsr.training import prototypes
from moe_bsr.training.added_task import added_task_config
from moe_bsr.training.optim import make_optimizer, parameter_groups

pytestmark = pytest.mark.usefixtures("bare")

QUICK = {"train__evaluate_test": False}
LOW_RANK = {"moe__experts": "low_rank", "moe__rank": 4}
DENSE = {"plan__moe_blocks": []}


# --- learning rates and decay ---


def by_name(model, **settings) -> dict[str, dict]:
    groups = parameter_groups(model, TrainConfig(**settings))
    return {name: group for group in groups for name in group["names"]}


def test_low_rank_experts_have_ten_times_the_rate_and_no_weight_decay():
    mlp = "vit.blocks.3.mlp."
    groups = by_name(make_model(moe_blocks=(1, 3), experts="low_rank"), layer_decay=0.5)
    assert (groups[mlp + "experts.fc2_weight"]["lr_scale"], groups[mlp + "shared.fc2.weight"]["lr_scale"]) == (
        5,
        0.5,
    )
    assert groups[mlp + "experts.fc1_weight"]["weight_decay"] == 0 < groups[mlp + "shared.fc1.weight"]["weight_decay"]
    full = by_name(make_model(moe_blocks=(1, 3)), layer_decay=0.5)
    assert full[mlp + "experts.fc1_weight"]["lr_scale"] == 0.5
    assert full[mlp + "experts.fc1_weight"]["weight_decay"] == 0.05


def test_experts_and_routers_have_their_own_rates_and_routers_may_be_held():
    settings = {"expert_lr_scale": 4.0, "router_lr_scale": 7.0, "router_hold": 20, "expert_decay": "none"}
    groups = by_name(make_model(moe_blocks=(1, 3)), **settings)
    experts, router = (groups[f"vit.blocks.3.mlp.{name}"] for name in ("experts.fc1_weight", "router.weight.one"))
    assert (experts["lr_scale"], experts["weight_decay"], experts["hold"]) == (4.0, 0.0, 0)
    assert (router["lr_scale"], router["hold"]) == (7.0, 20)
    assert groups["heads.one.weight"]["lr_scale"] == 1.0


def test_held_routers_move_only_after_the_hold(tmp_path):
    trainer = make_trainer(make_config(tmp_path, train__router_hold=2, moe__init_noise=0.1), tmp_path / "run")
    batches = trainer.inputs.batches(trainer.sampler.batches())
    states = [state_of(trainer.model)]
    for step in range(3):
        trainer.take(batches, step, 1e-2)
        trainer.state.step = step + 1
        states.append(state_of(trainer.model))
    name = "vit.blocks.3.mlp.router.weight.shapes"
    assert [torch.equal(a[name], b[name]) for a, b in zip(states, states[1:], strict=False)] == [True, True, False]
    batches.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"experts": "covering_slices", "num_experts": 4}, {"mlp_ratio": 1, "num_experts": 6}],
    ids=["full", "slices", "two slices have more copies"],
)
def test_decay_towards_the_mean_uses_the_mean_of_copies_of_the_same_slice(options):
    model = make_model(moe_blocks=(1, 3), init_noise=0.5, **options)
    experts = model.vit.blocks[3].mlp.experts
    before = experts.fc1_weight.detach().clone()
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5, expert_decay="mean", optimizer="sgd"))
    experts.fc1_weight.grad = torch.zeros_like(before)
    optimizer.step()
    for e, weight in enumerate(experts.fc1_weight):
        mean = before[e % experts.slices :: experts.slices].mean(0)
        assert torch.allclose(weight, before[e] - 0.05 * (before[e] - mean), atol=1e-6)
    assert not torch.equal(experts.fc1_weight[0], before[0])


# --- prototypes ---


def test_prototypes_are_the_scaled_directions_of_clusters():
    directions = torch.linalg.qr(normal(12, 12))[0][:3]
    which = torch.arange(300) % 3
    tokens = 3.0 * directions[which] + 0.1 * normal(300, 12)
    found = prototypes.prototypes(tokens, 3, ("seed", 0))
    similar = torch.nn.functional.normalize(found, dim=1) @ directions.t()
    assert sorted(similar.argmax(1).tolist()) == [0, 1, 2] and (similar.max(1).values > 0.99).all()
    assert (tokens @ found.t()).std(1).mean() == pytest.approx(2.0)
    assert prototypes.prototypes(tokens[:2], 8, ("seed", 0)).isfinite().all()


def test_prototypes_that_do_not_differ_keep_their_scale():
    for tokens, count in ((normal(50, 12), 1), (torch.ones(50, 12), 3)):
        assert torch.allclose(prototypes.prototypes(tokens, count, ("seed", 0)).norm(dim=1), torch.ones(count))


# --- runs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense run, a run of low-rank experts with prototypes that starts from it, and that run with an added task."""
    folder = tmp_path_factory.mktemp("experts")
    short = {"train__steps": 4, "train__checkpoint_every": 4, "moe__balance_loss": "across_tasks"} | QUICK
    moe_bsr.train(make_config(folder, **DENSE, **short), folder / "dense", callbacks=[])
    config = make_config(
        folder, moe__gate="prototype", train__ema_decay=0.9, **LOW_RANK, **short, train__init_from=str(folder / "dense")
    )
    moe_bsr.train(config, folder / "low_rank", callbacks=[])
    (folder / "petals.yaml").write_text(TASK.format("petals", 24, 60))
    added = replace(added_task_config(folder / "low_rank", str(folder / "petals.yaml")), train__penalty=1e-2, **QUICK)
    moe_bsr.train(added, folder / "added", callbacks=[])
    return folder


@functools.cache
def loaded(run):
    return moe_bsr.load(run)


def model_of(run):
    return loaded(run).models["shapes"]


@functools.cache
def logits(run) -> torch.Tensor:
    with torch.inference_mode():
        return model_of(run)(normal(5, 3, 32, 32), "shapes").logits


def test_low_rank_experts_start_from_a_dense_run_exactly(runs):
    config = make_config(runs, moe__gate="image", **LOW_RANK)
    model, notes = warm_start.build_from(str(runs / "dense"), config, loaded(runs / "dense").class_names)
    with torch.inference_mode():
        # The dense last block computes only the class token: sums of another shape.
        started = model.eval()(normal(5, 3, 32, 32), "shapes").logits
        torch.testing.assert_close(started, logits(runs / "dense"), rtol=1e-5, atol=1e-5)
    assert "low-rank experts of blocks 3, 5, from zero" in "\n".join(notes)


def test_a_dense_run_starts_from_the_ffn_beside_the_experts(runs):
    model, notes = warm_start.build_from(
        str(runs / "low_rank"), make_config(runs, **DENSE), loaded(runs / "dense").class_names
    )
    trained = model_of(runs / "low_rank").vit.blocks[3].mlp.shared
    assert torch.equal(model.vit.blocks[3].mlp.fc1.weight, trained.fc1.weight)
    assert notes[-1] == "left: experts of blocks 3, 5"


def test_a_run_starts_at_prototypes_and_does_not_replace_them_later(runs):
    model = model_of(runs / "low_rank")
    weights = model.vit.blocks[3].mlp.router.weight
    # Both tasks' routers started at the same centers; randomly drawn ones would be unrelated.
    assert torch.cosine_similarity(*(weight.flatten() for weight in weights.values()), dim=0) > 0.9
    assert not torch.equal(*weights.values())
    assert prototypes.place(model, None, 0) == []


def test_training_moves_experts_ffn_and_routers(runs):
    layer = model_of(runs / "low_rank").vit.blocks[3].mlp
    assert layer.experts.fc2_weight.abs().max() > 0
    assert not torch.equal(logits(runs / "low_rank"), logits(runs / "dense"))


def test_an_added_task_adds_head_and_routers_and_changes_no_other_task(runs):
    assert torch.equal(logits(runs / "added"), logits(runs / "low_rank"))
    model = model_of(runs / "added")
    own = {name for name, p in model.named_parameters() if any(p is q for q in model.own_parameters("petals"))}
    assert {name.rsplit(".", 1)[0] for name in own if "heads" not in name} == {
        f"vit.blocks.{index}.mlp.router.weight" for index in (3, 5)
    }


def test_merged_gates_equal_one_adapter_for_the_task(runs):
    model = model_of(runs / "low_rank")
    layer = model.vit.blocks[5].mlp
    x = normal(2, 6, layer.shared.fc1.in_features)
    with torch.inference_mode(), changed(model, "merged"):
        y, routing = layer(x, "shapes", Replay())
        whole = torch.zeros(2, 6, 4).scatter(2, routing.experts, routing.gates).mean((0, 1))
        assert torch.allclose(
            y - layer.shared(x), layer.experts.of_gates(x.flatten(0, 1), whole.expand(12, 4)).view_as(y)
        )


# --- cost ---


@pytest.mark.parametrize("gate", ["token", "task"])
def test_the_predicted_cost_is_the_measured_one(gate, tmp_path):
    config = make_config(tmp_path, moe__gate=gate, storage="bf16", **LOW_RANK)
    assert_predicted_is_measured(config)
