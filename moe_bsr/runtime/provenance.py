"""Record the origin of a result: the machine, the code and the command that produced it.

Every JSON file of results has these three, because results are read months later and on other machines.
"""

import functools
import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path
from platform import python_version
from typing import Any

import timm
import torch

from moe_bsr.runtime import cpu_features
from moe_bsr.runtime.device import Runtime

CODE = Path(__file__).resolve().parents[2]  # the folder that holds moe_bsr/


def made_by(runtime: Runtime) -> dict[str, Any]:
    """Return command, commit and environment: the first keys of a file of results."""
    return {"command": command(), "commit": commit(), "environment": environment(runtime)}


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return all facts of the machine and software that may change the bits or the speed of a computation.

    processor: name of the GPU or the CPU. cpu_flags: instruction sets that decide which kernels run. cpu_kernels: the
    instruction set that torch's own kernels use. processes: number of processes that train together.
    """
    on_gpu = runtime.device.type == "cuda"
    return {
        "precision": runtime.precision,
        "precision_reason": runtime.precision_reason,
        "threads": runtime.threads,
        "processes": runtime.ranks.world,
        "device": str(runtime.device),
        "processor": torch.cuda.get_device_name(runtime.device) if on_gpu else cpu_features.name(),
        "cpu_flags": cpu_features.decisive_flags(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": python_version(),
    }


@functools.cache
def commit() -> str | None:
    """Return the git commit of this code, with "-dirty" if files differ from it, or the installed package's version.

    None if neither is known. The first call's answer is kept: code that changes later has been imported by then.
    """
    if (CODE / ".git").exists():
        try:
            return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "-s", "-uno") else "")
        except (OSError, subprocess.SubprocessError):
            pass  # git is not installed, or refuses to read the repository
    try:
        return importlib.metadata.version("moe_bsr")
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    asked = subprocess.run(
        ["git", "-C", str(CODE), *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # read only
    )
    return asked.stdout.strip()


def command() -> str | None:
    """Return the command line of this program as one would type it, or None in an interactive session."""
    _, *words = sys.orig_argv
    if not words:
        return None
    program = Path(words[0])
    if program.parent.name == "bin":  # an installed command (console script), run by its interpreter
        return shlex.join([program.name, *words[1:]])
    return shlex.join(["python", *words])
