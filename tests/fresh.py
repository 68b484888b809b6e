"""Run code in a separate process, for tests that need their own streams, signals and exit status.

One interpreter imports everything and forks all these processes, because a new interpreter takes longer to start than
the code takes to run. All workers of pytest-xdist share it. (torch cannot train in a fork of a process that has run a
backward pass, so a test process cannot be the parent.) Tests with these processes do not cover what a command imports
at startup, nor its process setup.
"""

import array
import contextlib
import fcntl
import gc
import json
import os
import select
import shutil
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
main._set_up_process = lambda: None  # it would start the interpreter anew
main.start()
"""


def in_fresh_process(folder, call: str) -> Any:
    """Return the value of an expression, which may use `folder`, `main` and the modules of the campaigns."""
    done = run(CAMPAIGN, folder, call)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Do what `subprocess.run([sys.executable, "-c", code, *arguments])` does."""
    with Process(code, *arguments, **environment) as process:
        status = process.wait()
        return subprocess.CompletedProcess(arguments, status, process.output(), process.output(2))


def in_shell(redirected: str, code: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Do what `run` does, with shell redirections. The exit status is the last line of `stdout`."""
    client = [sys.executable, "-I", "-S", __file__, _server(), code, *arguments]
    line = f'exec 3>&1; ( "$@" 3>&- ; echo $? >&3 ) {redirected}'
    return subprocess.run(["bash", "-c", line, "bash", *client], capture_output=True, text=True, check=False)


class Process:
    """Started process: its `pid`, its output so far and its exit status."""

    def __init__(self, code: str, *arguments: str | Path, **environment: str) -> None:
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]
        files = {number: stream.fileno() for number, stream in enumerate(self._streams)}
        self._ended = _ask(_server(), code, arguments, files, os.environ | environment)
        self.pid = json.loads(self._ended.readline())

    def output(self, number: int = 1) -> str:
        """Return what the process has written to stdout (1) or stderr (2)."""
        return os.pread(self._streams[number].fileno(), 2**24, 0).decode()

    def wait(self) -> int:
        """Wait until the process ends. Returns its exit status, or minus the number of the signal that ended it."""
        return json.loads(self._ended.readline())

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (*self._streams, self._ended):
            stream.close()


_users: dict[int, int] = {}  # process id -> its end of the pipe that keeps the server alive


def _server() -> str:
    """Return the socket of the server that all workers share. The first worker starts it.

    The server ends when every process that has called this function has ended.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}")
    folder = Path(tempfile.gettempdir(), f"fresh-{os.getuid()}-{run}")  # a socket's path has to be short
    if os.getpid() not in _users:
        folder.mkdir(mode=0o700, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                _users[os.getpid()] = os.open(folder / "users", os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # there is no pipe yet, or nobody reads it
                _users[os.getpid()] = _start(folder)
    return str(folder / "socket")


def _start(folder: Path) -> int:
    """Start a server, which runs until all write ends of its pipe `users` are closed. Returns one such end."""
    for name in ("socket", "users"):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "users")
    both = os.open(folder / "users", os.O_RDWR)  # opening one end alone would block
    with open(folder / "users", "rb") as users, socket.socket(socket.AF_UNIX) as listening:
        own = os.open(folder / "users", os.O_WRONLY)
        os.close(both)
        listening.bind(str(folder / "socket"))
        listening.listen()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        listening.set_inheritable(True)
        call = [sys.executable, __file__, str(listening.fileno()), str(folder)]
        stdin = (os.POSIX_SPAWN_DUP2, users.fileno(), 0)
        os.posix_spawn(sys.executable, call, environment, file_actions=[stdin])  # `Popen` would warn that it still runs
    return own


def _ask(path: str, code: str, arguments: Any, files: dict[int, int], environment: Any) -> Any:
    """Ask the server for a process. Returns a stream of two lines: its id and, once it ends, its exit status."""
    asked = {"code": code, "arguments": list(map(str, arguments)), "cwd": os.getcwd(), "files": list(files)}
    asking = socket.socket(socket.AF_UNIX)
    asking.connect(path)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files.values()))] if files else []
    asking.sendmsg([b"x"], rights)
    asking.sendall(json.dumps(asked | {"environment": dict(environment)}).encode())
    asking.shutdown(socket.SHUT_WR)
    return asking.makefile("r")


def _serve(listening: socket.socket) -> tuple[str, list[str]]:
    """Fork a process for each request. Returns only in these processes, with their code and arguments."""
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:  # end of file: all workers have ended
            shutil.rmtree(sys.argv[2])
            sys.exit()
        connection, _ = listening.accept()
        if os.fork() == 0:  # this fork starts the process and waits for it
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
    with contextlib.suppress(BrokenPipeError):  # the client is gone
        connection.sendall(f"{pid}\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _become(asked: dict[str, Any], files: dict[int, int]) -> None:
    """Set up directory, environment and streams, as an interpreter does at startup."""
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
    gc.disable()  # collections would take a third of the import time and find nothing
    import torch
    import torch._dynamo  # the first optimizer would import it

    import moe_bsr.api
    import moe_bsr.callbacks.tensorboard
    import moe_bsr.cli.evaluate
    import moe_bsr.selftest.configs
    import moe_bsr.selftest.damage
    import moe_bsr.selftest.hostile
    import moe_bsr.selftest.kills  # noqa: F401

    torch.set_num_threads(1)
    gc.enable()
    gc.freeze()  # otherwise a collection in a fork would write to, and so copy, all pages of the parent
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped without waiting
    code, arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
