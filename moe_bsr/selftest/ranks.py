"""Kill one of two processes that train together under torchrun, and check how the run ends and how it continues.

Which process is killed, and when, is random: during start-up, an update, an evaluation, or the write of a checkpoint.
In half of the trials torchrun may restart the processes (max-restarts). In the others the run must end within `LIMIT`
seconds, the remaining process must say which one is gone, and one or two processes resume the run. Two processes on
CPUs compute the same bits as one. So in every case weights, moments and metrics must be those of the undisturbed run.

Most trials fork this interpreter, which has imported everything, and skip the prediction of costs. Every tenth starts
new interpreters, as users do. Linux only.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_bsr import api
from moe_bsr.config import Config
from moe_bsr.runtime import allocator
from moe_bsr.selftest import kills, tiny
from moe_bsr.selftest.sandbox import Main

LIMIT = 60.0  # seconds from the kill to the end of torchrun, which itself waits up to 30
LONGEST = 200.0  # seconds allowed for a run that is not killed
WORLD = 2
MOMENTS = ("start", "update", "evaluation", "checkpoint")


def campaign(
    folder: Path, count: int, seed: int, main: Main | None = None, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Kill a process in each of `count` runs.

    Returns:
        Plain values: tried, failed, failures, trials (what was killed, when, and what was said), and more.
    """
    config, file = tiny.write_config(folder, train__pictures=False)
    rng = random.Random(seed)
    reference, began = folder / "reference", time.monotonic()
    if _wait(_launch(file, reference, folder / "reference.txt"), LONGEST) != 0:
        raise RuntimeError(f"the run that is not killed failed: {(folder / 'reference.txt').read_text()[-2000:]}")
    seconds = time.monotonic() - began
    expected = outcome(reference)
    if expected != outcome(_alone(config, folder / "alone")):
        raise RuntimeError("two processes have other bits than one")
    trials: list[dict[str, Any]] = []
    for number in range(count):
        trial = {
            "moment": MOMENTS[number % len(MOMENTS)],
            "rank": rng.randrange(WORLD),
            "restarts": number // len(MOMENTS) % 2 == 1,
            "fresh": number % 10 == 9,
        }
        run = folder / f"run{number}"
        wrong = _trial(trial, file, run, rng, lambda run: _alone(config, run))
        if not wrong and outcome(run) != expected:
            wrong = "other bits than the undisturbed run's"
        trials.append(trial | {"failed": wrong})
        progress(f"{len(trials)}: {json.dumps(trials[-1])}")
        if not wrong:
            shutil.rmtree(run, ignore_errors=True)
    failures = [f"trial {number}: {trial['failed']}" for number, trial in enumerate(trials) if trial["failed"]]
    return {
        "tried": count,
        "failed": len(failures),
        "seed": seed,
        "seconds_undisturbed": round(seconds, 1),
        "longest_seconds_to_end": max((trial.get("seconds_to_end", 0) for trial in trials), default=0),
        "failures": failures,
        "trials": trials,
    }


def outcome(run: Path) -> dict[str, Any]:
    """Return what must agree: the tensors of the last checkpoint as bytes, and the metrics without exchanged_mb."""
    files: dict[str, Any] = kills.outcome(run)
    lines = [json.loads(line) for line in files.pop("metrics.jsonl", b"").splitlines()]
    files["metrics"] = [{key: value for key, value in line.items() if key != "exchanged_mb"} for line in lines]
    return files


def _trial(
    trial: dict[str, Any], file: Path, run: Path, rng: random.Random, alone: Callable[[Path], Path]
) -> str | None:
    """Start a run, kill one of its processes, and have the run finished. Add to `trial` what happened.

    Args:
        alone: finishes the run in one process.
    Returns:
        What went wrong, or None.
    """
    said = run.with_suffix(".txt")
    fresh, restarts = trial["fresh"], 2 if trial["restarts"] else 0
    agent = _launch(file, run, said, fresh, restarts)
    hit = _kill_one(agent, run, trial["rank"], _moment(trial["moment"], run, rng))
    began = time.monotonic()
    status = _wait(agent, LONGEST if restarts and hit else LIMIT)
    text = said.read_text(errors="replace")
    if status is None:
        return f"torchrun did not end: {text[-600:]}"
    if not hit:
        return "ended before it could be killed"
    trial |= hit
    trial["said"] = [line for line in text.splitlines() if "training ended" in line or "is gone" in line]
    if restarts:
        return None if status == 0 else f"torchrun's restart ended with {status}: {text[-600:]}"
    trial["seconds_to_end"] = round(time.monotonic() - began, 1)
    if status == 0:
        return "torchrun ended with 0 although a process was killed"
    if hit["training"] and not any(f"rank {trial['rank']} (process" in line for line in trial["said"]):
        return f"no message says which process is gone: {text[-600:]}"
    trial["resumed_by"] = rng.choice((1, WORLD))
    if trial["resumed_by"] == 1:
        alone(run)
    elif (status := _wait(_launch(file, run, said, fresh), LONGEST)) != 0:
        return f"the resume ended with {status}: {said.read_text(errors='replace')[-600:]}"
    return None


