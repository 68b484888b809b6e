"""Writes a run's TensorBoard events: one writer for all callbacks, so that all events are in one file.

A resume cuts the event files back to their length at the checkpoint. Pictures have a budget of bytes.
"""

import math
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from moe_bsr.runtime.files import open_file
from moe_bsr.visualize import theme

BUDGET = 20_000_000  # bytes of events for every hour of training begun: beyond it no picture is written


class Writer:
    """Events of one run. The `TensorBoard` callback keeps its state in the checkpoints and closes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._summary: SummaryWriter | None = None
        self._start(0.0, False)

    @property
    def summary(self) -> SummaryWriter:
        """torch's writer, for everything that is not below; opened at the first event."""
        if self._summary is None:
            self._summary = SummaryWriter(str(self.folder))
        return self._summary

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve; a number that is not defined (NaN) is left out."""
        if not math.isnan(value):
            self.summary.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text card."""
        self.summary.add_text(tag, markdown, step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """The bytes of a PNG file, if the budget allows; the first time it does not, a text says so."""
        if self.size() + len(png) <= BUDGET * max(1, math.ceil(self._trained() / 3600)):
            theme.write_png(self.summary, tag, png, step)
        elif not self._full:
            self._full = True
            self.text(
                "pictures",
                f"Some pictures are left out: the events may grow by {BUDGET / 1e6:.0f} MB for each hour of training. "
                "All of them can be drawn afterwards, from the run's checkpoint.",
                step,
            )

    def size(self) -> int:
        """Bytes of all event files."""
        self._flush()
        return sum(file.stat().st_size for file in self._files())

    def state(self) -> dict[str, Any]:
        """JSON values; see `Callback.state`."""
        self._flush()
        return {
            "bytes": {file.name: file.stat().st_size for file in self._files()},
            "seconds": self._trained(),
            "full": self._full,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Cut the event files back to their length at the checkpoint and delete later ones."""
        lengths = state.get("bytes", {})
        for file in self._files():
            if file.name in lengths:
                with open_file(file, "ab") as stream:
                    stream.truncate(min(file.stat().st_size, lengths[file.name]))
            else:
                file.unlink()
        self._start(state.get("seconds", 0.0), state.get("full", False))

    def close(self) -> None:
        if self._summary is not None:
            self._summary.close()
            self._summary = None

    def _start(self, seconds: float, full: bool) -> None:
        self._seconds, self._full, self._started = seconds, full, time.monotonic()

    def _trained(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _flush(self) -> None:
        if self._summary is not None:
            self._summary.flush()

    def _files(self) -> list[Path]:
        return list(self.folder.glob("events.out.tfevents.*"))
