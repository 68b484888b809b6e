"""TensorBoard scalars, per task: training under `train/<task>/`, evaluations under `val/<task>/`."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from moe_bsr.observers import Evaluation, Observer, Start, Step
from moe_bsr.report import markdown

SCORES = ("top1", "top5", "mean_class_accuracy", "ece", "loss")


class TensorBoard(Observer):
    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self.writer: SummaryWriter | None = None

    def restore(self, state: dict) -> None:
        """Cut the event files back to their length at the checkpoint and delete later ones."""
        lengths = state.get("bytes", {})
        for file in self.folder.glob("events.out.tfevents.*"):
            if file.name in lengths:
                with file.open("ab") as stream:
                    stream.truncate(min(file.stat().st_size, lengths[file.name]))
            else:
                file.unlink()

    def on_start(self, start: Start) -> None:
        self.writer = SummaryWriter(str(self.folder))
        if start.step == 0:
            self.writer.add_text("run", "\n\n".join(start.about))

    def on_step(self, step: Step) -> None:
        for name, value in step.metrics.items():
            tag = f"train/{step.task}/{name}" if name != "lr" else "train/lr"
            self.writer.add_scalar(tag, value, step.step)
        self.writer.add_scalar("speed/images_per_second", step.images_per_second, step.step)

    def on_evaluate(self, evaluation: Evaluation) -> None:
        for task, scores in evaluation.scores.items():
            for name in SCORES:
                self.writer.add_scalar(f"{evaluation.split}/{task}/{name}", scores[name], evaluation.step)

    def state(self) -> dict:
        self.writer.flush()
        return {"bytes": {f.name: f.stat().st_size for f in self.folder.glob("events.out.tfevents.*")}}

    def on_end(self, report: dict) -> None:
        self.writer.add_text("report", markdown(report))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
