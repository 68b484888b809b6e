"""Whether routing matters, in a table and a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.metrics import NORMAL_975
from moe_bsr.visualize.conclusions import Claim
from moe_bsr.visualize.html import Section, Table

if TYPE_CHECKING:
    from moe_bsr.evaluation.ablation import Ablation

WHAT = (  # in the order of `interventions.KINDS`
    "its experts merged into one FFN",
    "each task with the next one's router",
    "each token with another one's experts",
)


def mean_points(result: Ablation) -> tuple[np.ndarray, np.ndarray]:
    """Points lost in the mean over tasks by each change, (E,), and half the 95 % interval of each.

    From the images that only one of the two has right (paired).
    """
    images = result.images[:, None]
    changed, net = result.lost + result.gained, result.lost - result.gained
    variance = (changed - net**2 / images) / images**2
    half = 100 * NORMAL_975 * np.sqrt(variance.sum(0)) / len(images)
    return result.points().mean(0), half


def claim(result: Ablation) -> Claim:
    """Whether the mixture does what one FFN would not."""
    points, half = mean_points(result)
    said = [f"with {what} it loses {_signed(p, h)}" for what, p, h in zip(WHAT, points, half, strict=True)]
    if len(result.tasks) == 1:
        del said[1]
    matters = bool(points[0] > half[0])
    verdict = "Routing matters." if matters else "The mixture acts as one FFN."
    why = "" if matters else "Merging the experts costs nothing that these images can show: "
    return Claim(verdict, f"{why}{'; '.join(said)} points in the mean over tasks (95 % intervals, paired).", matters)


def section(result: Ablation) -> Section:
    """Accuracy of each task with each change."""
    columns = [i for i in range(len(WHAT)) if i != 1 or len(result.tasks) > 1]
    rows = [["top-1 %, and points lost", "as trained", *(WHAT[i] for i in columns), "images"]]
    for row, (task, lost) in enumerate(zip(result.tasks, result.points(), strict=True)):
        right = 100 * result.right[row] / result.images[row]
        rows.append([task, f"{right:.1f}", *(f"{lost[i]:+.1f}" for i in columns), str(result.images[row])])
    points, half = mean_points(result)
    mean = f"{np.mean(100 * result.right / result.images):.1f}"
    rows.append(["mean", mean, *(_signed(points[i], half[i]) for i in columns), str(result.images.sum())])
    return Section(
        "Does routing matter",
        [
            "The same images, with one thing taken from all blocks of the trained mixture at once; nothing is trained "
            "again. Where merging costs nothing, the mixture is one FFN by now, and a dense model would do as well in "
            "less time. Where merging costs and another task's router does not, experts differ, and all tasks share "
            "them alike. Where another token's experts cost most, it is the token that decides, not the task."
        ],
        tables=[Table(rows)],
    )


def _signed(points: float, half: float) -> str:
    return f"{points:+.1f} ± {half:.1f}"
