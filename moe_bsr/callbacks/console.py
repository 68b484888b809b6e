"""The console: a tqdm bar on a terminal, plain lines in a file."""

import sys
import time

from tqdm import tqdm

from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent

MAX_LINES = 20  # progress lines over a run when there is no terminal


class Console(Callback):
    name = "console"
    bar: tqdm | None = None

    def on_start(self, start: StartEvent) -> None:
        self.steps = start.config.train.steps
        self.started, self.first = time.monotonic(), start.step
        for line in start.about:
            self._say(line)
        self.bar = (
            tqdm(total=self.steps, initial=start.step, unit="update", dynamic_ncols=True, smoothing=0.05)
            if sys.stderr.isatty()
            else None
        )

    def on_step(self, step: StepEvent) -> None:
        m = step.metrics
        text = f"{step.task} loss {m['loss']:.3f} acc {m['accuracy']:.0%}"
        if self.bar is not None:
            self.bar.update(step.step - self.bar.n)
            self.bar.set_postfix_str(f"{text} | {_progress(step)}", refresh=False)
        elif step.step % max(1, self.steps // MAX_LINES) == 0 or step.step == self.steps:
            done = step.step - self.first
            left = (time.monotonic() - self.started) / done * (self.steps - step.step)
            self._say(
                f"{step.step:>6}/{self.steps} {text} lr {m['lr']:.2e} | {step.images_per_second:.0f} "
                f"images/s, {left:.0f} s left | {_progress(step)}"
            )

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        scores = "  ".join(f"{task} {s['top1']:.1f}" for task, s in evaluation.scores.items())
        mean = sum(s["top1"] for s in evaluation.scores.values()) / len(evaluation.scores)
        self._say(f"{evaluation.step:>6}/{self.steps} {evaluation.split} top-1 %: {scores}  mean {mean:.2f}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _progress(step: StepEvent) -> str:
    """Realized updates and epochs of each task."""
    return " ".join(f"{task}:{int(p['updates'])}u/{p['epochs']:.1f}ep" for task, p in step.progress.items())
