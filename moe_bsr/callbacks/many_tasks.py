"""TensorBoard curves for many tasks: mean, spread and a list of the worst tasks, instead of one curve per task.

About a hundred sub-runs stall TensorBoard's page, and a chart of two hundred curves is unreadable.
"""

from typing import Any

from moe_bsr.callbacks.writer import Writer
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.text_tables import as_markdown
from moe_bsr.runtime.top_list import spread, worst_and_best
from moe_bsr.training.callback import EvalEvent, StepEvent

RUNS = list(spread([0.0]))  # sub-runs of the curves in val/
POINTS = 200  # points of a training curve: each is the mean over all updates since the previous point
LARGE_IS_BAD = ("loss", "ece")


class Curves:
    """Writes the curves of a run with many tasks.

    Attributes:
        sums: sum of each training metric since the last point, with their count under "n" and the next point's step
            under "until".
        top1: top-1 in percent by task, at the last evaluation.
    """

    def __init__(self, writer: Writer, state: dict[str, Any]) -> None:
        """Args: state: the `state` saved in the checkpoint; {} in a new run."""
        self.writer = writer
        self.sums: dict[str, float] = state.get("sums", {})
        self.top1: dict[str, float] = state.get("top1", {})

    def state(self) -> dict[str, Any]:
        """Return JSON values; {} before the first event."""
        return {"sums": self.sums, "top1": self.top1} if self.sums or self.top1 else {}

    def on_step(self, step: StepEvent, steps: int) -> None:
        """Add one task's metrics of an update. A point is written when the next update begins.

        Args:
            steps: number of updates of the run.
        """
        if self.sums and step.step > self.sums["until"]:
            self._point()
        if not self.sums:
            every = max(1, steps // POINTS)
            self.sums = {"n": 0, "until": -(-step.step // every) * every}
        self.sums["n"] += 1
        for name, value in step.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["images_per_second"] = self.sums.get("images_per_second", 0.0) + step.images_per_second

    def on_evaluate(self, evaluation: EvalEvent, names: tuple[str, ...]) -> None:
        """Write the spread of each number over the tasks, and a list of the tasks with the lowest accuracy."""
        if self.sums:
            self._point(evaluation.step)
        for name in names:
            values = [of_task[name] for of_task in evaluation.scores.values()]
            for run, value in spread(values, name in LARGE_IS_BAD).items():
                self.writer.scalar(f"val/{name}", value, evaluation.step, run)
        before = self.top1
        self.top1 = {task: of_task["top1"] for task, of_task in evaluation.scores.items()}
        self.writer.text("tasks", worst_list(self.top1, before), evaluation.step)

    def _point(self, step: int | None = None) -> None:
        count, until = self.sums.pop("n"), int(self.sums.pop("until"))
        for name, total in self.sums.items():
            self.writer.scalar(f"train/{name}", total / count, step or until)
        self.sums = {}


def worst_list(top1: dict[str, float], before: dict[str, float]) -> str:
    """Return Markdown tables of the tasks with the lowest and the highest validation top-1, and the largest drops.

    Args:
        before: top-1 at the previous evaluation; {} at the first.
    """
    worst, best = worst_and_best(top1)
    change = {task: value - before[task] for task, value in top1.items() if task in before}
    lists = [(f"The lowest of {len(top1)} tasks", worst), ("The highest", best)]
    fell = [task for task in worst_and_best(change)[0] if change[task] < 0]
    lists += [("What fell most since the last evaluation", fell)] if fell else []
    parts = []
    for title, tasks in lists:
        rows = [["task", "validation top-1 %", "change"]]
        rows += [[task, f"{top1[task]:.1f}", f"{change[task]:+.1f}" if task in change else "-"] for task in tasks]
        parts.append(f"{printable(title)}:\n\n{as_markdown(rows)}")
    return "\n\n".join(parts)
