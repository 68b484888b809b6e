"""Lock a run folder, so that only one process trains in it at a time.

The lock is a kernel lock (`flock`) on the file `lock`, whose content names the holder. It ends with the process that
took it. A process that is killed leaves the file behind, but no lock.
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_bsr.config import ConfigError
from moe_bsr.runtime import files


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context that holds the lock of a run folder. The folder is created, and removed at the end if it is empty.

    Raises:
        ConfigError: another process trains in it. The message names the process and since when it trains.
        OSError: the folder is not writable.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "lock"
    try:
        with _taken(place) as stream:
            about = {"pid": os.getpid(), "host": platform.node(), "started": _now()}
            stream.truncate(0)
            stream.write(json.dumps(about).encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    place.unlink()
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def _taken(place: Path) -> Iterator:
    while True:
        with files.open_file(place, "a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(_refusal(place)) from None
            except OSError as error:
                warnings.warn(f"{place}: no locks on this file system ({error.strerror}); make sure that no second "
                              "process trains in this folder", stacklevel=4)  # fmt: skip
            if files.kind(place) and os.path.samestat(os.fstat(stream.fileno()), place.lstat()):
                yield stream
                return
        # The previous holder deleted the file after we had opened it, so our lock is on a deleted file. Try again.


def _refusal(place: Path) -> str:
    holder = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(files.read_text(place))
        holder = f" by process {int(about['pid'])} on {about['host']!s:.80} since {about['started']!s:.40}"
    return f"{place.parent} is being trained in{holder}; wait for its end, stop it, or name another folder"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
