"""Scores of how well an image fits a task, each against its formula."""

import math

import pytest
import torch
from tiny_models import normal

from moe_bsr.evaluation.rejection import SCORES, SHRINKAGE, auroc, statistics, threshold

LABELS = torch.arange(60) % 4
FEATURES = normal(60, 5) + 2 * normal(4, 5, seed=1)[LABELS] + 10
NEW, LOGITS = normal(7, 5, seed=2) + 10, normal(7, 4, seed=3)
KNOWN = statistics(FEATURES, torch.where(LABELS == 3, 6, LABELS))  # classes 3 to 5 have no image


def covariance(rows: torch.Tensor) -> torch.Tensor:
    found = rows.T @ rows / len(rows)
    return (1 - SHRINKAGE) * found + SHRINKAGE * found.trace() / len(found) * torch.eye(len(found), dtype=found.dtype)


def by_hand(score: str) -> list[float]:
    x, means = FEATURES.double(), torch.stack([FEATURES[LABELS == k].double().mean(0) for k in range(4)])
    inner, units = covariance(x - means[LABELS]).inverse(), torch.stack([row / row.norm() for row in x])
    unit_means = torch.stack([units[LABELS == k].mean(0) for k in range(4)])
    unit_inner = covariance(units - unit_means[LABELS]).inverse()
    found = []
    for row, logits in zip(NEW.double(), LOGITS.double(), strict=True):
        distance = min(float((row - mean) @ inner @ (row - mean)) for mean in means)
        away, unit = row - x.mean(0), row / row.norm()
        found.append({
            "softmax": max(math.exp(v) for v in logits) / sum(math.exp(v) for v in logits),
            "energy": math.log(sum(math.exp(v) for v in logits)),
            "cosine": max(
                float(away @ (mean - x.mean(0))) / float(away.norm() * (mean - x.mean(0)).norm()) for mean in means
            ),
            "mahalanobis": -distance,
            "unit_mahalanobis": -min(float((unit - mean) @ unit_inner @ (unit - mean)) for mean in unit_means),
        }[score])  # fmt: skip
    return found


@pytest.mark.parametrize("score", SCORES)
def test_a_score_equals_its_formula_and_needs_only_its_declared_statistics(score):
    needed = {name: KNOWN[name] for name in SCORES[score].needs}
    found = SCORES[score].of(needed, NEW, LOGITS)
    assert found.tolist() == pytest.approx(by_hand(score), rel=1e-3, abs=1e-3)


def test_constant_features_give_finite_scores():
    features = torch.cat([FEATURES, torch.full((60, 1), 3.0)], 1)
    known = statistics(features, LABELS)
    same = torch.cat([NEW, torch.full((7, 1), 3.0)], 1)
    found = SCORES["mahalanobis"].of(known, same, LOGITS)
    assert (
        found.isfinite().all() and (SCORES["mahalanobis"].of(known, same + 5 * torch.eye(6)[5], LOGITS) < found).all()
    )


def test_auroc_counts_pairs():
    own, others = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 3.0])
    pairs = [(a > b) + (a == b) / 2 for a in own.tolist() for b in others.tolist()]
    assert auroc(own, others) == pytest.approx(sum(pairs) / 12)
    assert auroc(own, own) == 0.5


@pytest.mark.parametrize("images", [1, 19, 20, 40, 41])
def test_the_threshold_is_the_highest_that_accepts_its_share(images):
    own = normal(images)
    limit = threshold(own, 0.95)
    assert (own.double() >= limit).double().mean() >= 0.95
    assert (own.double() > limit).double().mean() < 0.95
