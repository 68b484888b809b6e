"""Say whether routing matters, in a table and a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.metrics import NORMAL_975
from moe_bsr.visualize.conclusions import Claim
from moe_bsr.visualize.html import Section, Table

if TYPE_CHECKING:
    from moe_bsr.evaluation.ablation import Ablation

WHAT = (  # in the order of `interventions.KINDS`
    "the experts merged into one FFN",
    "the router of the next task",
    "the experts of another token",
)


def mean_points(result: Ablation) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that each change loses, as the mean over tasks, and half the 95 % interval of each; both (E,).

    The intervals are paired: they follow from the images that only one of the two models classifies correctly.
    """
    images = result.images[:, None]
    changed, net = result.lost + result.gained, result.lost - result.gained
    variance = (changed - net**2 / images) / images**2
    half = 100 * NORMAL_975 * np.sqrt(variance.sum(0)) / len(images)
    return result.points().mean(0), half


def claim(result: Ablation) -> Claim:
    """Conclude whether the mixture computes something that a single FFN would not."""
    points, half = mean_points(result)
    said = [f"with {what} {_signed(p, h)}" for what, p, h in zip(WHAT, points, half, strict=True)]
    if len(result.tasks) == 1:
        del said[1]
    matters = bool(points[0] > half[0])
    verdict = "Routing matters." if matters else "The mixture acts as one FFN."
    why = "" if matters else "Merging the experts costs nothing that these images can show. "
    lost = "Points lost, as the mean over tasks (95 % intervals, paired)"
    return Claim(verdict, f"{why}{lost}: {'; '.join(said)}.", matters)


def section(result: Ablation) -> Section:
    """Return the table: accuracy of each task with each change."""
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
            "The same images, with one change to all blocks of the trained mixture at once. Nothing is trained again. "
            "If merging costs nothing, the mixture has become one FFN, and a dense model would be as good in less "
            "time. If merging costs accuracy and another task's router does not, experts differ, and all tasks use "
            "them in the same way. If another token's experts cost most, routing depends on the token, not the task."
        ],
        tables=[Table(rows)],
    )


def _signed(points: float, half: float) -> str:
    return f"{points:+.1f} ± {half:.1f}"
