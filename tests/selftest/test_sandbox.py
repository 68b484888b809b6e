"""Commands in a separate process: limits, output and exit status."""

import mmap
import os
import signal
import sys
import time

import pytest

from moe_bsr.selftest import sandbox


def refuse() -> int:
    print("on stdout")
    print("on stderr", file=sys.stderr)
    os.system("echo from below")
    return 2


@pytest.mark.parametrize(
    "command, status, words",
    [
        (lambda: 3, 3, ""),
        (lambda: None, 0, ""),
        (lambda: sys.exit(4), 4, ""),
        (refuse, 2, "on stderr"),
        (lambda: 1 // 0, 1, "ZeroDivisionError"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV, ""),
        (lambda: bytearray(2**31) and None, 1, "MemoryError"),
    ],
)
def test_exit_status_and_errors_of_a_command(command, status, words, tmp_path):
    outcome = sandbox.run(command, folder=tmp_path, memory_mb=500)
    assert outcome.status == status and words in outcome.stderr
    assert (outcome.trouble is None) == (status >= 0 and "Error" not in outcome.stderr)


def test_output_and_working_directory_of_a_command(tmp_path):
    outcome = sandbox.run(lambda: print(os.getcwd()) or refuse(), folder=tmp_path)
    assert outcome.stdout.split("\n")[:2] == [str(tmp_path), "on stdout"] and "from below" in outcome.stdout


def test_a_hanging_command_is_stopped_with_its_children():
    began = time.monotonic()
    outcome = sandbox.run(lambda: os.fork() and time.sleep(60), seconds=0.3)
    assert outcome.status is None and "hung" in outcome.trouble and time.monotonic() - began < 20


def test_peak_memory_is_measured():
    def eat() -> None:
        held = mmap.mmap(-1, 100 * 2**20)  # new pages, where a bytearray may reuse free memory of the forked process
        held[::4096] = b"x" * len(held[::4096])

    assert sandbox.run(eat).peak_mb > sandbox.run(lambda: None).peak_mb + 50


def test_excessive_output_is_reported_and_cut(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_OUTPUT", 1000)
    outcome = sandbox.run(lambda: print("x" * 2**20))
    assert outcome.trouble == "printed 1 MiB" and len(outcome.stdout) == 1000
