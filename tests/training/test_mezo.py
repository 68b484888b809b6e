"""MeZO, training without a backward pass: unbiased estimates, restored weights, equal decisions in both passes, and
runs that learn, resume and need the predicted memory."""

import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CLASSES, make_model, make_vit, normal, scale_routers
from tiny_runs import crashed_and_resumed, make_config, make_trainer, state_of
from torch import nn

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import measure
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.replay import deciding_once
from moe_bsr.runtime.device import prepare
from moe_bsr.training.callback import Callback
from moe_bsr.training.mezo import MeZO
from moe_bsr.training.sharing import check_sharing
from moe_bsr.training.update import training_step

pytestmark = pytest.mark.usefixtures("bare")

MEZO = {
    "train__optimizer": "mezo",
    "train__evaluate_test": False,
    "train__steps": 4,
    "train__checkpoint_every": 2,
}


def estimator(*parameters: nn.Parameter, distance: float = 1e-2) -> MeZO:
    groups = [{"params": list(parameters), "names": [f"p{i}" for i in range(len(parameters))]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return MeZO(optimizer, distance, lambda key: list(parameters))


def test_the_mean_of_the_steps_is_the_gradient():
    """For w^T A w + b^T w in double precision. For a quadratic the only error of a step is that of the direction."""
    w, b = (nn.Parameter(normal(n).double()) for n in (6, 3))
    matrix, mixed, linear = normal(6, 6, seed=2).double(), normal(6, 3, seed=3).double(), normal(3, seed=4).double()

    def loss() -> torch.Tensor:
        return w @ matrix @ w + (w @ mixed @ b) + linear @ b

    expected = torch.cat(torch.autograd.grad(loss(), [w, b]))
    start, total, updates = [w.detach().clone(), b.detach().clone()], torch.zeros(9, dtype=torch.float64), 1500
    mezo = estimator(w, b)
    with torch.no_grad():
        for update in range(updates):
            _, (mean_loss,) = mezo.look(lambda: (None, (loss(),)), ((0, update, 7),), 1.0)
            assert torch.equal(w, start[0]) and torch.equal(b, start[1])
            mezo.step()
            total += torch.cat([start[0] - w, start[1] - b])
            w.copy_(start[0])
            b.copy_(start[1])
    spread = float(expected.norm()) / updates**0.5  # approximate standard error of each coordinate
    assert float((total / updates - expected).abs().max()) < 5 * spread < 0.2 * float(expected.norm())
    assert mean_loss.isfinite()


def test_micro_batches_and_tasks_are_summed_and_clipping_bounds_the_norm():
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(12))
    mezo = estimator(p, q, distance=0.5)
    mezo._takes_part = lambda only, key: [p] if only else [p, q]
    for number, only in enumerate((True, False)):
        mezo.look(lambda: (None, (p.sum(), q.sum())), (only, (0, 3, number)), 0.5)
    z = mezo._direction(p), mezo._direction(q)
    in_p, both = 0.5 * float(z[0].sum()), 0.5 * float(z[0].sum() + z[1].sum())
    assert mezo.slopes[p] == pytest.approx(in_p + both, rel=1e-4) and mezo.slopes[q] == pytest.approx(both, rel=1e-4)
    norm = (4 * mezo.slopes[p] ** 2 + 12 * mezo.slopes[q] ** 2) ** 0.5
    assert mezo.clip(norm / 4) == pytest.approx(norm) and mezo.clip(10 * norm) == pytest.approx(norm / 4)


def test_weights_are_restored_if_a_forward_pass_fails():
    p = nn.Parameter(normal(1000) * 1e-6)
    before, mezo = p.detach().clone(), estimator(p, distance=0.1)

    def broken():
        assert not torch.equal(p, before)
        raise MemoryError

    with pytest.raises(MemoryError):
        mezo.look(broken, ((0, 1),), 1.0)
    assert torch.equal(p, before) and not mezo.slopes


def test_both_forward_passes_keep_the_same_tokens_and_experts():
    images, kept = normal(4, 3, 16, 16), []
    model = make_model(moe_blocks=(1, 3), gate_noise=1.0).train()
    scale_routers(model, 50.0)
    with torch.no_grad():
        for shared in (True, False):
            with deciding_once():
                first = model(images, "one", (0, 0, 0))
                for parameter in model.vit.parameters():
                    parameter.mul_(1.3)
                if shared:
                    second = model(images, "one", (0, 0, 0))
            if not shared:
                second = model(images, "one", (0, 0, 0))
            for parameter in model.vit.parameters():
                parameter.div_(1.3)
            same = torch.equal(first.records[1].dropped.origin, second.records[1].dropped.origin)
            kept.append(same and all(torch.equal(first.routing[i].experts, second.routing[i].experts) for i in (1, 3)))
            assert not torch.equal(first.logits, second.logits)
    assert kept == [True, False]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, step) -> None:
        self.values.append(step.metrics["loss"])


