"""Write `metrics.jsonl`: one object per line, with step, task and numbers by name.

It holds no timings, so the file of a resumed run equals that of an uninterrupted one. It is the run's own record: if it
cannot be written, the run ends. Lines that did not fit on the disk go into the checkpoint.
"""

import json
import os
import warnings
import zlib
from pathlib import Path
from typing import IO

from moe_bsr.callbacks.numbers import SCORES
from moe_bsr.runtime import files
from moe_bsr.training.callback import Callback, EvalEvent, StepEvent


class Jsonl(Callback):
    """Writes `metrics.jsonl` into the run folder.

    Attributes:
        unwritten: lines that could not be written yet. checksum: CRC-32 of the file.
    """

    name = "jsonl"
    essential = True

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.stream: IO[bytes] | None = None
        self.unwritten = b""
        self.checksum = 0

    def restore(self, state: dict) -> None:
        """Cut the file back to its length at the checkpoint, and append the unwritten lines.

        Raises:
            ValueError: `state` is not a state of this callback.
        """
        length, unwritten = state.get("bytes", 0), state.get("unwritten", "")
        if type(length) is not int or length < 0 or not isinstance(unwritten, str):
            raise ValueError(f"no state of {self.path.name}: {state!a:.80}")
        self.unwritten = unwritten.encode()
        self.stream = files.open_file(self.path, "ab")
        there = self.path.stat().st_size
        is_cut = there < length
        if is_cut:
            warnings.warn(
                f"{self.path} has {there} bytes of the {length} it had at the checkpoint: earlier lines are lost",
                stacklevel=2,
            )
            length = files.read_bytes(self.path).rfind(b"\n") + 1  # drop an incomplete last line
        self.stream.truncate(length)
        self.checksum = zlib.crc32(files.read_bytes(self.path))
        if not is_cut and state.get("crc32", self.checksum) != self.checksum:
            warnings.warn(f"{self.path} was changed by somebody else", stacklevel=2)
        self._write_out()

    def on_step(self, step: StepEvent) -> None:
        place = {"step": step.step, "task": step.task}
        shown = {name: step.progress[step.task][name] for name in ("images", "epochs")}
        self._write([place | step.metrics | shown])

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        self._write(
            [
                {"step": evaluation.step, "task": task, "split": evaluation.split}
                | {name: scores[name] for name in (*SCORES, "n")}
                for task, scores in evaluation.scores.items()
            ]
        )

    def state(self) -> dict:
        os.fsync(self.stream.fileno())
        state = {"bytes": self.path.stat().st_size, "crc32": self.checksum}
        return state | {"unwritten": self.unwritten.decode()} if self.unwritten else state

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def _write(self, lines: list[dict]) -> None:
        self.unwritten += "".join(json.dumps(line) + "\n" for line in lines).encode()
        self._write_out()

    def _write_out(self) -> None:
        while self.unwritten:  # a call may write only a part, for example if the disk is nearly full
            count = self.stream.write(self.unwritten)
            self.checksum = zlib.crc32(self.unwritten[:count], self.checksum)
            self.unwritten = self.unwritten[count:]
