"""Processes of their own for tests that need one: with their own streams, signals and exit status.

One interpreter for each worker imports everything and forks them all: starting each anew takes longer than what they
do. (torch trains in no fork of a process that has run a backward pass, so the tests' own process cannot be their
parent.) What a command imports at its start, and that it sets its process up anew, is no business of these.
"""

import array
import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CAMPAIGN = """
import json, os, sys
from pathlib import Path

from moe_bsr import api
from moe_bsr.cli.main import main
from moe_bsr.selftest import configs, damage, hostile, kills

api._predict = lambda *arguments: None  # which takes as long as a small run
os.fsync = lambda file: None  # a process that is killed loses nothing of what it wrote
print("\\n" + json.dumps(eval(sys.argv[2], globals() | {"folder": Path(sys.argv[1])})))
"""
COMMAND = """
from moe_bsr import api
from moe_bsr.cli import main

api._predict = lambda *arguments: None
main._set_up_process = lambda: None  # it would start the program again
main.start()
"""


def in_fresh_process(folder, call: str) -> Any:
    """What an expression comes to there; it may use `folder`, `main` and the modules of the campaigns."""
    done = run(CAMPAIGN, folder, call)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, "-c", code, *arguments])`, which waits for the end."""
    with Process(code, *arguments, **environment) as process:
        status = process.wait()
        return subprocess.CompletedProcess(arguments, status, process.output(), process.output(2))


def in_shell(redirected: str, code: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """The same with its streams redirected as a shell writes it; the exit status is the last line of `stdout`."""
    client = [sys.executable, "-I", "-S", __file__, _server(), code, *arguments]
    line = f'exec 3>&1; ( "$@" 3>&- ; echo $? >&3 ) {redirected}'
    return subprocess.run(["bash", "-c", line, "bash", *client], capture_output=True, text=True, check=False)


class Process:
    """One that has been started: `pid`, and what it has written so far."""

    def __init__(self, code: str, *arguments: str | Path, **environment: str) -> None:
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]
        files = {number: stream.fileno() for number, stream in enumerate(self._streams)}
        self._ended = _ask(_server(), code, arguments, files, os.environ | environment)
        self.pid = json.loads(self._ended.readline())

    def output(self, number: int = 1) -> str:
        """Of stdout (1) or stderr (2)."""
        return os.pread(self._streams[number].fileno(), 2**24, 0).decode()

    def wait(self) -> int:
        """Its exit status; of a signal that ended it, minus its number."""
        return json.loads(self._ended.readline())

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (*self._streams, self._ended):
            stream.close()


_started: dict[int, str] = {}  # by the process that asked: a fork of it asks another


def _server() -> str:
    """The socket of this worker's interpreter, which ends when the worker does."""
    if os.getpid() not in _started:
        folder = tempfile.TemporaryDirectory(prefix="fresh")  # a socket's path has to be short
        path = f"{folder.name}/socket"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        listening.listen()
        call = [sys.executable, __file__, str(listening.fileno())]
        server = subprocess.Popen(call, stdin=subprocess.PIPE, env=environment, pass_fds=[listening.fileno()])
        listening.close()
        _started[os.getpid()] = path

        atexit.register(_stop, os.getpid(), server, folder)
    return _started[os.getpid()]


def _stop(owner: int, server: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()
        folder.cleanup()


def _ask(path: str, code: str, arguments: Any, files: dict[int, int], environment: Any) -> Any:
    """Have a process started; the two lines that come back are its id and its exit status."""
    asked = {"code": code, "arguments": list(map(str, arguments)), "cwd": os.getcwd(), "files": list(files)}
    asking = socket.socket(socket.AF_UNIX)
    asking.connect(path)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files.values()))] if files else []
    asking.sendmsg([b"x"], rights)
    asking.sendall(json.dumps(asked | {"environment": dict(environment)}).encode())
    asking.shutdown(socket.SHUT_WR)
    return asking.makefile("r")


def _serve(listening: socket.socket) -> tuple[str, list[str]]:
    """Fork a process for whoever asks; returns in each of these alone, with its code and arguments."""
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:  # at its end: the worker is gone
            sys.exit()
        connection, _ = listening.accept()
        if os.fork() == 0:  # this one waits for the process itself
            break
        connection.close()
    listening.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, given, *_ = socket.recv_fds(connection, 1, 3)
    asked = json.loads(connection.makefile("rb").read())
    if (pid := os.fork()) == 0:
        connection.close()
        _become(asked, dict(zip(asked["files"], given, strict=True)))
        return asked["code"], asked["arguments"]
    with contextlib.suppress(BrokenPipeError):  # nobody asks how it ended
        connection.sendall(f"{pid}\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _become(asked: dict[str, Any], files: dict[int, int]) -> None:
    """Take over directory, environment and streams, as an interpreter does at its start."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    copies = {number: os.dup(file) for number, file in files.items()}
    os.closerange(3, min(copies.values(), default=3))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        with contextlib.suppress(OSError):
            os.close(number)
        if number in copies:
            os.dup2(copies[number], number)
            os.close(copies[number])
            encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
            errors = "backslashreplace" if number == 2 else errors or "strict"
            stream = open(number, "w" if number else "r", encoding=encoding, errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _client(path: str, code: str, *arguments: str) -> int:
    files = {}
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            files[number] = number
    _, status = _ask(path, code, arguments, files, os.environ)
    return json.loads(status)


if __name__ == "__main__":
    if not sys.argv[1].isdigit():
        sys.exit(_client(*sys.argv[1:]))
    gc.disable()  # what is imported stays: looking for garbage there takes a third of the time
    import torch
    import torch._dynamo  # which the first optimizer imports

    import moe_bsr.api
    import moe_bsr.callbacks.tensorboard
    import moe_bsr.cli.evaluate
    import moe_bsr.selftest.configs
    import moe_bsr.selftest.damage
    import moe_bsr.selftest.hostile
    import moe_bsr.selftest.kills  # noqa: F401

    torch.set_num_threads(1)
    gc.enable()
    gc.freeze()  # or a collection in a fork would touch, and so copy, every page of the parent's
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    code, arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
