"""Report the routing of a training run at each evaluation: figures, and a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.runtime.top_list import are_many
from moe_bsr.visualize import experts, many_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def no_experts(drops: bool) -> str:
    """Say why a run without MoE blocks has no expert views, and without drops no token views either."""
    text = (
        "There are no expert views: plan.moe_blocks is empty, so every block has one FFN that serves all "
        "tokens, and nothing is routed."
    )
    if not drops:
        text += " There are no token views either: plan.drop_blocks is empty, so every patch is kept to the end."
    return text


def figures(by_block: dict[int, RoutingStatistics], updates: str) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for the routing counted in training; `updates` says in which updates."""
    yield "all blocks", experts.overview(by_block, updates)
    for block, statistics in sorted(by_block.items()):
        yield f"block {block}", many_tasks.heatmap(statistics, block, updates)


def table(by_block: dict[int, RoutingStatistics], when: str) -> str:
    """Return Markdown: the numbers of every block and their meaning, and the shares if the figures cannot show them.

    For many tasks, the shares are only in the report (`expert_use`).
    """
    names = list(next(iter(by_block.values())).numbers())
    head = " | ".join(name.replace("_", " ") for name in names)
    lines = [f"Experts, {when}", "", f"| block | {head} | in words |", "|---:" * (len(names) + 1) + "|:---|"]
    for block, statistics in sorted(by_block.items()):
        values = ("-" if np.isnan(v) else f"{v:.3g}" for v in statistics.numbers().values())
        lines.append(f"| {block} | {' | '.join(values)} | {statistics.reading()} |")
    for block, statistics in sorted(by_block.items()):
        tasks = statistics.tasks
        if not are_many(tasks) and not experts.has_room_for_numbers(len(tasks), statistics.experts):
            lines += _shares(block, statistics)
    return "\n".join(lines)


def _shares(block: int, statistics: RoutingStatistics) -> list[str]:
    lines = [
        "",
        f"Block {block}: share of each expert in the task's choices, %",
        "",
        f"| task | {' | '.join(map(str, range(statistics.experts)))} |",
        "|:---" + "|---:" * statistics.experts + "|",
    ]
    for task, row in zip(statistics.tasks, statistics.shares("count"), strict=True):
        lines.append(f"| {task} | {' | '.join('-' if np.isnan(v) else f'{100 * v:.1f}' for v in row)} |")
    return lines
