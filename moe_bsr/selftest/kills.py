"""Kill a training with SIGKILL many times. Resumed to its end, it must have the bits of a run that was never killed.

There are two kinds of kills: at a random moment, and before each disk operation of a save.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_bsr.api import train
from moe_bsr.config import Config
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import files
from moe_bsr.selftest import tiny
from moe_bsr.selftest.sandbox import Main


def campaign(
    folder: Path,
    count: int,
    seed: int,
    main: Main,
    progress: Callable[[str], None] = lambda line: None,
    stages: Iterable[int] = range(10_000),
) -> dict[str, Any]:
    """Kill `count` times at random moments, and once before each disk operation of a run.

    Args:
        stages: numbers of the disk operations before which to kill; by default all.
    Returns:
        Plain values: tried (kills of both kinds), failed, failures (in words, with the files that differ), and more.
    """
    config, _ = tiny.write_config(folder, train__pictures=False)
    rng = random.Random(seed)
    began = time.monotonic()
    if not _ended(_start(config, folder / "reference")):
        raise RuntimeError("the run that is not killed failed")
    seconds = time.monotonic() - began
    expected = outcome(folder / "reference")
    failures: list[str] = []

    def note(what: str, run: Path) -> None:
        if wrong := differing(run, expected):
            failures.append(f"{what}: other bits in {', '.join(wrong)}")
            progress(failures[-1])

    run, runs = folder / "timed", 1
    for _ in range(count):
        pid = _start(config, run)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        os.kill(pid, signal.SIGKILL)
        if _ended(pid):
            note(f"run {runs}, killed at random moments", run)
            shutil.rmtree(run)
            runs += 1
    if not _ended(_start(config, run)):
        failures.append(f"run {runs}: the last resume failed")
    note(f"run {runs}, killed at random moments", run)

    run, killed = folder / "stages", 0
    for number in stages:
        done = _ended(_start(config, run, lambda number=number: _kill_at_operation(number)))
        killed += not done
        if not done and not _ended(_start(config, run)):
            failures.append(f"killed before disk operation {number}: the resume failed")
        note(f"killed before disk operation {number}", run)
        shutil.rmtree(run)
        if done:  # the run ended before this operation, so it has no more
            break
    return {
        "tried": count + killed,
        "failed": len(failures),
        "seed": seed,
        "kills": count,
        "runs": runs,
        "stages": killed,
        "seconds_uninterrupted": round(seconds, 2),
        "failures": failures,
    }


def finished(config: Config, run: Path) -> bool:
    """Train, or resume, in a process of its own. Return whether it ended with status 0."""
    return _ended(_start(config, run))


def outcome(run: Path) -> dict[str, bytes]:
    """Return the files that must agree, as bytes: the tensors of the last checkpoint, and the metrics."""
    there = checkpoint.steps(run)
    last = [*(run / "checkpoint" / str(there[-1])).glob("*.safetensors")] if there else []
    return {file.name: file.read_bytes() for file in (*last, run / "metrics.jsonl") if file.is_file()}


def differing(run: Path, expected: dict[str, bytes]) -> list[str]:
    """Return the names of the files whose bytes are not the expected ones."""
    got = outcome(run)
    return sorted(name for name in expected.keys() | got.keys() if got.get(name) != expected.get(name))


def _start(config: Config, run: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start to train, or to resume, in a forked process, and return its process id.

    Args:
        before: called in that process first.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            before()
            train(config, run, resume=True)
            status = 0
        finally:
            os._exit(status)
    return pid


def _ended(pid: int) -> bool:
    """Wait for a process. Return whether it ended with status 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _kill_at_operation(number: int) -> None:
    """Patch this process so that it kills itself before disk operation `number`, counted from 0."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return operation(*arguments, **keywords)

        return run

    for owner, name in (
        (checkpoint, "save_file"),
        (checkpoint.os, "link"),
        (files, "write_new"),
        (files, "sync"),
        (files.shutil, "rmtree"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "chmod"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
