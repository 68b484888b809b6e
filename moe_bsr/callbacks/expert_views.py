"""Expert and token views during training: routing is counted at every step and drawn at evaluations.

What is drawn "in training" is the tokens of all updates since the last evaluation. "Validation" is a fixed
handful of images of each task, seen by the weights as they are then (not their moving average); they also
tell how much of the routing is still changing. Pictures of one step are comparable with those of another.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_bsr.callbacks.writer import Writer
from moe_bsr.evaluation import probe
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent
from moe_bsr.visualize import routing_log, theme
from moe_bsr.visualize.tokens import make_views, strip

IMAGES = 16  # probe images per task, of which
DRAWN = 2  # are drawn
COLORS = 256  # of a picture: a third of the bytes

ByBlock = dict[int, RoutingStatistics]


class ExpertViews(Callback):
    """Draws into the run's events; adds `expert_use` and `views` to the report.

    expert_use: {block: {task: share of each expert in the whole run's choices, summing to 1}}.
    views: recording_seconds (inside training steps), drawing_seconds (at evaluations), events_bytes.
    """

    name = "expert_views"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def on_start(self, start: StartEvent) -> None:
        self.start, self.tasks = start, start.tasks
        self.blocks = start.model.balance.blocks
        self.drops = any(plan.keep_rate < 1 for plan in start.model.plan)
        self.probes = {task: probe.pick_probe_images(data, IMAGES) for task, data in start.data.items()}
        if not self.blocks and start.step == 0:
            self.writer.text("experts", routing_log.no_experts(self.drops), 0)

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
        probed = {
            task: probe.run_probe(start.model, data, start.transforms, start.runtime)
            for task, data in self.probes.items()
        }
        if self.blocks:
            self._write_numbers(probed, step)
            self._draw_experts(probed, step)
        for task, result in probed.items():
            views = make_views(result, start.data[task].class_names, start.model.vit.patch_embed.grid_size)[:DRAWN]
            experts = start.config.moe.num_experts if self.blocks else 0
            self._draw(f"tokens/{task}", strip(task, views, experts, f"validation, step {step:,}"), step)
        self.whole, self.window = self._whole_run(), {}
        self.since, self.balance = step, [0.0, 0]
        self.drawing += time.perf_counter() - began

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
        self.whole = _from_json(state.get("whole", {}))  # up to the last evaluation
        self.window = _from_json(state.get("window", {}))  # since then
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
                self.writer.scalar(f"experts/block{block}/{name}", value, step)
        if self.balance[1]:
            self.writer.scalar("experts/balance_loss", self.balance[0] / self.balance[1], step)

    def _draw_experts(self, probed: dict[str, probe.ProbeResult], step: int) -> None:
        validation: ByBlock = {}
        for task, result in probed.items():
            for block in self.blocks:
                _count(validation, block, self.tasks, task, result.records[block].routing)
        updates = f"training, updates {self.since + 1:,} to {step:,}"
        if self.window:
            self.writer.text("experts", routing_log.table(self.window, updates), step)
            for tag, figure in routing_log.training_figures(self.window, updates):
                self._draw(tag, figure, step)
        for tag, figure in routing_log.validation_figures(validation, f"validation, {IMAGES} images per task", step):
            self._draw(tag, figure, step)

    def _stability(self, probed: dict[str, probe.ProbeResult]) -> dict[int, float]:
        """By block, how much of the probe images' routing is as it was at the last evaluation."""
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

    def _draw(self, tag: str, figure, step: int) -> None:
        self.writer.picture(tag, theme.png(figure, COLORS), step)


def _count(by_block: ByBlock, block: int, tasks: list[str], task: str, routing) -> None:
    if block not in by_block:
        by_block[block] = RoutingStatistics(tasks, routing.probabilities.shape[-1])
    by_block[block].add(task, routing)


def _to_json(by_block: ByBlock) -> dict[str, Any]:
    return {str(block): statistics.state() for block, statistics in by_block.items()}


def _from_json(state: dict[str, Any]) -> ByBlock:
    return {int(block): RoutingStatistics.from_state(values) for block, values in state.items()}
