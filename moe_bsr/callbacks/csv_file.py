"""Write `metrics.csv`: one row per task for each update and each evaluation, for spreadsheets and pandas."""

import csv
import io
from pathlib import Path

from moe_bsr.callbacks.numbers import SCORES
from moe_bsr.runtime import files
from moe_bsr.training.callback import Callback, EvalEvent, StepEvent

TRAINING = ("loss", "auxiliary_loss", "accuracy", "lr", "gradient_norm", "images", "epochs")
COLUMNS = ("step", "task", "split", *TRAINING, *(name for name in SCORES if name not in TRAINING))


class Csv(Callback):
    """Writes `metrics.csv` into the run folder. `split` is train, val or test; missing values stay empty."""

    name = "csv"

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "metrics.csv"

    def restore(self, state: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.open_file(self.path, "ab") as stream:
            stream.truncate(state.get("bytes", 0))
        if not state.get("bytes"):
            self._write([dict(zip(COLUMNS, COLUMNS, strict=True))])

    def on_step(self, step: StepEvent) -> None:
        self._write(
            [{"step": step.step, "task": step.task, "split": "train"} | step.metrics | step.progress[step.task]]
        )

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        place = {"step": evaluation.step, "split": evaluation.split}
        self._write([place | {"task": task} | scores for task, scores in evaluation.scores.items()])

    def state(self) -> dict:
        return {"bytes": self.path.stat().st_size}

    def _write(self, rows: list[dict]) -> None:
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n").writerows(rows)
        with files.open_file(self.path, "ab") as stream:
            files.write_all(stream, text.getvalue().encode())
