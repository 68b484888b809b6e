"""Out-of-distribution scores on the features of a task's head, and a threshold that rejects foreign images.

A head classifies any image. A score, which is larger for images that resemble the task's, is compared with the scores
of the task's own validation images. `SCORES` has scores from the literature. `runs.rejection` selects one of them by
its AUROC on images of other tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

ACCEPTED = 0.95  # share of a task's own validation images that are accepted
SHRINKAGE = 0.05  # of a covariance towards a multiple of the identity


def softmax(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Return the largest probability (Hendrycks & Gimpel 2017)."""
    return logits.softmax(1).amax(1)


def energy(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Return the log-sum-exp of the logits (Liu et al. 2020)."""
    return logits.logsumexp(1)


def cosine(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Return the largest cosine with a class mean, after subtracting the mean of all training images from both."""
    directions = normalize(features - tensors["mean"], dim=1)
    return (directions @ normalize(tensors["class_means"] - tensors["mean"], dim=1).T).amax(1)


def mahalanobis(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Return minus the squared Mahalanobis distance to the nearest class mean (Lee et al. 2018).

    The covariance is the one within classes.
    """
    return -_nearest(features @ tensors["within"], tensors["class_means"] @ tensors["within"])


def unit_mahalanobis(tensors: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    """Return the same for features scaled to length 1 (Mueller & Hein 2025)."""
    unit = normalize(features, dim=1)
    return -_nearest(unit @ tensors["unit_within"], tensors["unit_class_means"] @ tensors["unit_within"])


@dataclass(frozen=True)
class Score:
    """A score and the names of the statistics it needs.

    Attributes:
        of: maps (statistics, features (N, D), logits (N, C)) to scores (N,), all float32.
    """

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
    """Compute the statistics of a task's training images that the scores need, in float32.

    Args:
        features: (N, D). labels: (N,) int64. Classes without images have no mean.
    Returns:
        mean (D,); class_means (classes with images, D); within (D, D), a whitening matrix: the squared length of a
        difference times `within` is its squared Mahalanobis distance; unit_class_means and unit_within, the same for
        features scaled to length 1.
    """
    x = features.double()
    present, place = labels.unique(return_inverse=True)
    found = {"mean": x.mean(0)}
    for kind, rows in (("", x), ("unit_", normalize(x, dim=1))):
        means = torch.stack([rows[place == k].mean(0) for k in range(len(present))])
        found |= {f"{kind}class_means": means, f"{kind}within": _whitening(rows - means[place])}
    return {name: tensor.float() for name, tensor in found.items()}


def auroc(own: Tensor, others: Tensor) -> float:
    """Return the probability that an own image (N,) scores higher than another (M,); ties count half."""
    ordered = others.double().sort().values
    own = own.double()
    below, up_to = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    return float(((below + up_to) / 2).mean() / len(ordered))


def threshold(own: Tensor, accepted: float = ACCEPTED) -> float:
    """Return the highest threshold at which at least the share `accepted` of the own scores (N,) is accepted."""
    ordered = own.double().sort(descending=True).values
    return float(ordered[max(1, -int(-len(ordered) * accepted // 1)) - 1])


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Return the squared distance of each row of x (N, D) to the nearest of the means (C, D)."""
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)


def _whitening(centered: Tensor) -> Tensor:
    """Return W (D, D) such that W W^T is the inverse covariance of centered rows (N, D), with shrinkage."""
    covariance = centered.T @ centered / len(centered)
    size = len(covariance)
    scale = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * scale * torch.eye(size, dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors / values.sqrt()
