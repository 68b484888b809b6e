"""`metrics.jsonl`: one object a line with step, task and named numbers.

It holds nothing measured by a clock, so that a resumed run's file equals an uninterrupted one's.
"""

import json
import os
from pathlib import Path

from moe_bsr.training.callback import Callback, EvalEvent, StepEvent

SCORES = ("top1", "top5", "mean_class_accuracy", "ece", "loss", "n")


class Jsonl(Callback):
    name = "jsonl"

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.stream = None

    def restore(self, state: dict) -> None:
        self.stream = self.path.open("ab", buffering=0)
        self.stream.truncate(min(self.path.stat().st_size, state.get("bytes", 0)))

    def on_step(self, step: StepEvent) -> None:
        self._write(
            {
                "step": step.step,
                "task": step.task,
                **step.metrics,
                "images": step.progress[step.task]["images"],
                "epochs": step.progress[step.task]["epochs"],
            }
        )

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        for task, scores in evaluation.scores.items():
            self._write(
                {
                    "step": evaluation.step,
                    "task": task,
                    "split": evaluation.split,
                    **{name: scores[name] for name in SCORES},
                }
            )

    def state(self) -> dict:
        os.fsync(self.stream.fileno())
        return {"bytes": self.path.stat().st_size}

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def _write(self, line: dict) -> None:
        self.stream.write((json.dumps(line) + "\n").encode())
