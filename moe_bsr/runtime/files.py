"""Read and write the files of a run: regular files only, never through a link, replaced as a whole or not at all.

A run folder may come from anybody and may be shared. So if a symbolic link, named pipe, device or folder is found in
place of a file, it is refused by name and never opened, written or truncated.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import time
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

LEFT_OVER = 3600  # seconds after which a temporary file belongs to no running process


class NotOrdinary(OSError):
    """A path that should be a regular file or a folder is something else. The message names both."""


def kind(path: Path) -> str | None:
    """Return what a path is, in the words of `KINDS`, without following links. None if nothing is there."""
    try:
        return KINDS.get(stat.S_IFMT(path.lstat().st_mode), "no file")
    except (FileNotFoundError, NotADirectoryError):
        return None


def require(path: Path, wanted: str) -> None:
    """Check that a path is what it should be, or that nothing is there.

    Args:
        wanted: "a file" or "a folder".
    Raises:
        NotOrdinary: the path is something else.
    """
    found = kind(path)
    if found not in (wanted, None):
        raise NotOrdinary(f"{path} is {found} where {wanted} of the run belongs; remove it, or put {wanted} there")


def open_file(path: Path, mode: str) -> IO[Any]:
    """Open a regular file without buffering, without following links, and without blocking on a named pipe.

    Raises:
        NotOrdinary: it is no regular file. OSError: as `open`.
    """
    require(path, "a file")
    return open(path, mode, buffering=0, opener=_opener)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        NotOrdinary: it is no regular file. OSError: as `open`.
    """
    with open_file(path, "rb") as stream:
        return stream.read()


def read_text(path: Path) -> str:
    """Return the text of a regular file.

    Raises:
        NotOrdinary: it is no regular file. OSError: as `open`. UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path).decode()


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that does not exist yet, with default permissions, and wait until it is on the disk."""
    with open_file(path, "xb") as stream:
        write_all(stream, content.encode() if isinstance(content, str) else content)
    sync(path)


def write_all(stream: IO[bytes], content: bytes) -> None:
    """Write the whole content. A single `write` may write only a part, for instance when the disk fills up."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


def write_whole(file: Path, content: str | bytes) -> None:
    """Replace a file atomically by a rename: a reader sees the old or the new content, also after a crash.

    Several processes may do this with the same file. A temporary file that a killed process left is deleted later.

    Raises:
        OSError: the file cannot be written. The message names it and says what to do.
    """
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        require(file, "a file")
        for old in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):
            with contextlib.suppress(OSError):  # another process may delete it too
                if time.time() - old.lstat().st_mtime > LEFT_OVER:
                    old.unlink()
        write_new(temporary, content)
        temporary.rename(file)
    except NotOrdinary:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{file} cannot be written: {reason(error)}") from error


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its content, if it exists."""
    if kind(path) == "a folder":
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """Return the error in words, with a remedy if one is known: "No space left on device; make room there"."""
    said = os.strerror(error.errno) if error.errno else str(error)
    return "; ".join(filter(None, [said, REMEDIES.get(error.errno or 0)]))
