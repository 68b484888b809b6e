"""Write a run's TensorBoard events, one file per sub-run, and cut them back on resume.

TensorBoard gives each sub-run (a folder) a color and an entry in the legend. So values to compare in one chart, such as
those of the tasks, have the same tag in different sub-runs. Each sub-run has a single file, however often the run is
resumed. No file is held open, so hundreds of tasks need neither threads nor file handles. A resumed run rewrites the
events after the checkpoint at the same positions in the file, so a running TensorBoard keeps reading it.
"""

import contextlib
import io
import math
import os
import stat
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from moe_bsr.runtime.files import open_file
from moe_bsr.runtime.names import printable

FILE = "events.out.tfevents.0"
BUDGET = 20_000_000  # bytes of events per started hour of training; beyond it no picture is written
SECONDS = 10  # most seconds between writes, for live viewing


class Writer:
    """Event files of one run. The `TensorBoard` callback saves its state in the checkpoints, and flushes it at the end.

    In the methods, `run` names a sub-run; "" is the run itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, list[bytes]] = {}  # events by sub-run
        self._start(0.0, False)

    def begin(self, runs: Iterable[str]) -> None:
        """Create the files of sub-runs, in the order in which TensorBoard assigns its few colors."""
        for run in runs:
            self._waiting.setdefault(run, [])
        self.flush()

    def add(self, message: Summary, step: int, run: str = "") -> None:
        """Write any summary."""
        self._waiting.setdefault(run, []).append(_event(step=step, summary=message))
        if time.monotonic() - self._written > SECONDS:
            self.flush()

    def scalar(self, tag: str, value: float, step: int, run: str = "") -> None:
        """Write a point of a curve, unless the value is NaN."""
        if not math.isnan(value):
            self.add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step, run)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text card."""
        self.add(summary.text(tag, markdown), step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Write the bytes of a PNG file if the budget allows. The first time it does not, write a text that says so."""
        if self.size() + len(png) <= BUDGET * max(1, math.ceil(self._trained() / 3600)):
            width, height = Image.open(io.BytesIO(png)).size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        elif not self._full:
            self._full = True
            self.text(
                "pictures",
                f"Some pictures are left out: the events may grow by {BUDGET / 1e6:.0f} MB for each hour of training. "
                "All of them can be drawn afterwards, from the run's checkpoint.",
                step,
            )

    def size(self) -> int:
        """Return the bytes of all event files."""
        self.flush()
        return sum(file.stat().st_size for file in self._files())

    def state(self) -> dict[str, Any]:
        """Return JSON values; see `Callback.state`."""
        self.flush()
        return {
            "bytes": {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in self._files()},
            "seconds": self._trained(),
            "full": self._full,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Cut the event files back to their length at the checkpoint and delete later ones."""
        lengths = state.get("bytes", {})
        for file in self._files():
            name = file.relative_to(self.folder).as_posix()
            if name in lengths:
                with open_file(file, "ab") as stream:
                    stream.truncate(min(file.stat().st_size, lengths[name]))
            else:
                file.unlink()
        self._waiting.clear()
        self._start(state.get("seconds", 0.0), state.get("full", False))

    def flush(self) -> None:
        """Append the waiting events to the files. After a failure, warn once and write nothing more."""
        for run, events in self._waiting.items():
            if not self._failed:
                try:
                    _append(self.folder / run / FILE, events)
                except OSError as error:
                    self._failed = True
                    warnings.warn(
                        f"no more TensorBoard events are written, training goes on: {printable(error)}", stacklevel=2
                    )
        self._waiting.clear()
        self._written = time.monotonic()

    def _start(self, seconds: float, full: bool) -> None:
        self._seconds, self._full, self._started = seconds, full, time.monotonic()
        self._written, self._failed = time.monotonic(), False

    def _trained(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _files(self) -> list[Path]:
        """Return the event files of this run and its sub-runs, without following links."""
        if self.folder.is_symlink():
            return []
        places = [self.folder, *(place for place in self.folder.glob("*/") if not place.is_symlink())]
        return [file for place in places for file in place.glob("events.out.tfevents.*") if _is_plain(file)]


def _event(**parts: Any) -> bytes:
    return Event(wall_time=time.time(), **parts).SerializeToString()


def _is_plain(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode)


def _append(file: Path, events: list[bytes]) -> None:
    """Append records to an event file, all or none.

    Raises:
        OSError: the disk is full, or the path is a link, a folder or a device (a run must not write elsewhere).
    """
    if file.parent.is_symlink() or file.parent.parent.is_symlink() or os.path.lexists(file) and not _is_plain(file):
        raise OSError(f"{file}: a link or no regular file where events belong; remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.stat().st_size if file.exists() else 0
    try:
        with file.open("ab") as stream:
            record = RecordWriter(stream)
            for event in events if before else [_event(file_version="brain.Event:2"), *events]:
                record.write(event)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(file, before)
        raise
