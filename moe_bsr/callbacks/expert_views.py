"""Expert and token views during training: counted at every step, drawn at evaluations.

What is drawn "in training" is the tokens of all updates since the last evaluation. "Validation" is a fixed
handful of images of each task, seen by the weights as they are then (not their moving average); they also
tell how much of the routing is still changing. Pictures of one step are comparable with those of another.
"""

import time
from typing import Any

import numpy as np

from moe_bsr.callbacks.tensorboard import TensorBoard
from moe_bsr.evaluation import probe
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent
from moe_bsr.visualize import experts as expert_figures
from moe_bsr.visualize import theme as style
from moe_bsr.visualize.tokens import strip, views_of

IMAGES = 16  # probe images per task, of which
SHOWN = 2  # are drawn
COLORS = 256  # of a picture: a third of the bytes
DENSE = (
    "There are no expert views: plan.moe_blocks is empty, so every block has one FFN that serves all "
    "tokens, and nothing is routed."
)
WHOLE = " There are no token views either: plan.drop_blocks is empty, so every patch stays to the end."


class ExpertViews(Callback):
    """Draws into the run's events; adds `expert_use` and `views` to the report.

    expert_use: {block: {task: share of each expert in the whole run's choices, summing to 1}}.
    views: recording_seconds (inside training steps), drawing_seconds (at evaluations), events_bytes.
    """

    def __init__(self, board: TensorBoard) -> None:
        self.board = board

    def restore(self, state: dict) -> None:
        self.whole = _read(state.get("whole", {}))
        self.window = _read(state.get("window", {}))
        self.before = {
            task: {int(block): probe.unpack(packed) for block, packed in blocks.items()}
            for task, blocks in state.get("before", {}).items()
        }
        self.since: int = state.get("since", 0)
        self.balance: list[float] = state.get("balance", [0.0, 0])  # sum, number of terms
        self.recording: float = state.get("recording", 0.0)
        self.drawing: float = state.get("drawing", 0.0)

    def on_start(self, start: StartEvent) -> None:
        self.start, self.tasks = start, start.tasks
        self.blocks = start.model.balance.blocks
        self.draws = bool(self.blocks) or any(plan.keep_rate < 1 for plan in start.model.plan)
        self.probes = {task: probe.pick_probe_images(data, IMAGES) for task, data in start.data.items()}
        if not self.blocks and start.step == 0:
            self.board.text("experts", DENSE + WHOLE * (not self.draws), 0)

    def on_step(self, step: StepEvent) -> None:
        began = time.perf_counter()
        for output in step.outputs:
            for block, routing in output.routing.items():
                if block not in self.window:
                    self.window[block] = RoutingStatistics(self.tasks, routing.probabilities.shape[-1])
                self.window[block].add(step.task, routing)
        self.balance = [self.balance[0] + step.metrics["auxiliary_loss"], self.balance[1] + 1]
        self.recording += time.perf_counter() - began

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        if evaluation.split != "val" or not self.draws:
            return
        began, step, start = time.perf_counter(), evaluation.step, self.start
        seen = {
            task: probe.run_probe(start.model, data, start.transforms, start.runtime)
            for task, data in self.probes.items()
        }
        if self.blocks:
            self._write_experts(seen, step)
        for task, found in seen.items():
            self._picture(f"tokens/{task}", self._strip(task, found, step), step)
        self._close_window(step)
        self.drawing += time.perf_counter() - began

    def on_end(self, report: dict) -> None:
        report["expert_use"] = {
            str(block): {
                task: [round(share, 4) for share in row]
                for task, row in zip(s.tasks, s.shares("count").tolist(), strict=True)
                if not np.isnan(row[0])
            }
            for block, s in sorted(self._all().items())
        }
        report["views"] = {
            "recording_seconds": self.recording,
            "drawing_seconds": self.drawing,
            "events_bytes": self.board.size(),
        }

    def state(self) -> dict[str, Any]:
        return {
            "whole": _written(self.whole),
            "window": _written(self.window),
            "since": self.since,
            "before": {
                task: {str(block): probe.pack(routes) for block, routes in blocks.items()}
                for task, blocks in self.before.items()
            },
            "balance": self.balance,
            "recording": self.recording,
            "drawing": self.drawing,
        }

    def _all(self) -> dict[int, RoutingStatistics]:
        """Of the whole run so far."""
        found = _read(_written(self.whole))
        for block, counted in self.window.items():
            found.setdefault(block, RoutingStatistics(counted.tasks, counted.experts)).merge(counted)
        return found

    def _close_window(self, step: int) -> None:
        self.whole, self.window = self._all(), {}
        self.since, self.balance = step, [0.0, 0]

    def _write_experts(self, seen: dict[str, probe.ProbeResult], step: int) -> None:
        """Scalars, the table and the pictures of all MoE blocks."""
        training, validation = self.window, {}
        for task, found in seen.items():
            for block in self.blocks:
                routing = found.records[block].routing
                validation.setdefault(block, RoutingStatistics(self.tasks, routing.probabilities.shape[-1]))
                validation[block].add(task, routing)
        stability = self._stability(seen)
        for block in self.blocks:
            numbers = training[block].numbers() if block in training else {}
            for name, value in (numbers | {"stability": stability.get(block, np.nan)}).items():
                self.board.scalar(f"experts/block{block}/{name}", value, step)
        if self.balance[1]:
            self.board.scalar("experts/balance_loss", self.balance[0] / self.balance[1], step)
        updates = f"training, updates {self.since + 1:,} to {step:,}"
        images = f"validation, {IMAGES} images per task"
        kinds = [("validation", validation, images, step)]
        if training:
            kinds.insert(0, ("training", training, updates, None))
            self.board.text("experts", _table(training, updates), step)
            self._picture("experts_overview/training", expert_figures.overview(training, updates), step)
        for kind, by_block, words, at in kinds:
            for block, statistics in sorted(by_block.items()):
                self._picture(
                    f"experts_use/block{block}_{kind}", expert_figures.heatmap(statistics, block, words, at), step
                )
        for block, statistics in sorted(training.items()):
            if statistics.top_k > 1:
                self._picture(
                    f"experts_together/block{block}", expert_figures.coactivation(statistics, block, updates), step
                )
            if len(self.tasks) > 1:
                self._picture(f"tasks_apart/block{block}", expert_figures.distances(statistics, block, updates), step)

    def _stability(self, seen: dict[str, probe.ProbeResult]) -> dict[int, float]:
        """By block, how much of the probe images' routing is as it was at the last evaluation."""
        vit = self.start.model.vit
        now = {
            task: probe.expert_map(found.records, vit.num_prefix_tokens, vit.patch_embed.num_patches)
            for task, found in seen.items()
        }
        before, self.before = self.before, now
        return {
            block: float(np.mean([probe.expert_overlap(now[task][block], before[task][block]) for task in now]))
            for block in self.blocks
            if before
        }

    def _strip(self, task: str, found: probe.ProbeResult, step: int):
        grid = self.start.model.vit.patch_embed.grid_size
        views = views_of(found, self.start.data[task].class_names, grid)[:SHOWN]
        experts = self.start.config.moe.num_experts if self.blocks else 0
        return strip(task, views, experts, f"validation, step {step:,}")

    def _picture(self, tag: str, figure, step: int) -> None:
        self.board.picture(tag, style.png(figure, COLORS), step)


