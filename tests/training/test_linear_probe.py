"""The linear probe against slow, simple solvers."""

import itertools

import pytest
import torch

from moe_bsr.evaluation.features import Features
from moe_bsr.training import linear_probe
from moe_bsr.training.linear_probe import Solved, best, fit, folded, mild, minimize, objective, standardization


def problem(images=40, width=5, classes=3, seed=0, dtype=torch.float64) -> Features:
    """Return overlapping classes, with correlated features of different scales."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centers = torch.randn(classes, width, generator=draws, dtype=dtype)
    x = centers[labels] + torch.randn(images, width, generator=draws, dtype=dtype)
    mixing = torch.eye(width, dtype=dtype) + 0.3 * torch.randn(width, width, generator=draws, dtype=dtype)
    return Features((x @ mixing) * torch.logspace(-2, 2, width, dtype=dtype) + 7, labels)


def descend(x, labels, classes, penalty, rate=0.5):
    """Run plain gradient descent from zero. Each step multiplies the error by at most 1 - rate * penalty."""
    steps = max(300, int(30 / (rate * penalty)))
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    for _ in range(steps):
        value = objective(x, labels, weight, bias, penalty)
        for parameter, gradient in zip((weight, bias), torch.autograd.grad(value, (weight, bias)), strict=True):
            parameter.data -= rate * gradient
    return weight.detach(), bias.detach()


@pytest.mark.parametrize(("penalty", "dtype", "tolerance"), [(0.03, torch.float64, 1e-6), (1.0, torch.float32, 1e-3)])
def test_the_optimum_equals_that_of_gradient_descent(penalty, dtype, tolerance):
    x, labels = problem(dtype=dtype)
    mean, scale = standardization(x)
    x = (x - mean) / scale
    start = torch.full((3, 5), 2.0, dtype=dtype), torch.ones(3, dtype=dtype)  # the start does not matter
    weight, bias, iterations = minimize(x, labels, *start, penalty)
    expected = descend(x.double(), labels, 3, penalty)
    assert torch.allclose(weight.double(), expected[0], atol=tolerance)
    difference = bias.double() - expected[1]  # softmax does not depend on a constant added to all biases
    assert torch.allclose(difference - difference.mean(), torch.zeros(3).double(), atol=tolerance)
    assert 0 < iterations < 100


def test_the_objective_and_its_gradient_follow_the_formula():
    x, labels = problem(images=7)
    x = x / x.abs().max()
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    by_hand = 0.0
    for image, label in zip(x, labels, strict=True):
        logits = [float(weight[k] @ image + bias[k]) for k in range(3)]
        by_hand += -(logits[label] - torch.tensor(logits, dtype=torch.float64).logsumexp(0).item()) / 7
    by_hand += 0.2 * float((weight**2).sum()) / 2
    assert float(objective(x, labels, weight, bias, 0.2)) == pytest.approx(by_hand, abs=1e-12)
    inputs = weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, b: objective(x, labels, w, b, 0.2, 0.1), inputs)


def test_the_folded_head_gives_the_logits_of_standardized_features():
    x, _ = problem()
    x[:, 2] = 4.0  # a constant feature
    mean, scale = standardization(x)
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    plain = folded(weight, bias, mean, scale)
    assert torch.allclose(x.float() @ plain[0].T + plain[1], ((x - mean) / scale @ weight.T + bias).float(), atol=1e-3)
    standardized = (x - mean) / scale
    assert torch.allclose(standardized[:, [0, 1, 3, 4]].std(0, correction=0), torch.ones(4).double())
    assert not standardized[:, 2].any()


def test_the_chosen_penalty_is_the_best_on_validation():
    train, val = problem(seed=1, images=30), problem(seed=1, images=60)
    probe = fit(train, val, 3)
    assert len(probe.path) > 3 and probe.chosen in probe.path
    penalties = [each.penalty for each in probe.path]
    assert penalties == list(linear_probe.PENALTIES[: len(penalties)])
    for each in probe.path:  # each solved again and scored by hand
        alone = fit(train, val, 3, penalty=each.penalty)
        top1 = 100 * float(((val.x.float() @ alone.weight.T + alone.bias).argmax(1) == val.labels).double().mean())
        assert top1 == pytest.approx(each.val_top1)
        assert top1 <= probe.chosen.val_top1
        assert alone.chosen.train_loss == pytest.approx(each.train_loss, rel=1e-4)  # the warm start does not matter
    logits = val.x.float() @ probe.weight.T + probe.bias
    assert 100 * float((logits.argmax(1) == val.labels).double().mean()) == pytest.approx(probe.chosen.val_top1)


def path(*points: tuple[float, float, float]) -> list[Solved]:
    return [Solved(penalty, 0.0, 0.0, loss, top1, 1) for penalty, top1, loss in points]


def test_ties_are_broken_by_the_lower_loss_and_then_the_larger_penalty():
    assert best(path((1.0, 50, 2.0), (0.1, 60, 1.5), (0.01, 60, 1.2), (0.001, 60, 1.2))).penalty == 0.01


def test_the_mild_penalty_is_the_largest_within_a_standard_error_of_the_best():
    points = path((1.0, 50, 2.0), (0.1, 76.5, 1.5), (0.01, 80, 1.2), (0.001, 78, 1.3))
    assert mild(points, images=100).penalty == 0.1  # standard error 4 points
    assert mild(points, images=400).penalty == 0.01  # standard error 2 points


def test_the_path_ends_when_validation_no_longer_improves():
    train = problem(seed=2, images=12)
    noise = Features(problem(seed=3, images=12).x, torch.arange(12) % 3)
    probe = fit(train, noise, 3)
    assert len(probe.path) - 1 - probe.path.index(probe.chosen) == linear_probe.PATIENCE


@pytest.mark.parametrize("classes", [4, 9])
def test_a_class_without_training_images_is_never_predicted(classes):
    train = problem()
    train = Features(train.x, torch.tensor([0, 2, 3])[train.labels])  # classes 1, 4 and above are absent
    val = Features(train.x, train.labels.clone())
    val.labels[0] = 1
    probe = fit(train, val, classes)
    assert probe.weight.shape == (classes, 5) and probe.weight.isfinite().all() and probe.bias.isfinite().all()
    shares = (train.x.float() @ probe.weight.T + probe.bias).softmax(1)
    assert (shares[:, [1, *range(4, classes)]] <= 1.01 / 41).all()
    assert probe.chosen.val_loss < 100
    present = fit(train._replace(labels=torch.tensor([0, 9, 1, 2])[train.labels]), problem(), 3, probe.chosen.penalty)
    assert torch.allclose(probe.weight[[0, 2, 3]], present.weight, rtol=1e-3, atol=1e-5)  # as if it did not exist


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0], [0, 1, 1]], ids=["one image each", "one class", "one alone"])
def test_very_few_images_are_fitted(labels):
    x = problem(images=3).x
    val = problem()
    probe = fit(Features(x, torch.tensor(labels)), val, 3)
    assert probe.weight.isfinite().all() and probe.bias.isfinite().all()
    assert ((x.float() @ probe.weight.T + probe.bias).argmax(1) == torch.tensor(labels)).all()


def test_smaller_penalties_give_lower_training_losses():
    train, val = problem(images=60), problem(images=60)
    losses = [fit(train, val, 3, penalty=value).chosen.train_loss for value in (1.0, 0.1, 0.01, 1e-3)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
