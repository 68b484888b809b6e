"""The optimizer update: its phases by their definition, and the same result from all its users."""

import math

import numpy as np
import pytest
import torch
from tiny_models import make_model, normal
from torch import nn

from moe_bsr.config import Config, RuntimeConfig, TrainConfig
from moe_bsr.data.loader import Batch
from moe_bsr.runtime.device import prepare
from moe_bsr.training.optim import MovingAverage, make_optimizer
from moe_bsr.training.update import (
    OptimizerUpdate,
    TrainingStep,
    accumulate,
    multitask_update,
    split,
    task_weights,
    training_step,
)

RUNTIME = prepare(RuntimeConfig(device="cpu", precision="fp32"))


def make_update(**options) -> tuple[nn.Module, OptimizerUpdate]:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = options.pop("loss", lambda output, x: output.square().mean())
    return model, OptimizerUpdate(model, RUNTIME, optimizer, output=model, loss=loss, **options)


def test_micro_batches_give_the_gradient_of_the_weighted_sum():
    model, update = make_update()
    expected, _ = make_update()
    parts, shares = [normal(4, 3, seed=1), normal(4, 3, seed=2)], [0.25, 0.75]
    loss = sum(share * expected(x).square().mean() for x, share in zip(parts, shares, strict=True))
    loss.backward()
    for x, share in zip(parts, shares, strict=True):
        update.forward(x, share=share)
        update.backward()
    assert update.trained == list(model.parameters())
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert update.step() is None
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach() - 0.5 * theirs.grad)
        assert ours.grad is None


def test_terms_of_a_loss_are_summed_and_kept_separately():
    _, update = make_update(loss=lambda output, x: (output.square().mean(), output.sum()))
    update.forward(normal(4, 3))
    assert update.loss == update.terms[0] + update.terms[1]
    update.backward()
    assert update.loss is None and update.terms is None and update.output is not None
    update.clear()
    assert update.output is None


def test_commit_is_called_once_per_micro_batch_with_its_inputs():
    committed = []
    _, update = make_update(commit=lambda output, x: committed.append(x))
    parts = [normal(4, 3, seed=seed) for seed in range(3)]
    for x in parts:
        update.forward(x)
        update.backward()
    update.step()
    assert all(a is b for a, b in zip(committed, parts, strict=True))


@pytest.mark.parametrize("limit", [math.inf, 0.1])
def test_the_norm_before_clipping_is_returned(limit):
    model, update = make_update(clip_norm=limit)
    before = [p.detach().clone() for p in model.parameters()]
    update.forward(normal(4, 3))
    update.backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert update.step() == expected
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]).norm()
    assert float(moved) == pytest.approx(0.5 * min(expected, limit), rel=1e-4)


def test_a_non_finite_gradient_changes_nothing():
    model, update = make_update(clip_norm=1.0, loss=lambda output, x: output.sum() * math.inf)
    average = MovingAverage(model, 0.5)
    update._average = average
    before = [p.detach().clone() for p in model.parameters()]
    update.forward(normal(4, 3))
    update.backward()
    with pytest.raises(FloatingPointError, match="gradient norm"):
        update.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, average.average.values(), strict=True))


def test_the_average_moves_after_each_step():
    model, update = make_update()
    update._average = MovingAverage(model, 0.75)
    update._average.updates = 100  # past the warm-up of its decay
    start = model.weight.detach().clone()
    update.forward(normal(4, 3))
    update.backward()
    update.step()
    torch.testing.assert_close(update._average.average["weight"], 0.75 * start + 0.25 * model.weight.detach())


def make_batch(images: int = 6) -> Batch:
    return Batch("one", np.arange(images), normal(images, 3, 16, 16), torch.arange(images) % 3)


def test_a_measured_step_equals_the_trainers_update():
    """Two models with the same start stay bitwise equal: one runs `accumulate`, the other a measured step."""
    config = Config(train=TrainConfig(label_smoothing=0.1, grad_clip_norm=0.5))
    models = [make_model(moe_blocks=[1, 3]) for _ in range(2)]
    optimizer = make_optimizer(models[0], config.train)
    update = multitask_update(models[0], config.train, RUNTIME, optimizer)
    step = training_step(models[1], config, RUNTIME, batch=6, task="one")
    images, labels = step.inputs[0].images, step.inputs[0].labels
    for _ in range(3):
        batch = Batch("one", np.arange(6), images, labels)
        result = accumulate(update, batch, 1, share=1.0, noise_key=(0, 0), prepare=lambda part: part)
        update.step()
        step.run()
    assert math.isfinite(result.loss) and 0 <= result.accuracy <= 1 and len(result.outputs) == 1
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_cached_features_give_the_same_gradients_as_images():
    config = TrainConfig()
    results = []
    for cached in (False, True):
        model = make_model(train_blocks=[3], drop_blocks=[1])
        update = multitask_update(model, config, RUNTIME, make_optimizer(model, config))
        batch = make_batch()
        if cached:
            batch.features, batch.images = model.forward_features(batch.images, "one"), None
        update.forward(batch, (0, 0, 0))
        update.backward()
        results.append([p.grad for p in update.trained])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_is_split_in_order_and_may_have_no_images():
    batch = make_batch()
    parts = list(split(batch, 3))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert np.concatenate([part.positions for part in parts]).tolist() == batch.positions.tolist()
    batch.images = None
    assert [part.images for part in split(batch, 2)] == [None, None]


def test_task_weights_have_mean_one():
    weights = task_weights(["a", "b", "c"], TrainConfig(task_weights={"a": 4.0}))
    assert weights == {"a": 2.0, "b": 0.5, "c": 0.5}


def test_infer_changes_no_weight():
    model = nn.Linear(3, 2)
    step = TrainingStep(
        model, RUNTIME, torch.optim.SGD(model.parameters(), lr=0.1), output=lambda: model(normal(4, 3)), loss=torch.sum
    )
    before = model.weight.detach().clone()
    step.infer()
    assert torch.equal(before, model.weight) and model.weight.grad is None
    step.run()
    assert not torch.equal(before, model.weight) and step.output is None
