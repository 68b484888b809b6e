"""The linear probe: multinomial logistic regression on features, solved to its optimum.

    minimize  mean cross-entropy of  W (x - m) / s + b  +  penalty / 2 |W|^2

m and s standardize each feature over the training images; they are folded into the weight and the bias of the head.
The problem is convex, so L-BFGS finds the optimum whatever the start: the penalties come from large to small, each
from the solution of the one before, and validation chooses among them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_bsr.evaluation.features import Features

PENALTIES = tuple(10 ** (-k / 2) for k in range(11))  # 1 to 1e-5
PATIENCE = 3  # penalties in a row that are no better, after which the path ends
ITERATIONS, HISTORY = 200, 10


@dataclass(frozen=True)
class Solved:
    """The optimum at one penalty, and how good it is. Accuracies in percent, losses in nats.

    Attributes:
        iterations: of L-BFGS.
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
        chosen: the penalty it was solved at. path: all that were, large to small.
    """

    weight: Tensor
    bias: Tensor
    chosen: Solved
    path: list[Solved]


def fit(train: Features, val: Features, classes: int, penalty: str | float = "best", smoothing: float = 0.0) -> Probe:
    """The probe of one task.

    Args:
        train, val: x (N, D), computed in its own type. classes: of the task; those without a training image get a
            head that predicts them nowhere.
        penalty: "best": of the highest validation top-1, among equals of the lowest loss. "mild": the largest one
            whose validation top-1 is within one standard error of the best. A number: that one.
        smoothing: of the labels.
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
    """The highest validation top-1; among equals the lowest validation loss, then the largest penalty."""
    return min(path, key=lambda each: (-each.val_top1, each.val_loss, -each.penalty))


def mild(path: list[Solved], images: int) -> Solved:
    """The largest penalty whose top-1 on so many validation images is within one standard error of the best."""
    share = best(path).val_top1 / 100
    error = 100 * (share * (1 - share) / images) ** 0.5
    return max((each for each in path if each.val_top1 >= 100 * share - error), key=lambda each: each.penalty)


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of the columns of (N, D); 1 where a column hardly varies."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    return mean, torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.ones_like(scale))


def objective(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float, smoothing: float = 0.0
) -> Tensor:
    """What is minimized, a scalar."""
    loss = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias), labels, label_smoothing=smoothing)
    return loss + penalty / 2 * weight.square().sum()


def minimize(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, int]:
    """The optimum from a start: weight (C, D), bias (C,) and the iterations it took."""
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
    """The head of all classes, from that of the classes present in training.

    Of an absent class nothing is known but that it is rare: on no training image is it more probable than 1 / (N + 1).
    Its own optimum would be a bias of minus infinity.
    """
    lowest = nn.functional.linear(x, weight, bias).logsumexp(1).min() - torch.tensor(float(len(x))).log()
    all_weights, all_biases = weight.new_zeros(classes, weight.shape[1]), lowest.repeat(classes).to(bias)
    all_weights[present], all_biases[present] = weight, bias
    return all_weights, all_biases


def folded(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same head for features that are not standardized, in float32."""
    weight, bias, mean, scale = (part.double() for part in (weight, bias, mean, scale))
    weight = weight / scale
    return weight.float(), (bias - weight @ mean).float()


def _scores(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    """Cross-entropy and top-1 in percent."""
    logits = nn.functional.linear(x, weight, bias)
    right = (logits.argmax(1) == labels).double().mean()
    return float(nn.functional.cross_entropy(logits, labels)), 100 * float(right)
