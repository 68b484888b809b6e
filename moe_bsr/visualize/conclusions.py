"""State in sentences what the numbers of a run's views mean. The page begins with them; notable ones are bold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.model.block import Record
from moe_bsr.model.tokens import FUSED

if TYPE_CHECKING:
    from moe_bsr.evaluation.ablation import Ablation

SHARED, SEPARATE = 0.1, 0.5  # mutual information: below, tasks share experts; from here on, each has its own
PREFERRED = 1.25  # a part of the image is preferred if its patches are kept this many times as often
NAMED = 3  # most experts that are named


@dataclass(slots=True)
class Claim:
    """Conclusion, and the numbers that support it.

    Attributes:
        notable: False if it only says that nothing stands out.
    """

    verdict: str
    reasons: str
    notable: bool


@dataclass(slots=True)
class KeptPatches:
    """Counts of how often each patch of the image is kept to the end, over the images of one task.

    Attributes:
        grid: rows and columns of patches.
        left: (rows * columns,) int64, number of images in which the patch was kept.
        images: number of images counted.
    """

    grid: tuple[int, int]
    left: np.ndarray = field(init=False)
    images: int = 0

    def __post_init__(self) -> None:
        self.left = np.zeros(self.grid[0] * self.grid[1], np.int64)

    def add(self, records: dict[int, Record]) -> None:
        """Count the patches that the last drop of a batch has kept.

        Args:
            records: by block, from the forward pass.
        """
        drops = [record.dropped for record in records.values() if record.dropped is not None]
        if drops:
            origin = drops[-1].origin.cpu().numpy()
            self.left += np.bincount(origin[origin != FUSED], minlength=len(self.left))
            self.images += len(origin)

    def share(self, part: np.ndarray | None = None) -> float:
        """Return the share of patches that are kept: of all, or of those where `part` (rows, columns) is true."""
        left = self.left if part is None else self.left[part.ravel()]
        return float(left.mean() / self.images)

    def middle(self) -> np.ndarray:
        """Return (rows, columns) bool, true for the inner half of each side."""
        inner = [np.abs((np.arange(n) + 0.5) / n - 0.5) < 0.25 for n in self.grid]
        return inner[0][:, None] & inner[1]

    def border(self) -> np.ndarray:
        """Return (rows, columns) bool, true for the outermost patches."""
        found = np.ones(self.grid, bool)
        found[1:-1, 1:-1] = False
        return found


def of_load(statistics: dict[int, RoutingStatistics]) -> Claim:
    """Conclude whether experts are used evenly; statistics by MoE block."""
    used = {block: s.used() for block, s in statistics.items()}
    experts = max(s.experts for s in statistics.values())
    uneven = {block: s.reading() for block, s in statistics.items() if not s.reading().startswith("even")}
    if not uneven:
        load = f"The load is as if {_range(used.values(), 1)} of {experts} experts were used equally."
        return Claim("Experts are used evenly.", load, False)
    return Claim(
        f"Experts are not used evenly in {_blocks(uneven)}.",
        " ".join(f"Block {block}: {words.split(';')[0]}." for block, words in uneven.items()),
        True,
    )


def of_tasks(statistics: dict[int, RoutingStatistics]) -> Claim | None:
    """Conclude whether tasks share experts; None for a single task."""
    told = {block: s.mutual_information() for block, s in statistics.items()}
    if any(np.isnan(value) for value in told.values()):
        return None
    most = max(told.values())
    verdict = (
        "Tasks share the experts."
        if most < SHARED
        else "Tasks partly use experts of their own."
        if most < SEPARATE
        else "Tasks use experts of their own."
    )
    block = max(statistics, key=lambda block: np.nanmax(statistics[block].distances()))
    apart, names = statistics[block].distances(), statistics[block].tasks
    one, other = np.unravel_index(np.nanargmax(apart), apart.shape)
    return Claim(
        verdict,
        f"Mutual information between task and expert, from 0 to 1: {_range(told.values(), 2)}. Farthest apart are "
        f"{names[one]} and {names[other]}, at block {block} (distance {apart[one, other]:.2f}, where 1 means no expert "
        "in common).",
        most >= SHARED,
    )


def of_ablation(results: dict[int, Ablation]) -> Claim:
    """Conclude whether any expert matters by itself, with a correction for the number of tests."""
    tests = sum(result.lost.size for result in results.values())
    found = sorted(
        (
            (float(result.points()[row, expert]), block, int(expert), result.tasks[row])
            for block, result in results.items()
            for row, expert in np.argwhere(result.p_values() <= 0.05 / tests)
        ),
        key=lambda each: -abs(each[0]),
    )
    corrected = f"McNemar's test at 5 %, corrected for {tests} maskings"
    if found:
        named = "; ".join(
            f"without expert {expert} of block {block}, {task} {'loses' if points > 0 else 'gains'} {abs(points):.1f} "
            "points"
            for points, block, expert, task in found[:NAMED]
        )
        more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return Claim("Some experts matter by themselves.", f"{_capital(named)}{more} ({corrected}).", True)
    bold = int(sum(result.clear().sum() for result in results.values()))
    return Claim(
        "No expert matters by itself.",
        f"Masking any one of them changes no task's accuracy more than chance does ({corrected}). Without this "
        f"correction, {bold} of the {tests} cells below are bold; chance alone makes up to about "
        f"{round(0.05 * tests)} bold.",
        False,
    )


def of_drops(kept: dict[str, KeptPatches]) -> Claim | None:
    """Conclude which part of the images the drops keep.

    Args:
        kept: by task.
    Returns:
        None if nothing is dropped, or the grid is too small to have a middle.
    """
    if not all(each.images and each.middle().any() for each in kept.values()):
        return None
    shares = {
        name: float(np.mean([each.share(getattr(each, name)()) for each in kept.values()]))
        for name in ("middle", "border")
    }
    ratio = shares["middle"] / max(shares["border"], 1e-9)
    verdict = (
        "The drops keep the middle of the images."
        if ratio > PREFERRED
        else "The drops keep the border of the images."
        if ratio < 1 / PREFERRED
        else "The drops prefer neither the middle nor the border of the images."
    )
    left = np.mean([each.share() for each in kept.values()])
    return Claim(
        verdict,
        f"{100 * left:.0f} % of the patches are left at the end: {100 * shares['middle']:.0f} % of those in the middle "
        f"(the inner half of each side), and {100 * shares['border']:.0f} % of the outermost ones.",
        not 1 / PREFERRED <= ratio <= PREFERRED,
    )


def _range(values, digits: int) -> str:
    shown = sorted({f"{value:.{digits}f}" for value in values}, key=float)
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _blocks(blocks) -> str:
    return ("block " if len(blocks) == 1 else "blocks ") + ", ".join(map(str, blocks))


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
