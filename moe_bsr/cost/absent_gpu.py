"""A run for a GPU that is not here: its cost can be predicted all the same."""

import torch

from moe_bsr.config import Config
from moe_bsr.cost.step import device_of
from moe_bsr.runtime.device import Runtime


def is_absent_gpu(config: Config) -> bool:
    """Whether the run is for a GPU and there is none here."""
    return config.runtime.device.startswith("cuda") and not torch.cuda.is_available()


def absent_gpu(config: Config) -> Runtime:
    """The runtime that such a run would have."""
    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    return Runtime(device_of(config), precision, torch.get_num_threads(), "for a GPU that is not here")
