"""Write a run's curves, its report and its row in the HParams tab for TensorBoard.

TensorBoard sorts sections by name. The names are chosen to give this order:

    accuracy/<task>, loss/<task>   a chart per task, training against validation
    train/..., val/...             a chart per number with a curve per task; val/top1 also has the mean, which selects
                                   the checkpoint, and a dot at the selected one
    what .../<task>, where ...     pictures (`mistakes`, `expert_views`)
    which experts work/...         a chart per number with a curve per block (`expert_views`)
    with what result/...           values of the HParams tab

With many tasks (`runtime.top_list`), train/... shows their mean, val/... their spread, and the text `tasks` lists the
worst ones (`many_tasks.py`). Then single tasks have only the chart accuracy/<task>, which the page can filter by name.

Test scores appear only in the report, because charts are used to choose between runs.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from moe_bsr.callbacks import hparams, many_tasks
from moe_bsr.callbacks.numbers import SCORES
from moe_bsr.callbacks.writer import Writer
from moe_bsr.runs.report import markdown, selection
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.top_list import MEAN, are_many
from moe_bsr.training.callback import Callback, EvalEvent, PlanEvent, StartEvent, StepEvent

MAX_POINTS = 2000  # training points per task and number; TensorBoard itself shows 1000

# Sub-runs besides those of the tasks. No task can have such a name.
SELECTED, TRAINING, VALIDATION = "selected step", "in training", "on validation"
ALL = "(mean of tasks)"  # sorted before every task's name


class TensorBoard(Callback):
    name = "tensorboard"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def restore(self, state: dict[str, Any]) -> None:
        self.writer.restore(state)
        # By task, since the last evaluation: sum of losses, sum of accuracies in percent, number of updates.
        self.window: dict[str, list[float]] = state.get("window", {})
        # The best evaluation so far: its step, mean top-1, and top-1 by task, in percent.
        self.best: dict[str, Any] = state.get("best", {})
        self.many = many_tasks.Curves(self.writer, state.get("many", {}))

    def on_start(self, start: StartEvent) -> None:
        self.config, self.steps, self.are_many = start.config, start.config.train.steps, are_many(start.tasks)
        self.every = math.ceil(start.config.train.steps / MAX_POINTS)
        if start.step == 0:
            blocks = [f"block {block}" for block in start.model.balance.blocks]
            mean = [MEAN] if len(start.tasks) > 1 else []
            curves = many_tasks.RUNS if are_many(start.tasks) else [*start.tasks, *mean]
            self.writer.begin([*curves, SELECTED, TRAINING, VALIDATION, *blocks, ""])
            self.writer.text("run", "\n\n".join(map(printable, start.about)), 0)

    def on_step(self, step: StepEvent) -> None:
        sums = self.window.get(step.task, [0.0, 0.0, 0])
        loss, accuracy = step.metrics["loss"], 100 * step.metrics["accuracy"]
        self.window[step.task] = [sums[0] + loss, sums[1] + accuracy, sums[2] + 1]
        if self.are_many:
            self.many.on_step(step, self.steps)
            return
        if step.progress[step.task]["updates"] % self.every:
            return
        for name, value in step.metrics.items():
            self.writer.scalar(f"train/{name}", value, step.step, "" if name == "lr" else step.task)
        self.writer.scalar("train/images_per_second", step.images_per_second, step.step)

    def on_plan(self, plan: PlanEvent) -> None:
        self.steps = plan.steps

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        if evaluation.split != "val":
            return
        scores, step = evaluation.scores, evaluation.step
        means = {name: fmean(of_task[name] for of_task in scores.values()) for name in SCORES}
        for name in SCORES if not self.are_many else ():
            for task, of_task in scores.items():
                self.writer.scalar(f"val/{name}", of_task[name], step, task)
            if len(scores) > 1:
                self.writer.scalar(f"val/{name}", means[name], step, MEAN)
        if self.are_many:
            self.many.on_evaluate(evaluation, SCORES)
        training = {task: (loss / n, accuracy / n) for task, (loss, accuracy, n) in self.window.items()}
        validation = {task: (of_task["loss"], of_task["top1"]) for task, of_task in scores.items()}
        for run, values in ((TRAINING, training), (VALIDATION, validation)):
            if len(scores) > 1 and values.keys() == scores.keys():
                values = {ALL: tuple(fmean(column) for column in zip(*values.values(), strict=True))} | values
            for name, (loss, accuracy) in values.items():
                self.writer.scalar(f"accuracy/{name}", accuracy, step, run)
                if name == ALL or not self.are_many:
                    self.writer.scalar(f"loss/{name}", loss, step, run)
        self.window = {}
        if self.config.train.checkpoint_selection == "last" or means["top1"] > self.best.get("mean", -1):
            top1 = {task: of_task["top1"] for task, of_task in scores.items()}
            self.best = {"step": step, "mean": means["top1"], "top1": top1}

    def state(self) -> dict[str, Any]:
        of_many = {"many": self.many.state()} if self.many.state() else {}
        return self.writer.state() | {"window": self.window, "best": self.best} | of_many

    def on_end(self, report: Mapping[str, Any]) -> None:
        step = report["step"]
        self.writer.text("report", markdown(report, whole=False), step)
        self.writer.text("selected step", selection(report), step)
        if report["status"] == "finished" and report["selected_mean_val_top1"] is not None:
            chosen, top1 = report["selected_step"], report["selected_mean_val_top1"]
            self.writer.scalar("val/top1", top1, chosen, SELECTED)
            of_tasks = self.best["top1"] if self.best.get("step") == chosen and not self.are_many else {}
            hparams.write(self.writer, self.config, report, of_tasks)

    def close(self) -> None:
        self.writer.flush()
