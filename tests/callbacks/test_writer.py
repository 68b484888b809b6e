"""Event files: one per sub-run, truncated on resume, limited in size, and never written through links."""

import contextlib
import errno
import io
import os

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.summary.writer.record_writer import RecordWriter

from moe_bsr.callbacks import writer as writer_module
from moe_bsr.callbacks.writer import FILE, Writer

RUNS = ["pets", "mean of tasks", ""]


def points(folder, tag: str = "loss") -> dict[str, list[tuple[int, float]]]:
    runs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(folder)).Reload()
    return {run: [(e.step, e.value) for e in runs.Scalars(run, tag)] for run in runs.Runs()}


def write(writer: Writer, steps: range) -> None:
    for step in steps:
        for run in RUNS:
            writer.scalar("loss", float(step), step, run)


def test_a_resumed_run_has_every_point_once_and_the_same_files(tmp_path):
    first = Writer(tmp_path)
    first.restore({})
    write(first, range(1, 4))
    state = first.state()
    write(first, range(4, 7))  # lost, because it is after the checkpoint
    first.scalar("loss", 4.0, 4, "later")  # also lost: a sub-run that began after the checkpoint
    first.flush()
    for _ in range(2):
        again = Writer(tmp_path)
        again.restore(state)
        write(again, range(4, 6))
        again.flush()
    assert points(tmp_path) == {run or ".": [(s, float(s)) for s in range(1, 6)] for run in RUNS}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        f"{run}/{FILE}".lstrip("/") for run in RUNS
    )


def test_events_written_again_take_the_same_bytes(tmp_path):
    """A TensorBoard that has already read further then continues at the start of a record."""
    sizes = []
    for folder in ("whole", "resumed"):
        writer = Writer(tmp_path / folder)
        write(writer, range(1, 3))
        state = writer.state()
        write(writer, range(3, 9))
        writer.flush()
        if folder == "resumed":
            writer = Writer(tmp_path / folder)
            writer.restore(state)
            write(writer, range(3, 9))
        sizes.append(writer.state()["bytes"])
    assert sizes[0] == sizes[1]


def test_many_sub_runs_keep_no_files_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    writer = Writer(tmp_path)
    for task in range(200):
        writer.scalar("loss", 1.0, 1, f"task{task}")
    assert writer.size() > 0 and len(list(tmp_path.rglob(FILE))) == 200
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_sub_runs_are_ordered_by_their_start(tmp_path):
    """TensorBoard assigns colors by the time of the first event."""
    writer = Writer(tmp_path)
    writer.begin(["pets", "food", "mean of tasks", ""])
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert sorted(runs.Runs(), key=runs.FirstEventTimestamp) == ["pets", "food", "mean of tasks", "."]


@pytest.mark.parametrize("kind", ["link", "link to a folder", "folder", "fifo"])
def test_nothing_is_written_through_a_link_or_to_a_special_file(tmp_path, kind):
    outside, run_folder = tmp_path / "outside", tmp_path / "run" / "pets"
    run_folder.parent.mkdir()
    if kind == "link to a folder":
        outside.mkdir()
        (outside / FILE).write_bytes(b"kept")
        run_folder.symlink_to(outside)
    else:
        run_folder.mkdir()
        outside.write_bytes(b"kept")
        if kind == "link":
            (run_folder / FILE).symlink_to(outside)
        elif kind == "folder":
            (run_folder / FILE).mkdir()
        else:
            os.mkfifo(run_folder / FILE)
    writer = Writer(tmp_path / "run")
    writer.restore({"bytes": {f"pets/{FILE}": 0}})
    for step in (1, 2):  # one warning, then silence
        writer.scalar("loss", 1.0, step, "pets")
        with contextlib.ExitStack() as said:
            if step == 1:
                said.enter_context(pytest.warns(UserWarning, match="a link or no regular file where events belong"))
            writer.flush()
    assert (outside / FILE if outside.is_dir() else outside).read_bytes() == b"kept"


def test_a_full_disk_leaves_complete_records_and_one_warning(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    write(writer, range(1, 3))
    before = writer.state()["bytes"]
    write_record, left = RecordWriter.write, [2]

    def full(self, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_record(self, data)

    write(writer, range(3, 9))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left on device"):
        patch.setattr(RecordWriter, "write", full)
        writer.flush()
    write(writer, range(9, 12))
    assert writer.state()["bytes"] == before and points(tmp_path)["."] == [(1, 1.0), (2, 2.0)]


def texts(folder, tag: str) -> list[str]:
    events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")]


def test_the_picture_budget_grows_with_the_hours_of_training(tmp_path, monkeypatch):
    """After an hour and a second the budget is doubled. Bytes and time from before a resume count."""
    monkeypatch.setattr(writer_module, "BUDGET", 100_000)
    writer = Writer(tmp_path / "tensorboard")
    writer.restore({"seconds": 3601.0})
    png = io.BytesIO()
    Image.effect_noise((100, 100), 100).save(png, "png")  # incompressible
    for step in range(40):
        writer.picture("noise", png.getvalue(), step)
    writer.flush()
    size = len(png.getvalue())
    assert 5 * size < 100_000 < 40 * size
    written = writer.size()
    assert 2 * 100_000 - 2 * size < written < 2 * 100_000 + 1000  # the message about it is added
    assert len(texts(tmp_path / "tensorboard", "pictures")) == 1