def test_a_run_learns_and_an_update_leaves_the_other_tasks_head(tmp_path):
    config = make_config(
        tmp_path,
        **MEZO | {"train__steps": 300, "train__checkpoint_every": 300},
        plan__train_blocks=[],
        plan__moe_blocks=[],
        train__lr=0.3,
        train__weight_decay=0.0,
        data__augment=False,
        data__feature_cache_mb=100,
    )
    trainer = make_trainer(config, tmp_path / "run", [losses := Losses()])
    before = state_of(trainer.model)
    batches = trainer.batches()
    trainer.take(batches, 0, 0.3)
    batches.close()
    moved = {name for name, value in state_of(trainer.model).items() if not torch.equal(value, before[name])}
    task = trainer.sampler.tasks(0)[0]
    assert moved == {f"heads.{task}.weight", f"heads.{task}.bias"}
    trainer.model.load_state_dict(before)
    report = trainer.fit()
    chance = (math.log(10) + math.log(12)) / 2
    assert fmean(losses.values[:20]) == pytest.approx(chance, abs=0.05)
    assert fmean(losses.values[-60:]) < chance - 0.08
    assert report["status"] == "finished"


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, monkeypatch):
    config = make_config(
        tmp_path, **MEZO, train__ema_decay=0.9, train__grad_accumulation_steps=2, sampler__kind="joint"
    )
    whole = make_trainer(config, tmp_path / "whole")
    start = state_of(whole.model)
    whole.fit()
    resumed = crashed_and_resumed(monkeypatch, config, tmp_path / "run")
    assert any("resumed from" in line for line in resumed.about)
    ours, theirs = whole.state.state_dict(), resumed.state.state_dict()
    assert ours["optimizer"] == {} == theirs["optimizer"]
    for group in ("weights", "average"):
        assert ours[group].keys() == theirs[group].keys()
        assert [name for name, value in ours[group].items() if not torch.equal(value, theirs[group][name])] == []
    assert any(not torch.equal(value, start[name]) for name, value in ours["weights"].items())
    assert all(p.grad is None for p in whole.model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"plan__train_blocks": "all", "plan__train_weights": "bias", "plan__drop_blocks": []},
        {"plan__train_blocks": [1, 3], "plan__moe_blocks": [1, 3]},
        {"plan__train_blocks": [], "adapter": {"kind": "lora", "rank": 4}},
    ],
    ids=["bias", "moe", "lora"],
)
def test_an_update_needs_the_predicted_memory_and_keeps_nothing(changes):
    plan = {"plan__moe_blocks": [], "plan__drop_blocks": [1, 2], "moe__num_experts": 4, "moe__top_k": 2}
    settings = {"runtime__device": "cpu", "runtime__precision": "fp32", "runtime__threads": 1}
    config = configuration.replace(Config(), **plan | settings | changes, train__optimizer="mezo")
    model = MultitaskViT(make_vit(), config, CLASSES)
    predicted = predict(model, config, batch=16, precision="fp32", task="two")
    measured = measure(training_step(model, config, prepare(config.runtime), batch=16, task="two"))
    assert predicted.kept == measured.kept < 100
    assert predicted.gradients == measured.gradients == predicted.optimizer == measured.optimizer == 0
    assert predicted.step_flops == 2 * predicted.forward_flops
    assert predicted.peak - predicted.parameters == pytest.approx(max(measured.peaks.values()), rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__step_in_backward": True, "train__grad_clip_norm": None}, "train.step_in_backward = True: false with"),
        ({"train__grad_clip_per": "parameter"}, "train.grad_clip_per = 'parameter': model with train.optimizer = mezo"),
        (
            {"train__task_weighting": "pcgrad", "sampler__kind": "joint"},
            "train.task_weighting = 'pcgrad': fixed or uncertainty with",
        ),
        (
            {"train__expert_decay": "mean"},
            "train.expert_decay = 'mean': null, zero or none with train.optimizer = mezo",
        ),
        ({"train__mezo_distance": 0.0}, "train.mezo_distance = 0.0: above 0"),
    ],
)
def test_settings_that_need_gradients_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        configuration.replace(Config(), train__optimizer="mezo", **changes)
    assert message in str(error.value)


def test_several_processes_are_refused():
    ranks = SimpleNamespace(world=2, require_same=lambda values: None)
    with pytest.raises(ConfigError, match="train.optimizer = 'mezo': adamw, adamw8 or sgd with several processes"):
        check_sharing(configuration.replace(Config(), train__optimizer="mezo"), ranks)
