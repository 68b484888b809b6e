"""Where a result came from: the machine that computed it, the code, and the command that asked for it.

Results are read months later and on other machines. Every JSON file of results carries these three.
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


def environment(runtime: Runtime) -> dict[str, Any]:
    """What may change the bits or the speed of a computation.

    processor: the GPU's name, or the CPU's. cpu_flags: instruction sets that decide which kernels run.
    cpu_kernels: the set that torch's own kernels were chosen for. processes: that train together.
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
    """The git commit of this code, "-dirty" if files differ from it; of an installed package its version.

    None if neither is known. As of the first call: code that changes later has been imported by then.
    """
    if (CODE / ".git").exists():
        try:
            return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "-s", "-uno") else "")
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a repository it will not read
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
    """The command line of this program, as one would type it; None in an interactive session."""
    _, *words = sys.orig_argv
    if not words:
        return None
    program = Path(words[0])
    if program.parent.name == "bin":  # an installed command, which its interpreter was started for
        return shlex.join([program.name, *words[1:]])
    return shlex.join(["python", *words])
