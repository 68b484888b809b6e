"""How much an image looks like those of a task: scores on what the task's head reads, and a threshold on them.

A head answers every image. Whether the image is one for it is told by a score, the larger the more at home, compared
with the scores of the task's own validation images. `SCORES` are the ones in use in the literature; which is taken is
decided by measurement (`auroc` on other tasks' images), not here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

ACCEPTED = 0.95  # share of a task's own validation images that are accepted
SHRINKAGE = 0.05  # of a covariance towards a multiple of the identity


def softmax(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Largest probability (Hendrycks & Gimpel 2017)."""
    return logits.softmax(1).amax(1)


def energy(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """log sum exp of the logits (Liu et al. 2020)."""
    return logits.logsumexp(1)


def cosine(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Largest cosine with a class mean, both seen from the mean of all training images."""
    directions = normalize(features - tensors["mean"], dim=1)
    return (directions @ normalize(tensors["class_means"] - tensors["mean"], dim=1).T).amax(1)


def mahalanobis(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Minus the squared distance to the nearest class mean, in the covariance within classes (Lee et al. 2018)."""
    return -_nearest(features @ tensors["within"], tensors["class_means"] @ tensors["within"])


def unit_mahalanobis(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """The same of features of length 1 (Mueller & Hein 2025)."""
    unit = normalize(features, dim=1)
    return -_nearest(unit @ tensors["unit_within"], tensors["unit_class_means"] @ tensors["unit_within"])


@dataclass(frozen=True)
class Score:
    """A score: `of` (tensors, features (N, D), logits (N, C)) -> (N,), all float32, and the tensors that it needs."""

    of: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
    needs: tuple[str, ...] = ()


SCORES = {
    "softmax": Score(softmax),
    "energy": Score(energy),
    "cosine": Score(cosine, ("mean", "class_means")),
    "mahalanobis": Score(mahalanobis, ("class_means", "within")),
    "unit_mahalanobis": Score(unit_mahalanobis, ("unit_class_means", "unit_within")),
}


def statistics(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the scores need to know of a task's training images, float32.

    Args:
        features: (N, D). labels: (N,) int64. Classes without an image have no mean.
    Returns:
        mean (D,); class_means (classes with images, D); within (D, D), which maps differences to ones whose squared
        length is the squared Mahalanobis distance; and the last two of the features at length 1: unit_...
    """
    x = features.double()
    present, place = labels.unique(return_inverse=True)
    found = {"mean": x.mean(0)}
    for kind, rows in (("", x), ("unit_", normalize(x, dim=1))):
        means = torch.stack([rows[place == k].mean(0) for k in range(len(present))])
        found |= {f"{kind}class_means": means, f"{kind}within": _whitening(rows - means[place])}
    return {name: tensor.float() for name, tensor in found.items()}


def auroc(own: Tensor, others: Tensor) -> float:
    """Probability that an own image scores higher than one of the others, ties counted half; of (N,) and (M,)."""
    ordered = others.double().sort().values
    own = own.double()
    below, up_to = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    return float(((below + up_to) / 2).mean() / len(ordered))


def threshold(own: Tensor, accepted: float = ACCEPTED) -> float:
    """The score from which on an image is accepted: the highest at which at least this share of (N,) own scores is."""
    ordered = own.double().sort(descending=True).values
    return float(ordered[max(1, -int(-len(ordered) * accepted // 1)) - 1])


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Squared distance of each row of (N, D) to the nearest of (C, D)."""
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)


def _whitening(centered: Tensor) -> Tensor:
    """(D, D) W with W W^T the inverse of the covariance of (N, D) rows of mean 0, shrunk so that there is one."""
    covariance = centered.T @ centered / len(centered)
    size = len(covariance)
    scale = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * scale * torch.eye(size, dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors / values.sqrt()
