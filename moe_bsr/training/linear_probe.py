"""Linear probe: multinomial logistic regression on features, solved to its optimum.

    minimize  mean cross-entropy of  W (x - m) / s + b  +  penalty / 2 |W|^2

m and s are each feature's mean and standard deviation over the training images. They are folded into the weight and the
bias of the head. The problem is convex, so L-BFGS finds the optimum from any start. It is solved for penalties from
large to small, each starting from the previous solution, and the validation split selects one of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_bsr.evaluation.features import Features

PENALTIES = tuple(10 ** (-k / 2) for k in range(11))  # 1 to 1e-5
PATIENCE = 3  # the path ends after this many penalties in a row without improvement
ITERATIONS, HISTORY = 200, 10


@dataclass(frozen=True)
class Solved:
    """Scores of the optimum at one penalty. Accuracies are in percent, losses in nats.

    Attributes:
        iterations: number of L-BFGS iterations.
    """

    penalty: float
    train_loss: float
    train_top1: float
    val_loss: float
    val_top1: float
    iterations: int


class Probe(NamedTuple):
    """A head for unstandardized features.

    Attributes:
        weight: (C, D) float32. bias: (C,) float32.
        chosen: the penalty of this head. path: all penalties that were tried, from large to small.
    """

    weight: Tensor
    bias: Tensor
    chosen: Solved
    path: list[Solved]


def fit(train: Features, val: Features, classes: int, penalty: str | float = "best", smoothing: float = 0.0) -> Probe:
    """Solve the probe of one task.

    Args:
        train, val: features x (N, D); the solver computes in their dtype.
        classes: number of classes of the task. A class without training images is never predicted.
        penalty: "best" selects the highest validation top-1, and among equals the lowest loss. "mild" selects the
            largest penalty whose validation top-1 is within one standard error of the best. A number is used as it is.
        smoothing: label smoothing in [0, 1).
    """
    mean, scale = standardization(train.x)
    x, val_x = (train.x - mean) / scale, (val.x - mean) / scale
    present = torch.unique(train.labels)
    labels = torch.searchsorted(present, train.labels)
    weight, bias = x.new_zeros(len(present), x.shape[1]), x.new_zeros(len(present))
    path: list[Solved] = []
    heads: list[tuple[Tensor, Tensor]] = []
    for value in PENALTIES if isinstance(penalty, str) else (penalty,):
        weight, bias, iterations = minimize(x, labels, weight, bias, value, smoothing)
        heads.append(whole(x, weight, bias, present, classes))
        scores = (*_scores(x, train.labels, *heads[-1]), *_scores(val_x, val.labels, *heads[-1]))
        path.append(Solved(value, *scores, iterations))
        if len(path) - 1 - path.index(best(path)) >= PATIENCE:
            break
    chosen = mild(path, len(val.labels)) if penalty == "mild" else best(path)
    return Probe(*folded(*heads[path.index(chosen)], mean, scale), chosen, path)


def best(path: list[Solved]) -> Solved:
    """Return the entry with the highest validation top-1; ties: lowest validation loss, then largest penalty."""
    return min(path, key=lambda each: (-each.val_top1, each.val_loss, -each.penalty))


def mild(path: list[Solved], images: int) -> Solved:
    """Return the largest penalty whose top-1 on `images` validation images is within one standard error of the best."""
    share = best(path).val_top1 / 100
    error = 100 * (share * (1 - share) / images) ** 0.5
    return max((each for each in path if each.val_top1 >= 100 * share - error), key=lambda each: each.penalty)


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) of the columns of x (N, D); a deviation near zero is replaced by 1."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    return mean, torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.ones_like(scale))


def objective(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float, smoothing: float = 0.0
) -> Tensor:
    """Return the penalized loss, a scalar."""
    loss = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias), labels, label_smoothing=smoothing)
    return loss + penalty / 2 * weight.square().sum()


def minimize(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, int]:
    """Solve from a start; returns weight (C, D), bias (C,) and the number of iterations."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=HISTORY,
        tolerance_grad=1e-5 if x.dtype == torch.float32 else 1e-9,
        tolerance_change=1e-7 if x.dtype == torch.float32 else 1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            value = objective(x, labels, weight, bias, penalty, smoothing)
            value.backward()
        return value

    solver.step(closure)
    return weight.detach(), bias.detach(), solver.state[weight]["n_iter"]


def whole(x: Tensor, weight: Tensor, bias: Tensor, present: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Extend a head for the classes present in training to all classes.

    An absent class gets weight 0, and a bias that makes it at most 1 / (N + 1) probable on every training image. Its
    optimal bias would be minus infinity.
    """
    lowest = nn.functional.linear(x, weight, bias).logsumexp(1).min() - torch.tensor(float(len(x))).log()
    all_weights, all_biases = weight.new_zeros(classes, weight.shape[1]), lowest.repeat(classes).to(bias)
    all_weights[present], all_biases[present] = weight, bias
    return all_weights, all_biases


def folded(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the equivalent float32 head for features that are not standardized."""
    weight, bias, mean, scale = (part.double() for part in (weight, bias, mean, scale))
    weight = weight / scale
    return weight.float(), (bias - weight @ mean).float()


def _scores(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    """Return cross-entropy, and top-1 in percent."""
    logits = nn.functional.linear(x, weight, bias)
    right = (logits.argmax(1) == labels).double().mean()
    return float(nn.functional.cross_entropy(logits, labels)), 100 * float(right)
