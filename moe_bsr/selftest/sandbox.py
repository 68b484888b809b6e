"""Run a command line in a forked process with limits on time and memory, and judge how it ended.

The forking process has torch loaded already, so a trial takes only the time of its own work. It must not have run a
backward pass, because torch cannot train in a fork of a process that has. POSIX only.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONGEST = 700  # characters allowed in a refusal
MOST_OUTPUT = 2**22  # bytes allowed on stdout and stderr together
SILENT = "refused without a word"

Main = Callable[[list[str]], int]  # the command line: takes its arguments, returns the exit status


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: its exit status; minus the number of the signal that ended it; or None if it was killed as too slow.
        stdout, stderr: the first MOST_OUTPUT bytes of each, as text.
        seconds: how long it ran.
        peak_mb: peak resident memory in MiB, with the memory it shares with the forking process.
        printed: bytes on stdout and stderr together.
    """

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float
    printed: int = 0

    @property
    def trouble(self) -> str | None:
        """What the command did that none may do (hang, crash, print a traceback or without end), or None."""
        if self.status is None:
            return f"hung for {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        if self.printed > MOST_OUTPUT:
            return f"printed {self.printed / 2**20:.0f} MiB"
        if "Traceback (most recent call last)" in self.stderr:
            return f"traceback: {self.stderr.strip().splitlines()[-1]}"
        return None

    @property
    def refused(self) -> bool:
        return self.status not in (0, None)

    def unclear(self, *words: str) -> str | None:
        """Return why a refusal is not clear, or None.

        A clear one is a single line on stderr that is not too long, and contains one of `words` if any are given.
        """
        lines = [line for line in self.stderr.strip().splitlines() if not _is_warning(line)]
        if not lines:
            return SILENT
        last = lines[-1]
        if len(lines) > 1 and not lines[0].startswith("usage:"):
            return f"{len(lines)} lines: {' / '.join(lines)[:LONGEST]}"
        if len(last) > LONGEST:
            return f"a line of {len(last)} characters"
        if not last.isprintable():
            return f"control letters: {last!r}"
        if words and not any(word in last for word in words):
            return f"names none of {', '.join(words)}: {last}"
        return None


def run(
    command: Callable[[], int | None], *, folder: Path | None = None, seconds: float = 60, memory_mb: float = 4000
) -> Outcome:
    """Call `command` in a forked process and wait for it.

    Args:
        command: returns an exit status, or None for 0. It may raise.
        folder: current directory of the command; by default that of this process.
        seconds: time after which the command and its child processes are killed.
        memory_mb: address space that it may use beyond that of this process, in MiB.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(command, folder, out.fileno(), err.fileno(), memory_mb)
        status, usage = _wait(pid, began + seconds)
        took = time.monotonic() - began
        printed = sum(stream.seek(0, os.SEEK_END) for stream in (out, err))
        for stream in (out, err):
            stream.seek(0)
        texts = [stream.read(MOST_OUTPUT).decode(errors="replace") for stream in (out, err)]
    return Outcome(status, *texts, took, usage / 1024, printed)


def _child(command: Callable[[], int | None], folder: Path | None, out: int, err: int, memory_mb: float) -> None:
    status = 1
    try:
        os.setsid()
        if folder is not None:
            os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        faulthandler.disable()
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, errors="backslashreplace") for n in (1, 2))
        limit = _address_space() + int(memory_mb * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which a fork inherits from its parent
        status = command() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, deadline: float) -> tuple[int | None, int]:
    """Wait for a process; return its exit status, None if it was killed at `deadline`, and its peak memory in KiB."""
    pause = 0.002
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return None, os.wait4(pid, 0)[2].ru_maxrss
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _is_warning(line: str) -> bool:
    return "Warning: " in line or ": warning: " in line or line.startswith(("  ", "warning:"))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
