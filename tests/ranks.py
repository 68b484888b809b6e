"""Several processes that train together, each in an interpreter of its own, as torchrun starts them.

The store by which they find each other is here, as torchrun's is in its own process: it survives all of them, and no
port has to be guessed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

CODE = """
import json, os, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from moe_bsr import api
from moe_bsr.callbacks import expert_views, mistakes

expert_views.drawing_due = lambda *arguments: False
mistakes.MistakeViews.on_end = lambda self, report: None
api._predict = lambda *arguments: None
import importlib.util

spec = importlib.util.spec_from_file_location("told", sys.argv[1])
told = importlib.util.module_from_spec(spec)
spec.loader.exec_module(told)
print("\\n" + json.dumps(getattr(told, sys.argv[2])(Path(sys.argv[3]), int(os.environ["RANK"]))), flush=True)
"""
LIMIT = 120  # seconds


class Group:
    """Processes that call a function of a test file: `function(folder, rank)`, whose result is JSON."""

    def __init__(self, world: int, file: str, function: str, folder: Path) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        tests = Path(__file__).parent
        self.processes = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
            place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1}
            path = os.pathsep.join([str(tests.parent), str(tests)])
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", CODE, file, function, str(folder)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {key: str(value) for key, value in place.items()} | {"PYTHONPATH": path},
                )
            )

    def results(self) -> list[Any]:
        """What each function returned; all must have ended well."""
        ended = self.ended()
        for status, _, errors in ended:
            assert status == 0, errors
        return [json.loads(output.splitlines()[-1]) for _, output, _ in ended]

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each process."""
        try:
            said = [process.communicate(timeout=LIMIT) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]
