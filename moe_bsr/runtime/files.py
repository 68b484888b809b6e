"""The files of a run: ordinary ones, never reached through a link, and replaced whole or not at all.

A run folder may come from anybody, and be shared. So whatever stands where a file belongs (a symbolic link, a
named pipe, a device, a folder) is refused by name before it is opened, written, cut or deleted.
"""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import IO, Any

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


class NotOrdinary(OSError):
    """Something else is where a file or a folder belongs; the message names it."""


def kind(path: Path) -> str | None:
    """What is at a path, as `KINDS` calls it, links not followed; None if nothing is."""
    try:
        return KINDS.get(stat.S_IFMT(path.lstat().st_mode), "no file")
    except (FileNotFoundError, NotADirectoryError):
        return None


def require(path: Path, wanted: str) -> None:
    """Nothing but what is wanted ("a file" or "a folder"), or nothing at all, may be at this path.

    Raises:
        NotOrdinary: something else is.
    """
    found = kind(path)
    if found not in (wanted, None):
        raise NotOrdinary(f"{path} is {found} where {wanted} of the run belongs; remove it, or put {wanted} there")


def open_file(path: Path, mode: str) -> IO[Any]:
    """`open` without buffering for ordinary files alone: nothing is followed, and nothing waits.

    Raises:
        NotOrdinary: it is none. OSError: as `open` does.
    """
    require(path, "a file")
    return open(path, mode, buffering=0, opener=_opener)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read_bytes(path: Path) -> bytes:
    """The content of an ordinary file.

    Raises:
        NotOrdinary: it is none. OSError: as `open` does.
    """
    with open_file(path, "rb") as stream:
        return stream.read()


def read_text(path: Path) -> str:
    """The text of an ordinary file.

    Raises:
        NotOrdinary: it is none. OSError: as `open` does. UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path).decode()


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that is not there yet, with usual permissions, and wait until it is on the disk."""
    with open_file(path, "xb") as stream:
        write_all(stream, content.encode() if isinstance(content, str) else content)
    sync(path)


def write_all(stream: IO[bytes], content: bytes) -> None:
    """Write all of it: one call may write a part, as when the disk is filling up."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


def write_whole(file: Path, content: str | bytes) -> None:
    """Replace a file by one rename: a reader, or a crash, meets the old content or the new one.

    Raises:
        OSError: it cannot be written; the message names it and says what to do.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        require(file, "a file")
        if kind(temporary) != "a folder":
            remove(temporary)  # a crash left it, or somebody a link
        write_new(temporary, content)
        temporary.rename(file)
    except NotOrdinary:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{file} cannot be written: {reason(error)}") from error


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all below it, if it is there."""
    if kind(path) == "a folder":
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """What went wrong, and what helps: "No space left on device; make room there"."""
    said = os.strerror(error.errno) if error.errno else str(error)
    return "; ".join(filter(None, [said, REMEDIES.get(error.errno or 0)]))
