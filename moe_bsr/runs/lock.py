"""One trainer at a time in a run folder.

The lock is the kernel's (`flock`) on the file `lock`, which says who holds it. It goes with the process that took
it: one that died, however it died, leaves a file behind and no lock.
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
    """Hold the run folder, which is made if need be; what was made and is still empty afterwards is removed.

    Raises:
        ConfigError: another process trains in it; the message names it and since when. OSError: not writable.
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
                warnings.warn(f"{place}: no locks on this file system ({error.strerror}); take care that no second "
                              "process trains in this folder", stacklevel=4)  # fmt: skip
            if files.kind(place) and os.path.samestat(os.fstat(stream.fileno()), place.lstat()):
                yield stream
                return
        # The one before had it, and removed it, between our opening and our locking: that file is gone.


def _refusal(place: Path) -> str:
    holder = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(files.read_text(place))
        holder = f" by process {int(about['pid'])} on {about['host']!s:.80} since {about['started']!s:.40}"
    return f"{place.parent} is being trained in{holder}; wait for its end, stop it, or name another folder"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
