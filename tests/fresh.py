"""Campaigns in an interpreter of their own: torch trains in no fork of a process that has run a backward pass."""

import json
import subprocess
import sys
from typing import Any

CODE = """
import json, sys
from pathlib import Path

import torch

from moe_bsr.cli.main import main
from moe_bsr.selftest import configs, damage, hostile, kills

torch.set_num_threads(1)
print("\\n" + json.dumps(eval(sys.argv[2], globals() | {"folder": Path(sys.argv[1])})))
"""


def in_fresh_process(folder, call: str) -> Any:
    """What an expression comes to there; it may use `folder`, `main` and the campaigns' modules."""
    done = subprocess.run([sys.executable, "-c", CODE, str(folder), call], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
