"""Expert and token views during training: count routing in each update, log it at evaluations, draw it at some of them.

The expert statistics cover the tokens of all updates since the last evaluation. The token strips show a few fixed
validation images of each task, so pictures of different steps are comparable. These images run through the current
weights, not their moving average. They also measure how much the routing still changes.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_bsr.callbacks.writer import Writer
from moe_bsr.evaluation import probe
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.runtime.top_list import are_many
from moe_bsr.training.callback import Callback, EvalEvent, PlanEvent, StartEvent, StepEvent
from moe_bsr.visualize import routing_log, theme
from moe_bsr.visualize.tokens import make_views, strip

IMAGES = 8  # probe images per task
DRAWN = 2  # of them in a picture
TASKS = 8  # most tasks with a picture
DRAWINGS = 3  # drawings per run, the last at its end: drawing takes seconds
COLORS = 256  # colors of a picture: a third of the bytes
EXPERTS, PATCHES = "which experts work", "where patches go"  # TensorBoard sections; sorted after val/

ByBlock = dict[int, RoutingStatistics]


class ExpertViews(Callback):
    """Writes statistics and pictures into the run's TensorBoard events; adds `expert_use` and `views` to the report.

    expert_use: {block: {task: share of each expert in the assignments of the whole run; they sum to 1}}.
    views: recording_seconds (in training steps), drawing_seconds (at evaluations), events_bytes.
    """

    name = "expert_views"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def on_start(self, start: StartEvent) -> None:
        self.start, self.tasks, self.steps = start, start.tasks, start.config.train.steps
        self.blocks = start.model.balance.blocks
        self.drops = any(plan.keep_rate < 1 for plan in start.model.plan)
        self.probes = {task: probe.pick_probe_images(data, IMAGES) for task, data in start.data.items()}
        if not self.blocks and start.step == 0:
            self.writer.text(EXPERTS, routing_log.no_experts(self.drops), 0)

    def on_step(self, step: StepEvent) -> None:
        began = time.perf_counter()
        for output in step.outputs:
            for block, routing in output.routing.items():
                _count(self.window, block, self.tasks, step.task, routing)
        self.balance = [self.balance[0] + step.metrics["auxiliary_loss"], self.balance[1] + 1]
        self.recording += time.perf_counter() - began

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        if evaluation.split != "val" or not (self.blocks or self.drops):
            return
        began, step, start = time.perf_counter(), evaluation.step, self.start
        draws = start.config.train.pictures and drawing_due(self.since, step, self.steps)
        first = dict(list(self.probes.items())[:TASKS])
        seen = (first if are_many(self.tasks) else self.probes) if self.blocks else first if draws else {}
        probed = {
            task: probe.run_probe(start.model, data, start.transforms, start.runtime) for task, data in seen.items()
        }
        if self.blocks:
            self._write_numbers(probed, step)
        if draws:
            self._draw(probed, step)
        self.whole, self.window = self._whole_run(), {}
        self.since, self.balance = step, [0.0, 0]
        self.drawing += time.perf_counter() - began

    def on_plan(self, plan: PlanEvent) -> None:
        self.steps = plan.steps

    def on_end(self, report: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "expert_use": {
                str(block): {
                    task: [round(share, 4) for share in row]
                    for task, row in zip(s.tasks, s.shares("count").tolist(), strict=True)
                    if not np.isnan(row[0])
                }
                for block, s in sorted(self._whole_run().items())
            },
            "views": {
                "recording_seconds": self.recording,
                "drawing_seconds": self.drawing,
                "events_bytes": self.writer.size(),
            },
        }

    def state(self) -> dict[str, Any]:
        return {
            "whole": _to_json(self.whole),
            "window": _to_json(self.window),
            "since": self.since,
            "before": {
                task: {str(block): probe.pack(experts) for block, experts in blocks.items()}
                for task, blocks in self.before.items()
            },
            "balance": self.balance,
            "recording": self.recording,
            "drawing": self.drawing,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.whole = _from_json(state.get("whole", {}))  # counts up to the last evaluation
        self.window = _from_json(state.get("window", {}))  # counts since then
        self.since: int = state.get("since", 0)
        self.before = {  # experts of the probe images' tokens at the last evaluation, by task and block
            task: {int(block): probe.unpack(packed) for block, packed in blocks.items()}
            for task, blocks in state.get("before", {}).items()
        }
        self.balance: list[float] = state.get("balance", [0.0, 0])  # sum of the balance loss, number of terms
        self.recording: float = state.get("recording", 0.0)
        self.drawing: float = state.get("drawing", 0.0)

    def _whole_run(self) -> ByBlock:
        statistics = _from_json(_to_json(self.whole))
        for block, counted in self.window.items():
            statistics.setdefault(block, RoutingStatistics(counted.tasks, counted.experts)).merge(counted)
        return statistics

    def _write_numbers(self, probed: dict[str, probe.ProbeResult], step: int) -> None:
        stability = self._stability(probed)
        for block in self.blocks:
            numbers = self.window[block].numbers() if block in self.window else {}
            for name, value in (numbers | {"stability": stability.get(block, np.nan)}).items():
                self.writer.scalar(f"{EXPERTS}/{name}", value, step, f"block {block}")
        if self.balance[1]:
            self.writer.scalar(f"{EXPERTS}/balance_loss", self.balance[0] / self.balance[1], step)
        if self.window:
            self.writer.text(EXPERTS, routing_log.table(self.window, self._updates(step)), step)

    def _draw(self, probed: dict[str, probe.ProbeResult], step: int) -> None:
        if self.window:
            for name, figure in routing_log.figures(self.window, self._updates(step)):
                self.writer.picture(f"{EXPERTS}/{name}", theme.png(figure, COLORS), step)
        for task, result in list(probed.items())[:TASKS]:
            grid = self.start.model.vit.patch_embed.grid_size
            views = make_views(result, self.start.data[task].class_names, grid)[:DRAWN]
            figure = strip(
                task, views, self.start.config.moe.num_experts if self.blocks else 0, f"validation, step {step:,}"
            )
            self.writer.picture(f"{PATCHES}/{task}", theme.png(figure, COLORS), step)

    def _updates(self, step: int) -> str:
        return f"training, updates {self.since + 1:,} to {step:,}"

    def _stability(self, probed: dict[str, probe.ProbeResult]) -> dict[int, float]:
        """Return by block the share of the probe images' routing that is unchanged since the last evaluation."""
        vit = self.start.model.vit
        now = {
            task: probe.expert_map(result.records, vit.num_prefix_tokens, vit.patch_embed.num_patches)
            for task, result in probed.items()
        }
        before, self.before = self.before, now
        return {
            block: float(np.mean([probe.expert_overlap(now[task][block], before[task][block]) for task in now]))
            for block in self.blocks
            if before
        }


def drawing_due(since: int, step: int, steps: int) -> bool:
    """Return whether to draw at this evaluation: the first after each third of the run, and the last."""
    return step * DRAWINGS // steps > since * DRAWINGS // steps


def _count(by_block: ByBlock, block: int, tasks: list[str], task: str, routing) -> None:
    if block not in by_block:
        by_block[block] = RoutingStatistics(tasks, routing.probabilities.shape[-1])
    by_block[block].add(task, routing)


def _to_json(by_block: ByBlock) -> dict[str, Any]:
    return {str(block): statistics.state() for block, statistics in by_block.items()}


def _from_json(state: dict[str, Any]) -> ByBlock:
    return {int(block): RoutingStatistics.from_state(values) for block, values in state.items()}
