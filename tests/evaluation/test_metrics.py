"""Metrics, each against a slow and simple reference."""

import numpy as np
import pytest
import torch

from moe_bsr.evaluation.metrics import calibration_error, largest_confusions, score_batch, summarize, wilson_interval


def random_logits(n: int = 200, classes: int = 9, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that many rows have ties at ranks 1 and 5.
    logits = torch.randint(-3, 4, (n, classes), generator=generator).float()
    return logits, torch.randint(0, classes, (n,), generator=generator)


def test_top_k_with_ties_equals_sorting_each_row():
    logits, labels = random_logits()
    predictions = score_batch(logits, labels)
    for row, label, rank, predicted in zip(logits, labels, predictions.rank, predictions.predicted, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        assert order.index(label) == rank
        assert order[0] == predicted


def test_equal_logits_score_chance_level():
    predictions = score_batch(torch.zeros(10, 10), torch.arange(10))
    assert summarize(predictions, list("abcdefghij"))["top1"] == pytest.approx(10.0)
    assert summarize(predictions, list("abcdefghij"))["top5"] == pytest.approx(50.0)


def test_loss_and_confidence_equal_the_definition():
    logits, labels = random_logits()
    predictions = score_batch(logits, labels)
    exponentials = np.exp(logits.numpy().astype(np.float64))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(predictions.confidence, probabilities.max(1), rtol=1e-12)
    own = probabilities[np.arange(200), labels]
    np.testing.assert_allclose(predictions.loss, -np.log(own), rtol=1e-12)


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    edges = np.arange(1, 16) / 15
    confidence = np.concatenate([rng.random(500), np.repeat(edges, 20), [1e-9]])
    # The gap changes its sign from bin to bin, so that merged or shifted bins would cancel it.
    right = np.ceil(confidence * 15 - 1e-6) % 2 == 0
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected, rel=1e-12)
    assert calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0.0
    assert calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1.0


@pytest.mark.parametrize("hits, n", [(0, 1), (1, 1), (0, 30), (30, 30), (7, 10), (912, 1000)])
def test_wilson_interval_equals_scipy(hits, n):
    from scipy.stats import binomtest  # takes a second, and no other test needs it

    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= wilson_interval(hits, n)[0] <= hits / n <= wilson_interval(hits, n)[1] <= 1.0


def test_confusions_equal_a_count_of_pairs():
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    predicted = np.array([1, 1, 2, 0, 0, 1, 1, 1, 2, 0])
    found = largest_confusions(label, predicted, list("abcd"), limit=4)
    assert [(c["true"], c["predicted"], c["count"], c["share"]) for c in found] == [
        ("a", "b", 2, 0.5),
        ("c", "b", 2, 2 / 3),
        ("a", "c", 1, 0.25),
        ("b", "a", 1, 0.5),
    ]
    assert largest_confusions(label, label, list("abcd")) == []


def test_classes_missing_in_the_split_do_not_count_as_wrong():
    logits = torch.tensor([[3.0, 0, 0, 0], [3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 3.0]])
    result = summarize(score_batch(logits, torch.tensor([0, 0, 0, 3])), list("abcd"))
    assert result["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert result["top1"] == pytest.approx(75.0)
    assert result["chance"] == pytest.approx(75.0)


def test_a_single_class_has_perfect_scores():
    result = summarize(score_batch(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)), ["only"])
    assert (result["top1"], result["top5"], result["chance"], result["ece"]) == (100, 100, 100, 0)
    assert result["loss"] == 0.0 and result["confusions"] == []
