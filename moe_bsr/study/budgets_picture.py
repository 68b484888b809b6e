"""Draw the result of `budgets`: test accuracy over minutes, one line per method, with intervals over seeds.

Methods without a run at the longest budget appear in the table only: their names would overlap the lines.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from moe_bsr.evaluation.metrics import over_seeds
from moe_bsr.study.budgets import by_budget
from moe_bsr.visualize import theme

WIDTH, HEIGHT = 760, 460  # pixels
COLORS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#595959")  # Okabe and Ito 2008, and gray
APART = 3.5  # percentage points between names at the right edge
LETTER = 10  # pixels


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the picture.

    Args:
        result: return value of `budgets.race`. file: path of the PNG.
    """
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for (minutes, method), runs in by_budget(result).items():
        lines.setdefault(method, []).append((minutes, over_seeds([run["mean_top1"] for run in runs])))
    budgets = sorted({run["minutes"] for run in result["runs"]})
    order = sorted(
        (method for method in lines if lines[method][-1][0] == budgets[-1]),
        key=lambda method: -lines[method][-1][1]["mean"],
    )
    names = LETTER * (max(map(len, order)) + len("  12.3"))
    figure = theme.figure(WIDTH, HEIGHT)
    axis = figure.add_axes((0.09, 0.14, 0.90 - names / WIDTH, 0.80))
    for method, color in zip(order, COLORS * len(order), strict=False):
        x, found = [point[0] for point in lines[method]], [point[1] for point in lines[method]]
        y = [each["mean"] for each in found]
        axis.plot(x, y, "o-", color=color, linewidth=2, markersize=7, clip_on=False)
        told = [(at, each) for at, each in zip(x, found, strict=True) if each["low"] is not None]
        axis.vlines([at for at, _ in told], [e["low"] for _, e in told], [e["high"] for _, e in told], color=color)
    _names(axis, order, [lines[method][-1] for method in order])
    axis.set(xscale="log", ylim=(0, None))
    axis.set_xticks(budgets, [f"{minutes:g}" for minutes in budgets], fontsize=theme.SMALL)
    axis.set_xticks([], minor=True)
    axis.tick_params(labelsize=theme.SMALL, colors=theme.MUTED)
    axis.set_xlabel("minutes, from opening the images on", fontsize=theme.LABEL, color=theme.INK)
    axis.set_ylabel("test top-1 %, mean of the tasks", fontsize=theme.LABEL, color=theme.INK)
    axis.grid(axis="y", color=theme.FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})


def _names(axis: Any, order: list[str], ends: list[tuple[float, dict[str, Any]]]) -> None:
    """Write each method's name beside its last point, moved down where it would overlap the one above."""
    last = float("inf")
    right = max(minutes for minutes, _ in ends)
    for method, color, (_, found) in zip(order, COLORS * len(order), ends, strict=False):
        last = min(found["mean"], last - APART)
        words = f"{method}  {fmean(found['each']):.1f}"
        axis.annotate(
            words, (right, last), xytext=(12, 0), textcoords="offset points", va="center", color=color,
            fontsize=theme.SMALL, annotation_clip=False,
        )  # fmt: skip