def _read(state: dict) -> dict[int, RoutingStatistics]:
    return {int(block): RoutingStatistics.from_state(values) for block, values in state.items()}


def _written(by_block: dict[int, RoutingStatistics]) -> dict[str, Any]:
    return {str(block): statistics.state() for block, statistics in by_block.items()}


def _table(by_block: dict[int, RoutingStatistics], when: str) -> str:
    """Markdown: every block's numbers and what they say; the shares too, where the pictures have no room."""
    names = list(next(iter(by_block.values())).numbers())
    head = " | ".join(name.replace("_", " ") for name in names)
    lines = [f"Experts, {when}", "", f"| block | {head} | in words |", "|---:" * (len(names) + 1) + "|:---|"]
    for block, statistics in sorted(by_block.items()):
        values = ("-" if np.isnan(v) else f"{v:.3g}" for v in statistics.numbers().values())
        lines.append(f"| {block} | {' | '.join(values)} | {statistics.reading()} |")
    for block, s in sorted(by_block.items()):
        if not expert_figures.numbered(len(s.tasks), s.experts):
            lines += [
                "",
                f"Block {block}: share of each expert in the task's choices, %",
                "",
                f"| task | {' | '.join(map(str, range(s.experts)))} |",
                "|:---" + "|---:" * s.experts + "|",
            ]
            lines += [
                f"| {task} | {' | '.join('-' if np.isnan(v) else f'{100 * v:.1f}' for v in row)} |"
                for task, row in zip(s.tasks, s.shares("count"), strict=True)
            ]
    return "\n".join(lines)
