"""Mixed images, class weights and task weights: against slow formulas, and in resumed runs."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import make_model, normal
from tiny_runs import crashed_and_resumed, make_config, make_trainer, watch
from tiny_tasks import CPU

from moe_bsr.config import ConfigError, TrainConfig, replace
from moe_bsr.data.loader import Batch
from moe_bsr.training.class_weights import balanced
from moe_bsr.training.mixing import Mixing
from moe_bsr.training.optim import learning_rate, make_optimizer
from moe_bsr.training.pcgrad import PCGrad, projected
from moe_bsr.training.update import accumulate, multitask_update

pytestmark = pytest.mark.usefixtures("bare")
IMAGES = normal(8, 3, 16, 16)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1])


def batch() -> Batch:
    return Batch("one", np.arange(8), IMAGES.clone(), LABELS)


# --- mixing ---


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_proportions_of_the_images(kind):
    mixed = Mixing(TrainConfig(**{kind: 1.0}), {"one": 3})(batch(), (0, 5, 1))
    one_hot = torch.nn.functional.one_hot(LABELS, 3).float()
    if kind == "mixup":
        difference = IMAGES - IMAGES.flip(0)
        share = float(((mixed.images - IMAGES.flip(0)) * difference).sum() / difference.square().sum())
        torch.testing.assert_close(mixed.images, share * IMAGES + (1 - share) * IMAGES.flip(0))
    else:
        own, other = mixed.images == IMAGES, mixed.images == IMAGES.flip(0)
        assert bool((own | other).all()) and bool(own.any()) and bool(other.any())
        share = float(own.float().mean())
    assert 0 < share < 1
    torch.testing.assert_close(mixed.targets, share * one_hot + (1 - share) * one_hot.flip(0), rtol=0, atol=1e-5)
    assert torch.equal(mixed.labels, mixed.targets.argmax(1))


def test_mixing_depends_only_on_its_key():
    mixing = Mixing(TrainConfig(mixup=0.4, cutmix=1.0), {"one": 3})
    np.random.seed(7)
    first = mixing(batch(), (0, 5, 1))
    expected = np.random.rand()
    again, other = mixing(batch(), (0, 5, 1)), mixing(batch(), (0, 5, 2))
    assert torch.equal(first.images, again.images) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)
    np.random.seed(7)
    assert np.random.rand() == expected  # the global generator is unaffected


# --- classes ---


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_loss_is_the_weighted_smoothed_cross_entropy_of_mixed_labels(micro_batches):
    settings = TrainConfig(label_smoothing=0.1, mixup=0.5)
    weights, model = torch.tensor([0.5, 3.0, 1.25]), make_model()
    update = multitask_update(model, settings, CPU, make_optimizer(model, settings), None, {"one": weights})
    mix, mixed_parts = Mixing(settings, {"one": 3}), []

    def recording_mix(part, key):
        mixed_parts.append(mix(part, key))
        return mixed_parts[-1]

    result = accumulate(
        update, batch(), micro_batches, share=1.0, noise_key=(0, 0), prepare=lambda part: part, mix=recording_mix
    )
    total = 0.0
    for part in mixed_parts:
        logs = model(part.images, "one").logits.log_softmax(1)
        for row, targets in zip(logs.tolist(), part.targets.tolist(), strict=True):
            smooth = [0.9 * share + 0.1 / 3 for share in targets]
            total -= sum(w * t * log for w, t, log in zip(weights.tolist(), smooth, row, strict=True))
    assert result.loss == pytest.approx(total / 8, rel=1e-5)


def test_balanced_weights_give_every_class_the_same_total():
    labels = np.repeat([0, 1, 3], [1, 3, 8])
    weights = balanced(labels, 4).double().numpy()
    assert weights[2] == 0
    assert np.bincount(labels, weights[labels], 4)[[0, 1, 3]] == pytest.approx([4, 4, 4])
    assert weights[labels].mean() == pytest.approx(1)


# --- tasks ---


def slow_pcgrad(gradients: list[torch.Tensor], orders: list[list[int]]) -> torch.Tensor:
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        own = gradients[i].clone()
        for j in order:
            if j != i and own @ gradients[j] < 0:
                own -= (own @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += own
    return total


def test_conflicting_gradients_are_projected_as_in_the_paper(monkeypatch):
    orders = [[2, 1, 0, 3], [0, 3, 1, 2], [3, 0, 2, 1], [1, 2, 3, 0]]

    class Given:
        def __init__(self, row):
            self.row = row

        def permutation(self, count):
            return np.array(orders[self.row])

    monkeypatch.setattr("moe_bsr.training.pcgrad.stream", lambda key, row: Given(row))
    gradients = list(normal(4, 12, seed=4).double() - 0.4 * normal(1, 12, seed=5).double())
    products = torch.stack(gradients) @ torch.stack(gradients).T
    assert (products < 0).any()
    scales = projected(products, (0, 0))
    expected = slow_pcgrad(gradients, orders)
    torch.testing.assert_close(sum(s * g for s, g in zip(scales, gradients, strict=True)), expected)
    assert not torch.allclose(expected, sum(gradients))


def test_gradients_without_conflict_and_of_a_single_task_are_unchanged():
    shared, lone = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    pcgrad = PCGrad()
    for values, parameters in (([1.0, 2.0, 0.0], [shared, lone]), ([2.0, -0.5, 0.0], [shared])):
        for parameter in parameters:
            parameter.grad = torch.tensor(values)
        pcgrad.keep(parameters)
    assert pcgrad.combine((0, 0)) == [shared, lone]
    assert shared.grad.tolist() == [3.0, 1.5, 0.0] and lone.grad.tolist() == [1.0, 2.0, 0.0]


PLAIN = {"train__optimizer": "sgd", "train__momentum": 0.0, "train__weight_decay": 0.0, "train__warmup_steps": 0}
PLAIN |= {"train__steps": 2, "train__lr": 0.5, "train__grad_clip_norm": None, "train__evaluate_test": False}


def test_learned_weights_follow_the_gradient_of_kendalls_loss(tmp_path):
    config = make_config(
        tmp_path, **PLAIN, train__task_weighting="uncertainty", sampler__kind="joint", moe__balance_loss="none"
    )
    trainer, snapshots = watch(config, tmp_path / "run")
    model = copy.deepcopy(trainer.model).train()
    expected = {task: torch.zeros((), requires_grad=True) for task in trainer.tasks}
    batches = list(trainer.inputs.batches(trainer.sampler.batches()))
    trainer.fit()
    for step in range(2):  # from the model before this update
        model.load_state_dict(snapshots.states[len(trainer.sampler.tasks(0)) * step])
        of_step = trainer.sampler.tasks(step)
        for drawn in batches[len(of_step) * step : len(of_step) * (step + 1)]:
            drawn = trainer.inputs.prepare(drawn)
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(model(drawn.images, drawn.task, (0, 0)).logits, drawn.labels)
            s = expected[drawn.task]
            (gradient,) = torch.autograd.grad((loss / s.exp() + s / 2) / len(of_step), s)
            expected[drawn.task] = (s - learning_rate(config.train, step) * gradient).detach().requires_grad_()
    for task, value in expected.items():
        found = snapshots.states[-1][f"log_variances.{task}"]
        torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-5)


def test_pcgrad_without_conflict_equals_the_joint_update(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr("moe_bsr.training.pcgrad.projected", lambda products, key: [1.0] * len(products))
    for weighting in ("fixed", "pcgrad"):
        config = make_config(tmp_path, **PLAIN, train__task_weighting=weighting, sampler__kind="joint")
        trainer, snapshots = watch(config, tmp_path / weighting)
        trainer.fit()
        ends.append(snapshots.states[-1])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


# --- all of them in a resumed run ---

EVERYTHING = {
    "data__auto_augment": "rand-m9-mstd0.5-inc1",
    "data__color_jitter": 0.4,
    "data__erasing": 0.25,
    "train__mixup": 0.2,
    "train__cutmix": 1.0,
    "train__label_smoothing": 0.1,
    "train__class_weights": "balanced",
    "train__grad_accumulation_steps": 2,
    "train__task_weighting": "uncertainty",
    "train__checkpoint_every": 1,
    "sampler__classes": "balanced",
    "train__steps": 3,
    "train__evaluate_test": False,
    "plan__moe_blocks": [5],
}


@pytest.mark.parametrize("reduce", ["drop", "merge"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, monkeypatch, reduce):
    config = make_config(tmp_path, **EVERYTHING, tokens__reduce=reduce)
    whole = make_trainer(config, tmp_path / "whole")
    whole.fit()
    ahead = replace(config, data__prefetch=2)
    again = crashed_and_resumed(monkeypatch, config, tmp_path / "run", ahead)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__mixup": 0.2, "data__augment": False, "data__feature_cache_mb": 10},
            "train.mixup = 0.2: 0 with d",
        ),
        ({"data__erasing": 0.2, "data__augment": False}, "data.augment = False: true with data.erasing"),
        ({"data__color_jitter": 2.0}, "data.color_jitter = 2.0: null or 0 to 1"),
        ({"train__cutmix": 1.0, "train__batch_size": 6, "train__grad_accumulation_steps": 2}, "even number of images"),
        ({"train__task_weighting": "pcgrad"}, "needs sampler.kind = joint"),
        ({"train__task_weighting": "uncertainty", "mode": "single_task"}, "fixed with mode = single_task"),
        ({"train__task_weighting": "uncertainty", "train__task_weights": {"shapes": 2.0}}, "which learns them"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **changes)
