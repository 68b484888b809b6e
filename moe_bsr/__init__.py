"""moe_bsr: fine-tune one Vision Transformer for several tasks on the machine that will use it.

Implements Block Selective Reprogramming (Sarkar et al. 2024, arXiv 2405.10951) and its multitask extension with
mixtures of experts. `moe_bsr.config.load` reads a configuration, `train(config)` trains it, and `load(run)` returns a
trained model with its transforms and class names.
"""

import importlib
from typing import TYPE_CHECKING

from moe_bsr.runtime.version import __version__

if TYPE_CHECKING:
    from moe_bsr.api import evaluate as evaluate
    from moe_bsr.api import find_lr as find_lr
    from moe_bsr.api import reject as reject
    from moe_bsr.api import train as train
    from moe_bsr.config import Config as Config
    from moe_bsr.runs.load import TrainedRun as TrainedRun
    from moe_bsr.runs.load import load as load

# Imported at first use: importing torch takes seconds, and `moe-bsr --help` should not wait for it.
_HOME = {
    "Config": "moe_bsr.config",
    "TrainedRun": "moe_bsr.runs.load",
    "evaluate": "moe_bsr.api",
    "find_lr": "moe_bsr.api",
    "load": "moe_bsr.runs.load",
    "reject": "moe_bsr.api",
    "train": "moe_bsr.api",
}

__all__ = ["Config", "TrainedRun", "__version__", "config", "evaluate", "find_lr", "load", "reject", "train"]


def __getattr__(name: str):
    if name == "config":
        return importlib.import_module("moe_bsr.config")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moe_bsr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
