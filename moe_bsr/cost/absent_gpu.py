"""Describe a run for a GPU that this machine does not have, so that its cost can be predicted."""

import torch

from moe_bsr.config import Config
from moe_bsr.cost.step import device_of
from moe_bsr.runtime.device import Runtime


def is_absent_gpu(config: Config) -> bool:
    """Whether the run is configured for a GPU and this machine has none."""
    return config.runtime.device.startswith("cuda") and not torch.cuda.is_available()


def absent_gpu(config: Config) -> Runtime:
    """Return the runtime that the run would have on that GPU."""
    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    return Runtime(device_of(config), precision, torch.get_num_threads(), "for a GPU that is not here")