def _moment(kind: str, run: Path, rng: random.Random) -> Callable[[], bool]:
    """Return a function that says whether the moment to kill has come, from the run folder and a random delay."""
    if kind == "start":
        return _after(rng.uniform(0, 3), lambda: True)
    if kind == "update":
        step = rng.randrange(1, tiny.STEPS)
        return _after(rng.uniform(0, 0.2), lambda: _lines(run) >= step)
    place = run / "checkpoint"
    if kind == "checkpoint":
        step = rng.choice((3, 5, 6, tiny.STEPS))
        return lambda: (place / f"{step}.tmp").exists() or (place / str(step)).exists()
    step = rng.choice((5, tiny.STEPS))  # of an evaluation; the checkpoint is saved before it
    return _after(rng.uniform(0, 0.2), lambda: (place / str(step)).exists())


def _after(pause: float, begins: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that says whether `pause` seconds have passed since `begins` was first true."""
    since: list[float] = []

    def come() -> bool:
        if not since and begins():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + pause

    return come


def _lines(run: Path) -> int:
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _kill_one(agent: int, run: Path, rank: int, come: Callable[[], bool]) -> dict[str, Any] | None:
    """SIGKILL one of torchrun's processes when `come` returns true.

    Returns:
        Whether the run had begun to train, and its lines of metrics; None if the processes ended before.
    """
    until = time.monotonic() + LONGEST
    while time.monotonic() < until:
        workers = _children(agent)
        if len(workers) < WORLD:
            if _is_over(agent):
                return None
        elif come():
            with contextlib.suppress(ProcessLookupError):
                step = _lines(run)
                os.kill(workers[rank], signal.SIGKILL)
                return {"training": step > 0, "lines": step}
            return None
        time.sleep(0.001)
    return None


def _children(parent: int) -> list[int]:
    """Return the running child processes of a process, in the order of their start."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            state, its_parent, *rest = (place / "stat").read_text().rpartition(")")[2].split()
            if int(its_parent) == parent and state not in "ZX":
                found.append((int(rest[17]), int(place.name)))
    return [pid for _, pid in sorted(found)]


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _launch(file: Path, run: Path, said: Path, fresh: bool = False, restarts: int = 0) -> int:
    """Start torchrun, with the command that trains or resumes, in a process of its own, and return its id.

    Args:
        said: file for its output.
        fresh: start new interpreters, in place of forks of this one.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        package = Path(api.__file__).parent
        os.environ["PYTHONPATH"] = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["GLIBC_TUNABLES"] = allocator.SETTING  # otherwise a fork would start this program again
        api._predict = lambda *arguments: None
        from torch.distributed.run import main as torchrun

        how = ["-m", "moe_bsr"] if fresh else ["--start-method", "fork", "--run-path", str(package / "__main__.py")]
        options = ["--standalone", "--nproc-per-node", str(WORLD), "--max-restarts", str(restarts)]
        torchrun([*options, *how, "train", str(file), "--run-dir", str(run), "--resume"])
        status = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> int | None:
    """Wait for torchrun, and return its exit status; None if it and its processes had to be killed."""
    until = time.monotonic() + seconds
    while not _is_over(pid):
        if time.monotonic() > until:
            for each in (*_children(pid), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _alone(config: Config, run: Path) -> Path:
    """Finish the run in one process, and return its folder."""
    if not kills.finished(config, run):
        raise RuntimeError(f"{run}: one process did not finish it")
    return run
