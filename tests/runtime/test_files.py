"""Text files: a write is complete or has no effect, and links are not followed."""

import errno
import os
from pathlib import Path

import pytest

from moe_bsr.runtime import files
from moe_bsr.runtime.files import write_whole


def test_a_text_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_whole(file, "first")
    write_whole(file, "second")
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]

    def rename(*_):
        raise OSError("crash")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="crash"):
        write_whole(file, "third, half wri")
    assert file.read_text() == "second"


def test_temporary_files_of_killed_processes_are_deleted_and_not_those_of_others(tmp_path):
    other, file = tmp_path / "other", tmp_path / "report.json"
    other.write_text("other")
    old, link, new = (tmp_path / f"report.json.{name}.tmp" for name in ("0123abcd", "link", "4567cdef"))
    old.write_text("old")
    link.symlink_to(other)
    for left in (old, link):
        os.utime(left, (0, 0), follow_symlinks=False)
    new.write_text("new")
    write_whole(file, "text")
    assert other.read_text() == "other" and sorted(tmp_path.iterdir()) == [other, file, new]


def test_a_file_that_another_process_writes_at_the_same_time_is_written(tmp_path, monkeypatch):
    file, write_new = tmp_path / "report.json", files.write_new

    def second(path, content) -> None:
        write_new(path, content)
        monkeypatch.setattr(files, "write_new", write_new)
        write_whole(file, "second")

    monkeypatch.setattr(files, "write_new", second)
    write_whole(file, "first")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; make room there"),
        (errno.EFBIG, "File too large; raise the limit of a file's size"),
        (errno.EROFS, "Read-only file system; make it writable"),
    ],
)
def test_a_failed_write_says_what_to_do_and_leaves_no_temporary_file(tmp_path, monkeypatch, number, words):
    file = tmp_path / "report.json"
    write_whole(file, "first")

    def full(path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match=words) as failure:
        write_whole(file, "second")
    assert str(failure.value).startswith(f"{file} cannot be written") and file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_partial_writes_are_continued():
    class Slow:
        written = b""

        def write(self, content) -> int:
            self.written += bytes(content[:3])
            return len(content[:3])

    files.write_all(slow := Slow(), b"ten letters")
    assert slow.written == b"ten letters"


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "link")
    assert (tmp_path / "there").is_dir() and not os.path.lexists(tmp_path / "link")
