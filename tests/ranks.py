"""Start groups of processes that train together, as torchrun does.

A fresh process (`fresh.py`) forks them all. The rendezvous stores are in the test process, as torchrun's store is in
torchrun. So a store outlives its group, and no port has to be guessed.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh

CODE = "import json, pathlib, sys, ranks; ranks.start(sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))"
LIMIT = 500  # seconds after which a group that hangs is killed


@dataclass(frozen=True)
class Ended:
    """Outcome of one process.

    Attributes:
        status: as `os.waitstatus_to_exitcode` returns it.
        said: its output to stdout and stderr.
        result: the return value of its function, None if it raised an error.
    """

    status: int
    said: str
    result: Any


def run_groups(file: str, folder: Path, groups: dict[str, int]) -> dict[str, list[Ended]]:
    """Call functions of a test file in several processes, one group after the other.

    Args:
        groups: number of processes by the name of a `function(folder, rank)`, which returns JSON values.
    """
    import torch.distributed as dist

    stores = {name: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in groups}
    plan = [(name, world, stores[name].port) for name, world in groups.items()]
    # Count GPUs through NVML: once CUDA is initialized, a fork cannot use it.
    done = fresh.run(CODE, file, folder, json.dumps(plan), PYTORCH_NVML_BASED_CUDA_CHECK="1")
    assert done.returncode == 0, done.stderr
    return {
        name: [Ended(**json.loads((folder / f"{name}.{rank}.json").read_text())) for rank in range(world)]
        for name, world in groups.items()
    }


def start(file: str, folder: Path, plan: list[tuple[str, int, int]]) -> None:
    import torch

    from moe_bsr import api
    from moe_bsr.callbacks import expert_views, mistakes

    torch.set_num_threads(1)
    expert_views.drawing_due = lambda *arguments: False
    mistakes.MistakeViews.on_end = lambda self, report: None
    api._predict = lambda *arguments: None
    api.check = lambda config: None  # the test process has already checked it
    spec = importlib.util.spec_from_file_location("functions", file)
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    for name, world, port in plan:
        children = [_start(functions, name, rank, world, port, folder) for rank in range(world)]
        statuses = _wait(children)
        for rank, child in enumerate(children):
            result = folder / f"{name}.{rank}.result"
            about = {
                "status": statuses[child],
                "said": (folder / f"{name}.{rank}.said").read_text(),
                "result": json.loads(result.read_text()) if result.exists() else None,
            }
            (folder / f"{name}.{rank}.json").write_text(json.dumps(about))


def _start(functions: Any, name: str, rank: int, world: int, port: int, folder: Path) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        said = os.open(folder / f"{name}.{rank}.said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({key: str(value) for key, value in variables.items()})
        result = getattr(functions, name)(folder, rank)
        (folder / f"{name}.{rank}.result").write_text(json.dumps(result))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int]) -> dict[int, int]:
    """Return the exit status of each child. Children that exceed `LIMIT` are killed."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return statuses
