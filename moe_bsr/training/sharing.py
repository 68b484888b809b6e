"""Checks before several processes train one model together."""

import hashlib

from moe_bsr.config import Config, TrainConfig, dump, require
from moe_bsr.data import TaskData
from moe_bsr.data.splits import SPLITS
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.distributed import Alone
from moe_bsr.runtime.version import __version__


def check_sharing(config: Config, ranks: Alone) -> None:
    """Check that several processes can train with this configuration.

    Raises:
        ConfigError: a process has another configuration or version; the micro-batches cannot be divided among the
            processes; or the run has an optimizer without exchange (lbfgs, mezo), steps in the backward pass, or a
            download.
    """
    if ranks.world == 1:
        return
    settings, world = config.train, ranks.world
    ranks.require_same({"version of moe_bsr": __version__, "configuration": _digest(dump(config).encode())})
    check_shared_optimizer(settings)
    require(
        not settings.step_in_backward,
        "train.step_in_backward",
        settings.step_in_backward,
        "false with several processes, whose gradients are summed before a parameter is updated",
    )
    require(
        not config.data.download,
        "data.download",
        config.data.download,
        "false with several processes, which would all download: let one process do it beforehand (moe-bsr check)",
    )
    require(
        settings.grad_accumulation_steps % world == 0,
        "train.grad_accumulation_steps",
        settings.grad_accumulation_steps,
        f"a multiple of the {world} processes, which take equally many micro-batches each: "
        f"train.grad_accumulation_steps={world} computes what one process computes with it",
    )


def check_shared_optimizer(settings: TrainConfig) -> None:
    """Refuse optimizers whose updates are not exchanged between processes."""
    require(
        settings.optimizer not in ("lbfgs", "mezo"),
        "train.optimizer",
        settings.optimizer,
        "adamw, adamw8 or sgd with several processes: a probe is one pass over the images, and what mezo estimates is "
        "not exchanged; start it without torchrun",
    )


def require_alike(ranks: Alone, model: MultitaskViT, tasks: dict[str, TaskData]) -> None:
    """Check that all processes have the same backbone and images.

    Raises:
        ConfigError: a process differs from the first.
    """
    if ranks.world > 1:
        values = {"backbone": model.backbone_sha256}
        for name, data in tasks.items():
            for split in SPLITS:
                values[f"{split} split of task {name}"] = getattr(data, split).digest()
        ranks.require_same(values)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
