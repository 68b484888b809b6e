"""TensorBoard: scalars per task, the pages that gather them, and the budget for everything drawn.

Training is under `train/<task>/`, evaluations under `val/<task>/`. Other observers draw through `picture`
and `text`, so that all of a run is in one event file that a resume can cut back.
"""

import math
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from moe_bsr.callbacks import hparams
from moe_bsr.runs.report import markdown
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent
from moe_bsr.visualize import theme as style

SCORES = ("top1", "top5", "mean_class_accuracy", "ece", "loss")
CAP = 20_000_000  # bytes of events for every hour of training begun: beyond it no picture is written
POINTS = 2000  # most training points per task and number; TensorBoard itself shows 1000
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
    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self.writer: SummaryWriter | None = None

    def restore(self, state: dict) -> None:
        """Cut the event files back to their length at the checkpoint and delete later ones."""
        lengths = state.get("bytes", {})
        for file in self._files():
            if file.name in lengths:
                with file.open("ab") as stream:
                    stream.truncate(min(file.stat().st_size, lengths[file.name]))
            else:
                file.unlink()
        self.seconds, self.full = state.get("seconds", 0.0), state.get("full", False)

    def on_start(self, start: StartEvent) -> None:
        self.config, self.started = start.config, time.monotonic()
        self.every = math.ceil(start.config.train.steps / POINTS)
        self.writer = SummaryWriter(str(self.folder))
        if start.step == 0:
            self.writer.add_text("run", "\n\n".join(start.about))
            self.writer.add_custom_scalars(layout(bool(start.config.plan.moe_blocks)))

    def on_step(self, step: StepEvent) -> None:
        if step.progress[step.task]["updates"] % self.every:
            return
        for name, value in step.metrics.items():
            tag = f"train/{step.task}/{name}" if name != "lr" else "train/lr"
            self.writer.add_scalar(tag, value, step.step)
        self.writer.add_scalar("speed/images_per_second", step.images_per_second, step.step)

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        for task, scores in evaluation.scores.items():
            for name in SCORES:
                self.writer.add_scalar(f"{evaluation.split}/{task}/{name}", scores[name], evaluation.step)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve; a number that cannot be said (NaN) is left out."""
        if not math.isnan(value):
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, words: str, step: int) -> None:
        """A text card; Markdown."""
        self.writer.add_text(tag, words, step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Write a PNG file's bytes if the cap allows; the first time it does not, say so in a text."""
        if self.size() + len(png) <= CAP * self._hours_begun():
            style.write_png(self.writer, tag, png, step)
        elif not self.full:
            self.full = True
            self.text(
                "pictures",
                f"Some pictures are left out: the events may grow by {CAP / 1e6:.0f} MB "
                "for each hour of training. `tools/expert_views.py` draws them afterwards.",
                step,
            )

    def size(self) -> int:
        """Bytes of all event files."""
        self.writer.flush()
        return sum(file.stat().st_size for file in self._files())

    def state(self) -> dict:
        self.writer.flush()
        return {
            "bytes": {file.name: file.stat().st_size for file in self._files()},
            "seconds": self._trained(),
            "full": self.full,
        }

    def on_end(self, report: dict) -> None:
        self.writer.add_text("report", markdown(report))
        hparams.write(self.writer, self.config, report)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _files(self) -> list[Path]:
        return list(self.folder.glob("events.out.tfevents.*"))

    def _trained(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _hours_begun(self) -> int:
        return max(1, math.ceil(self._trained() / 3600))


def layout(experts: bool) -> dict[str, dict[str, list]]:
    """The custom-scalars pages: "Tasks" with a curve per task and, with experts, "Experts" per MoE block."""
    pages = {"Tasks": {title: ["Multiline", [tags]] for title, tags in TASK_CHARTS.items()}}
    if experts:
        pages["Experts"] = {
            title: ["Multiline", [rf"experts/block\d+/{name}$"]] for title, name in EXPERT_CHARTS.items()
        }
        pages["Experts"]["balance loss, weighted"] = ["Multiline", ["experts/balance_loss$"]]
    return pages
