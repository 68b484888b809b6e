"""TensorBoard: scalars per task, the custom pages that gather them, the report and the row of the HParams tab.

Training is under `train/<task>/`, evaluations under `val/<task>/` and `test/<task>/`.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe_bsr.callbacks import hparams
from moe_bsr.callbacks.writer import Writer
from moe_bsr.runs.report import markdown
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent

SCORES = ("top1", "top5", "mean_class_accuracy", "ece", "loss")
MAX_POINTS = 2000  # training points per task and number; TensorBoard itself shows 1000
TASK_CHARTS = {
    "validation top-1, %": "val/[^/]+/top1$",
    "validation loss": "val/[^/]+/loss$",
    "training accuracy": "train/[^/]+/accuracy$",
    "training loss": "train/[^/]+/loss$",
}
EXPERT_CHARTS = {
    "load CV (0: even)": "load_cv",
    "entropy of the mean choice (1: balanced)": "mean_entropy",
    "entropy of single tokens (0: sure)": "token_entropy",
    "dead experts": "dead_experts",
    "largest share": "largest_share",
    "specialization (1: an expert tells the task)": "mutual_information",
    "stability since the last evaluation (1: settled)": "stability",
}


class TensorBoard(Callback):
    name = "tensorboard"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def restore(self, state: dict[str, Any]) -> None:
        self.writer.restore(state)

    def on_start(self, start: StartEvent) -> None:
        self.config = start.config
        self.every = math.ceil(start.config.train.steps / MAX_POINTS)
        if start.step == 0:
            self.writer.summary.add_text("run", "\n\n".join(start.about))
            self.writer.summary.add_custom_scalars(layout(bool(start.config.plan.moe_blocks)))

    def on_step(self, step: StepEvent) -> None:
        if step.progress[step.task]["updates"] % self.every:
            return
        for name, value in step.metrics.items():
            tag = f"train/{step.task}/{name}" if name != "lr" else "train/lr"
            self.writer.scalar(tag, value, step.step)
        self.writer.scalar("speed/images_per_second", step.images_per_second, step.step)

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        for task, scores in evaluation.scores.items():
            for name in SCORES:
                self.writer.scalar(f"{evaluation.split}/{task}/{name}", scores[name], evaluation.step)

    def state(self) -> dict[str, Any]:
        return self.writer.state()

    def on_end(self, report: Mapping[str, Any]) -> None:
        self.writer.summary.add_text("report", markdown(report))
        hparams.write(self.writer.summary, self.config, report)

    def close(self) -> None:
        self.writer.close()


def layout(experts: bool) -> dict[str, dict[str, list]]:
    """The custom-scalars pages: "Tasks" with a curve per task and, with experts, "Experts" per MoE block."""
    pages = {"Tasks": {title: ["Multiline", [tags]] for title, tags in TASK_CHARTS.items()}}
    if experts:
        pages["Experts"] = {
            title: ["Multiline", [rf"experts/block\d+/{name}$"]] for title, name in EXPERT_CHARTS.items()
        }
        pages["Experts"]["balance loss, weighted"] = ["Multiline", ["experts/balance_loss$"]]
    return pages
