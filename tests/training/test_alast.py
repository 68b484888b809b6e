"""ALaST: full fine-tuning as a special case, which blocks move, budgets by their definition and per task, resumed runs
that are bitwise equal, and predicted peak memory."""

import json
from collections import Counter
from itertools import combinations, permutations
from math import ceil, prod
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CLASSES, make_vit
from tiny_runs import crashed_and_resumed, make_config, make_trainer

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import measure
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.probe import probe_config
from moe_bsr.cost import predict as prediction
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import prepare
from moe_bsr.training import alast, drawn_blocks
from moe_bsr.training.callback import Callback
from moe_bsr.training.update import training_step

pytestmark = pytest.mark.usefixtures("bare")

FULL = {
    "plan__train_blocks": "all",
    "plan__drop_blocks": [],
    "plan__moe_blocks": [],
    "tokens__fuse": "none",
    "train__evaluate_test": False,
    "train__steps": 6,
    "train__checkpoint_every": 2,
    "train__weight_decay": 0.1,
    "train__grad_accumulation_steps": 2,
    "backbone__image_size": 64,
}
ALAST = FULL | {"train__alast": {"blocks": 3, "budget": 0.8, "budget_lr": 0.02}}


class UpdateRecorder(Callback):
    """Records each update of a run: task, budgets, drawn blocks, parameters that moved, and tokens left."""

    def __init__(self) -> None:
        self.updates: list[SimpleNamespace] = []

    def on_start(self, start) -> None:
        self.model = start.model
        self.before = self.values()

    def values(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights and of the optimizer's state."""
        state = self.trainer.state.state_dict()
        tensors = dict(self.model.named_parameters()) | state["optimizer"]
        return {name: value.detach().clone() for name, value in tensors.items()}

    def on_step(self, step) -> None:
        after, alast = self.values(), self.trainer.updates.schedule
        budgets = list(alast.budgets[step.task])  # a copy, because the trainer changes the list later
        moved = {
            name for name, value in after.items() if not torch.equal(value, self.before.get(name, torch.tensor(0)))
        }
        left = [
            {index: record.dropped.origin.shape[1] for index, record in output.records.items()}
            for output in step.outputs
        ]
        update = SimpleNamespace(task=step.task, budgets=budgets, moved=moved, left=left, metrics=step.metrics)
        update.drawn = alast.draw(step.step - 1, step.task)
        update.distances = [[float(d) for d in of_block] for of_block in alast._seen]
        self.updates.append(update)
        self.before = after


class Metrics(Callback):
    def __init__(self) -> None:
        self.lines: list[dict] = []

    def on_step(self, step) -> None:
        self.lines.append({"task": step.task} | step.metrics)


def run(config: Config, folder, callback: Callback):
    callback.trainer = make_trainer(config, folder, [callback])
    callback.trainer.fit()
    return callback.trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its configuration, trainer and updates."""
    folder = tmp_path_factory.mktemp("alast")
    config = make_config(folder, **ALAST)
    return config, run(config, folder / "run", seen := UpdateRecorder()), seen.updates


def assert_alike(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_with_all_blocks_and_all_tokens_it_equals_full_fine_tuning(tmp_path):
    small = {"train__steps": 3, "train__grad_accumulation_steps": 1, "backbone__image_size": 32}
    config = make_config(tmp_path, **FULL | small)
    everything = configuration.replace(config, train__alast={"blocks": 6, "min_budget": 1.0})
    plain = run(config, tmp_path / "plain", plain_metrics := Metrics()).state.state_dict()
    alast = run(everything, tmp_path / "alast", alast_metrics := Metrics()).state.state_dict()
    for group in ("weights", "optimizer"):
        assert_alike(plain[group], alast[group])
    budgets = {f"budget_{block}": 1.0 for block in range(6)}
    assert alast_metrics.lines == [line | budgets for line in plain_metrics.lines]


def test_only_drawn_blocks_and_their_optimizer_state_change(whole):
    """Any update would move a weight, if only by weight decay or momentum."""
    _, trainer, updates = whole
    layers, depth = trainer.model.layers(), len(trainer.model.plan)
    names = {name: layers[id(p)] for name, p in trainer.model.named_parameters()}
    drawn = set()
    for update in updates:
        assert len(set(update.drawn)) == 3
        trains = {depth + 1, *(block + 1 for block in update.drawn), *([0] if 0 in update.drawn else [])}
        head = f"heads.{update.task}."
        expected = {n for n, layer in names.items() if layer in trains and ("heads." not in n or n.startswith(head))}
        assert update.moved & names.keys() == expected
        assert {name.rpartition("/")[0] for name in update.moved - names.keys()} == expected
        drawn |= set(update.drawn)
    assert drawn == set(range(depth)) and any(0 not in update.drawn for update in updates)
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())


def test_budgets_follow_their_definition_per_task(whole):
    _, trainer, updates = whole
    limited = set()
    for task in trainer.tasks:
        budgets, before = [0.8] * 6, None
        for update in (each for each in updates if each.task == task):
            assert update.budgets == pytest.approx(budgets, rel=1e-6)
            assert [update.metrics[f"budget_{block}"] for block in range(6)] == update.budgets
            assert all(len(parts) == 2 for parts in update.distances)  # of two micro-batches of equal size
            now = [sum(parts) / 2 for parts in update.distances]
            grown = [0.0] * 6 if before is None else [0.02 * (n - b) for n, b in zip(now, before, strict=True)]
            budgets = [min(1.0, max(0.5, budget + by)) for budget, by in zip(budgets, grown, strict=True)]
            before, limited = now, limited | {budget for budget in budgets if budget in (0.5, 1.0)}
        assert trainer.updates.schedule.budgets[task] == pytest.approx(budgets, rel=1e-6)
    one, other = trainer.updates.schedule.budgets.values()
    assert not set(one) & set(other) - limited


def test_distances_equal_those_of_plain_blocks_and_only_training_drops_tokens(whole):
    _, trainer, updates = whole
    for update in updates:
        left, expected = 16, {}
        for index, budget in enumerate(update.budgets[:-1]):
            if (kept := ceil(budget * left)) < left:
                expected[index] = left = kept
        assert update.left == [expected] * 2 and left < 16
    model, images = trainer.model.eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert model(images, "shapes").records == {}  # evaluation drops no tokens
        with drawn_blocks.following(model) as seen:
            model(images, "shapes")
        x, expected = model.family.embed(model.vit, images).x, []
        for block in model.vit.blocks:
            y = x + block.attn(block.norm1(x))[0]
            y = y + block.mlp(block.norm2(y))
            expected.append(float((y[:, 0] - x[:, 0]).square().sum(1).mean()))
            x = y
    assert [float(d) for parts in seen for d in parts] == pytest.approx(expected, rel=1e-4)
    assert "run_block" not in vars(model)


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    config, trainer, _ = whole
    resumed = crashed_and_resumed(monkeypatch, config, tmp_path / "run")
    assert any("resumed from" in line for line in resumed.about)
    for group in ("weights", "optimizer"):
        assert_alike(trainer.state.state_dict()[group], resumed.state.state_dict()[group])
    assert resumed.updates.schedule.state() == trainer.updates.schedule.state()


def test_updates_that_are_only_timed_draw_blocks_anew(whole, tmp_path, monkeypatch):
    trainer, drawn = make_trainer(whole[0], tmp_path / "run"), []
    alast, batches = trainer.updates.schedule, trainer.batches()
    draw = type(alast).draw
    monkeypatch.setattr(type(alast), "draw", lambda self, step, task: drawn.append(step) or draw(self, step, task))
    for step in range(3):
        trainer.take(batches, step, 0.0)
    batches.close()
    assert sorted(set(drawn)) == [0, 1, 2]


def test_a_trial_update_leaves_the_budgets_and_an_invalid_state_is_refused(whole, tmp_path):
    trainer = make_trainer(whole[0], tmp_path / "run")
    alast, batches = trainer.updates.schedule, trainer.batches()
    before = json.dumps(alast.state())
    trainer.take(batches, 0, 0.0)
    batches.close()
    assert json.dumps(alast.state()) == before
    good = whole[1].updates.schedule.state()
    for broken in (
        {"budgets": 5},
        {"budgets": {"shapes": good["budgets"]["shapes"]}},
        {"budgets": good["budgets"] | {"shapes": [2.0] * 6}},
        {"moved": {"shapes": [float("nan")] * 6}},
        {"moved": {"others": [1.0] * 6}},
        {"moved": {"shapes": [1.0] * 5}},
    ):
        with pytest.raises(ValueError, match="no budgets of 2 tasks and 6 blocks"):
            alast.restore(good | broken)


def test_blocks_are_drawn_without_replacement_in_proportion_to_budgets(whole):
    alast = make_trainer(whole[0], whole[1].folder.parent / "draws").updates.schedule
    weights = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    alast.budgets["shapes"] = weights
    draws = [frozenset(alast.draw(step, "shapes")) for step in range(2000)]
    assert draws[:50] == [frozenset(alast.draw(step, "shapes")) for step in range(50)]
    expected = Counter()
    for order in permutations(range(6), 3):
        left = [sum(weights) - sum(weights[block] for block in order[:place]) for place in range(3)]
        expected[frozenset(order)] += prod(weights[b] / rest for b, rest in zip(order, left, strict=True))
    counts = Counter(draws)
    for block in range(6):
        share = sum(p for drawn, p in expected.items() if block in drawn)
        assert sum(block in drawn for drawn in draws) / 2000 == pytest.approx(share, abs=4 * 0.5 / 2000**0.5)
    assert sum((counts[d] / 2000 - p) ** 2 for d, p in expected.items()) < 2 / 2000


# --- memory ---

PLAN = {key: value for key, value in FULL.items() if key.startswith(("plan", "tokens"))}
ALONE = {"runtime__device": "cpu", "runtime__precision": "fp32", "runtime__threads": 1}


def test_the_predicted_peak_is_that_of_the_costliest_draw(monkeypatch):
    config = configuration.replace(Config(), **PLAN, **ALONE, train__alast__blocks=2)
    model, about = MultitaskViT(make_vit(), config, CLASSES), {"batch": 16, "precision": "fp32", "task": "two"}
    predicted = prediction.predict(model, config, **about)
    peaks = {}
    for blocks in combinations(range(4), 2):
        with monkeypatch.context() as patch:
            patch.setattr(drawn_blocks, "costliest", lambda *_, blocks=blocks: blocks)
            peaks[blocks] = prediction.predict(model, config, **about).peak
    assert predicted.peak == max(peaks.values()) > min(peaks.values())

    step = training_step(model, config, prepare(config.runtime), batch=16, task="two")
    found = measure(step)
    assert (predicted.gradients, predicted.optimizer, predicted.kept) == (found.gradients, found.optimizer, found.kept)
    limit = predicted.peak - predicted.parameters - predicted.optimizer
    assert limit == pytest.approx(max(found.peaks.values()), rel=0.03)
    for blocks, budgets in (([0, 3], [0.9] * 4), ([0, 1], [1.0, 0.99, 0.5, 0.5])):
        with drawn_blocks.drawn(model, blocks, budgets):
            assert max(measure(step).peaks.values()) <= limit
    assert prediction.predict(model, config, **about) == predicted and all(p.requires_grad for p in model.parameters())


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan__train_blocks": [1, 2]}, "plan.train_blocks = [1, 2]: all with train.alast.blocks = 2: each"),
        ({"plan__train_weights": "bias"}, "plan.train_weights = 'bias': all with"),
        ({"plan__drop_blocks": [1]}, "plan.drop_blocks = [1]: [] with"),
        ({"plan__moe_blocks": [1]}, "plan.moe_blocks = [1]: [] with"),
        ({"adapter": "lora"}, "adapter = 'lora': null with"),
        ({"tokens__fuse": "raw"}, "tokens.fuse = 'raw': none with"),
        ({"tokens__fuse": "raw", "tokens__reduce": "merge"}, "tokens.reduce = 'merge': drop with"),
        ({"sampler__kind": "joint"}, "sampler.kind = 'joint': another with"),
        ({"train__optimizer": "mezo"}, "train.optimizer = 'mezo': adamw, adamw8 or sgd with"),
        ({"train__only": ["a"], "train__init_from": "run"}, "train.only = ['a']: null with"),
        ({"train__step_in_backward": True, "train__grad_clip_norm": None}, "train.step_in_backward = True: false with"),
        ({"train__alast__min_budget": 0.0}, "train.alast.min_budget = 0.0: above 0"),
        ({"train__alast__budget": 0.4}, "train.alast.budget = 0.4: train.alast.min_budget = 0.5 to 1"),
        ({"train__alast__budget_lr": -1.0}, "train.alast.budget_lr = -1.0: null (train.lr) or above 0"),
    ],
)
def test_incompatible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        configuration.replace(Config(), **PLAN | {"train__alast__blocks": 2} | changes)
    assert message in str(error.value)


def test_too_many_blocks_no_class_token_and_several_processes_are_refused():
    config = configuration.replace(Config(), **PLAN, train__alast__blocks=5)
    with pytest.raises(ConfigError, match="train.alast.blocks = 5: at most the 4 blocks"):
        alast.check(MultitaskViT(make_vit(), config, CLASSES), config)
    config.train.alast.blocks = 2
    with pytest.raises(ConfigError, match="train.alast.blocks = 2: null: .* has no class token"):
        alast.check(MultitaskViT(make_vit("average-pool"), config, CLASSES), config)
    with pytest.raises(ConfigError, match="train.alast.blocks = 2: null with several processes"):
        alast.schedule_of(None, config, SimpleNamespace(world=2))


def test_a_probe_configuration_disables_alast():
    config = configuration.replace(Config(), **PLAN, train__alast__blocks=5)
    assert probe_config(config).train.alast.blocks is None
