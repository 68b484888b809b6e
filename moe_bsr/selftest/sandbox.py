"""One case in a forked process, with limits on time and memory: what it printed, and how it ended."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CRASHED = 70  # exit status of an exception that nobody caught


@dataclass(frozen=True, slots=True)
class Result:
    """How a case ended.

    Attributes:
        status: exit status, or minus the signal that ended it.
        hung: whether it was killed for running too long.
        out, err: what it printed.
    """

    status: int
    hung: bool
    seconds: float
    out: str
    err: str


def run(act: Callable[[], int | None], folder: Path, seconds: float = 60, megabytes: int = 4096) -> Result:
    """Call `act` in a fork of this process, its current directory `folder`; Linux and macOS.

    Args:
        act: returns the exit status, or raises SystemExit.
        megabytes: of memory that it may ask for beyond what this process has.
    """
    out, err = folder / "stdout", folder / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            _enter(folder, out, err, seconds, megabytes)
            status = act() or 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    hung = False
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - start > seconds:
            hung = True
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(ended[1])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return Result(status, hung, time.monotonic() - start, *texts)


def _enter(folder: Path, out: Path, err: Path, seconds: float, megabytes: int) -> None:
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    # Whoever captures this process's output has replaced these two.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    pages = Path("/proc/self/statm")
    now = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 2**33
    for kind, limit in ((resource.RLIMIT_AS, now + megabytes * 2**20), (resource.RLIMIT_CPU, int(seconds) + 1)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
