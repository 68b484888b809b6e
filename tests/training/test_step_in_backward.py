"""Optimizer steps within the backward pass: bitwise equal weights, no gradients in memory, and refused settings."""

import re

import pytest
import torch
from tiny_models import CLASSES, make_vit
from tiny_runs import crashed_and_resumed, make_config, make_trainer, state_of

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import measure
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import prepare
from moe_bsr.training.callback import Callback
from moe_bsr.training.optim import make_optimizer
from moe_bsr.training.update import training_step

pytestmark = pytest.mark.usefixtures("bare")

UNCLIPPED = {
    "train__grad_clip_norm": None,
    "train__evaluate_test": False,
    "train__steps": 3,
    "train__checkpoint_every": 2,
}
CHANGES = {
    "adamw": {"train__ema_decay": 0.9, "train__layer_decay": 0.8, "moe__gate_noise": 0.5},
    "adamw8": {"train__optimizer": "adamw8", "storage": "recompute"},
    "sgd": {"train__optimizer": "sgd", "plan__train_blocks": [2], "plan__moe_blocks": [], "adapter": "lora"},
    "clipped": {"train__grad_clip_norm": 0.01, "train__grad_clip_per": "parameter"},
    "clipped-blocks": {"train__grad_clip_norm": 0.03, "train__grad_clip_per": "block", "storage": "recompute"},
    "clipped-ladder": {
        "train__grad_clip_norm": 0.01,
        "train__grad_clip_per": "block",
        "plan__train_blocks": [],
        "plan__moe_blocks": [],
        "adapter": "ladder",
    },
}


class Norms(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, step) -> None:
        self.values.append(step.metrics["gradient_norm"])


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_weights_are_bitwise_equal_to_those_of_ordinary_updates(changes, tmp_path):
    states, norms = [], []
    for within in (False, True):
        config = make_config(tmp_path, **UNCLIPPED | changes, train__step_in_backward=within)
        trainer = make_trainer(config, tmp_path / str(within), [recorder := Norms()])
        trainer.fit()
        states.append(state_of(trainer.model) | trainer.state.state_dict()["optimizer"])
        norms.append(recorder.values)
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def block_of(name: str) -> str:
    """Return the clipping group of a parameter, derived from its name."""
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    return block[1] if block else "top" if re.match(r"heads|vit\.norm|log_var", name) else "embedding"


@pytest.mark.parametrize("per", ["block", "parameter"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8", "sgd"])
def test_clipping_per_group_equals_torch_after_a_plain_backward_pass(optimizer, per):
    limit, clipped = {"block": 0.2, "parameter": 0.01}[per], []
    config = configuration.replace(Config(), train__optimizer=optimizer, train__lr=0.1, train__grad_clip_norm=limit)
    config = configuration.replace(config, train__grad_clip_per=per, train__step_in_backward=True)
    plan = {"plan__train_blocks": "all", "plan__drop_blocks": [1], "plan__moe_blocks": [1, 3]}
    config = configuration.replace(config, **plan, runtime__device="cpu", runtime__threads=1)
    ours, reference = (MultitaskViT(make_vit(), config, CLASSES) for _ in range(2))
    step = training_step(ours, config, prepare(config.runtime), batch=3)
    batch, _ = step.inputs
    reference.train()
    torch_optimizer = make_optimizer(reference, config.train)
    for _ in range(3):
        step.forward()
        step.backward()
        norm = step.step()
        step.clear()
        output = reference(batch.images, batch.task, (0, 0, 0))
        loss = torch.nn.functional.cross_entropy(output.logits, batch.labels) + output.auxiliary_loss
        loss.backward()
        reference.commit(output, batch.task)
        groups: dict[str, list[torch.nn.Parameter]] = {}
        names = {p: name for name, p in reference.named_parameters()}
        for p in (p for group in torch_optimizer.param_groups for p in group["params"] if p.grad is not None):
            groups.setdefault(block_of(names[p]) if per == "block" else names[p], []).append(p)
        norms = torch.stack([torch.nn.utils.clip_grad_norm_(group, limit) for group in groups.values()])
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        assert norm == pytest.approx(float(norms.norm()), rel=1e-6)
        clipped.append(sum(norms > limit))
    assert 0 < clipped[0] < len(groups) and (per == "parameter" or len(groups) == 6)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clipping", [{}, CHANGES["clipped-blocks"]], ids=["unclipped", "clipped"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(clipping, tmp_path, monkeypatch):
    changes = UNCLIPPED | clipping
    config = make_config(tmp_path, **changes, train__step_in_backward=True, train__optimizer="adamw8")
    whole = make_trainer(config, tmp_path / "whole")
    whole.fit()
    resumed = crashed_and_resumed(monkeypatch, config, tmp_path / "run")
    assert any("resumed from" in line for line in resumed.about)
    ours, theirs = whole.state.state_dict(), resumed.state.state_dict()
    for group in ("weights", "optimizer"):
        assert ours[group].keys() == theirs[group].keys()
        assert [name for name, value in ours[group].items() if not torch.equal(value, theirs[group][name])] == []


def test_memory_without_gradients_and_with_8_bit_moments_is_as_predicted():
    """With experts in every block, nearly all of the memory is weights, gradients and moments."""
    plan = {"plan__train_blocks": "all", "plan__drop_blocks": [], "plan__moe_blocks": [0, 1, 2, 3]}
    config = configuration.replace(
        Config(), **plan, runtime__device="cpu", runtime__precision="fp32", runtime__threads=1
    )
    lean = {"train__step_in_backward": True, "train__optimizer": "adamw8"}
    by_part = [lean | {"train__grad_clip_per": per} for per in ("block", "parameter")]
    peaks = []
    for changes in ({}, *by_part):
        changed = configuration.replace(config, **changes)
        model = MultitaskViT(make_vit(), changed, CLASSES)
        predicted = predict(model, changed, batch=2, precision="fp32", task="two")
        measured = measure(training_step(model, changed, prepare(changed.runtime), batch=2, task="two"))
        assert (predicted.gradients, predicted.optimizer) == (measured.gradients, measured.optimizer)
        assert max(predicted.transients.values()) == pytest.approx(max(measured.transients.values()), rel=0.1)
        peaks.append((predicted.peak - predicted.parameters) / predicted.parameters)
    assert peaks[0] > 3 and peaks[1] < 1.95 and peaks[2] < 1.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"train\.grad_clip_norm = 1\.0: null, or train\.grad_clip_per = block or parameter, with train\.step",
        ),
        (
            {"train__grad_clip_norm": None, "train__grad_accumulation_steps": 2},
            r"train\.grad_accumulation_steps = 2: 1 with train\.step_in_backward",
        ),
        (
            {"train__grad_clip_norm": None, "sampler__kind": "joint"},
            r"train\.step_in_backward = True: false with sampler\.kind = joint",
        ),
    ],
    ids=["clipping", "micro-batches", "tasks"],
)
def test_settings_that_need_all_gradients_first_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        configuration.replace(Config(), train__step_in_backward=True, **changes)
