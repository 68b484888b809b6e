"""moe_bsr: fine-tune one Vision Transformer for several tasks on the machine that will use it.

Block Selective Reprogramming (Sarkar et al. 2024, arXiv 2405.10951) and its mixture-of-experts multitask
extension. `train(config)` trains, `load(run)` brings a trained model back with its transforms and class
names; `moe_bsr.config.load` reads a configuration.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_bsr.runs.folder import load as load
    from moe_bsr.training.trainer import train as train

__version__ = "0.1.0"

# Loaded at first use: torch takes seconds to import, and `moe-bsr --help` should not wait for it.
_HOME = {"load": "moe_bsr.runs.folder", "train": "moe_bsr.training.trainer"}

__all__ = ["__version__", "load", "train"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moe_bsr' has no attribute {name!r}")
