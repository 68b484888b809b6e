"""Console output: a table with a row for each twentieth of a run and each evaluation, and a progress bar on a terminal.

A row shows the mean loss and accuracy of every task over the updates since the previous row, even if the row's own
update trained another task. If there are many tasks, it shows their mean and the worst and best tasks.
"""

import sys
import time
from statistics import fmean

from tqdm import tqdm

from moe_bsr.runtime.names import pad, printable, shorten
from moe_bsr.runtime.top_list import worst_and_best
from moe_bsr.training.callback import Callback, EvalEvent, PlanEvent, StartEvent, StepEvent

ROWS = 20  # training rows over a run
MANY = 8  # up to this many tasks have a column each
EXTREMES = 2  # worst and best tasks to name if there are more
CELL = 11  # characters of a task's column: "  2.31  12%"


class Console(Callback):
    name = "console"
    bar: tqdm | None = None

    def on_start(self, start: StartEvent) -> None:
        self.tasks, self.steps = start.tasks, start.config.train.steps
        self.started, self.first = time.monotonic(), start.step
        self.has_header = False
        self._begin_row()
        for line in start.about:
            self._say(line)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=start.step, unit="update", dynamic_ncols=True, smoothing=0.05)

    def on_step(self, step: StepEvent) -> None:
        """Collect metrics. A row is printed when the next update begins, after all tasks of its own update."""
        if self.bar is not None:
            self.bar.update(step.step - self.bar.n)
        if self.due and step.step > self.due.step:
            self._training_row(self.due)
        self.seen.setdefault(step.task, []).append((step.metrics["loss"], 100 * step.metrics["accuracy"]))
        self.seconds_per_image.append(1 / step.images_per_second)
        self.due = step if step.step % max(1, self.steps // ROWS) == 0 or step.step == self.steps else None

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        if self.due:
            self._training_row(self.due)
        top1 = {task: scores["top1"] for task, scores in evaluation.scores.items()}
        cells = {task: f"{evaluation.split} {value:5.1f}%" for task, value in top1.items()}
        mean = f"{evaluation.split} mean {fmean(top1.values()):.2f}%"
        if len(self.tasks) > MANY:
            self._row(
                evaluation.step, [pad(f"{evaluation.split} {fmean(top1.values()):5.1f}%", CELL, right=True)], top1
            )
        else:
            self._row(evaluation.step, [cells.get(task, "") for task in self.tasks], {}, mean)

    def on_plan(self, plan: PlanEvent) -> None:
        self.steps = plan.steps
        if self.bar is not None:
            self.bar.total = plan.steps
        self._say(
            f"the machine is slower than at the start: {plan.steps} updates instead of {plan.before}, to keep "
            "train.minutes"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin_row(self) -> None:
        self.seen: dict[str, list[tuple[float, float]]] = {}
        self.seconds_per_image: list[float] = []
        self.due: StepEvent | None = None

    def _training_row(self, step: StepEvent) -> None:
        means = {task: [fmean(column) for column in zip(*rows, strict=True)] for task, rows in self.seen.items()}
        left = (time.monotonic() - self.started) / (step.step - self.first) * (self.steps - step.step)
        rest = (
            f"{1 / fmean(self.seconds_per_image):8.0f}  {tqdm.format_interval(left):>8}  {step.metrics['lr']:.1e}  "
            f"{_epochs(step)}"
        )
        if len(self.tasks) > MANY:
            both = [fmean(column) for column in zip(*means.values(), strict=True)]
            self._row(step.step, [_cell(both)], {task: accuracy for task, (_, accuracy) in means.items()}, rest)
        else:
            self._row(step.step, [_cell(means.get(task)) for task in self.tasks], {}, rest)
        self._begin_row()

    def _row(self, step: int, cells: list[str], of_tasks: dict[str, float], rest: str = "") -> None:
        """Print a row. of_tasks: percent by task; the worst and best ones are named."""
        if not self.has_header:
            self._header()
        words = [pad(f"{step}/{self.steps}", self._width(), right=True)]
        words += [pad(cell, CELL, right=True) for cell in cells]
        words += [rest] if rest else []
        if of_tasks:
            worst, best = worst_and_best(of_tasks, EXTREMES, EXTREMES)
            words.append(
                "; ".join(
                    f"{name} {', '.join(f'{task} {of_tasks[task]:.0f}%' for task in tasks)}"
                    for name, tasks in (("worst", worst), ("best", best))
                    if tasks
                )
            )
        self._say("  ".join(words).rstrip())

    def _header(self) -> None:
        names = self.tasks if len(self.tasks) <= MANY else [f"{len(self.tasks)} tasks"]
        rest = "images/s      left  lr       epochs"
        for first, cells, last in (
            ("", [shorten(name, CELL) for name in names], ""),
            ("update", ["loss  acc"] * len(names), rest),
        ):
            words = [pad(first, self._width(), right=True), *(pad(cell, CELL, right=True) for cell in cells), last]
            self._say("  ".join(words).rstrip())
        self.has_header = True

    def _width(self) -> int:
        return max(6, 2 * len(str(self.steps)) + 1)

    def _say(self, line: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def _cell(means: list[float] | None) -> str:
    """Format loss and accuracy in percent, or a dash for a task without updates."""
    return "-" if means is None else f"{means[0]:6.2f} {means[1]:3.0f}%"


def _epochs(step: StepEvent) -> str:
    """Format the fewest and the most epochs of a task so far."""
    done = sorted({f"{progress['epochs']:.1f}" for progress in step.progress.values()}, key=float)
    return done[0] if len(done) == 1 else f"{done[0]}-{done[-1]}"
