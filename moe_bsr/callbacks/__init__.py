"""Callbacks that record a training run: console, metrics.jsonl, TensorBoard, pictures of experts and mistakes.

`Csv`, `WandB` and `MLflow` are optional: pass them with `train(..., callbacks=[...])`, or name them in `train.log_to`.
"""

from importlib.util import find_spec
from pathlib import Path

from moe_bsr.callbacks.csv_file import Csv
from moe_bsr.callbacks.trackers import MLflow, WandB, require
from moe_bsr.training.callback import Callback

__all__ = ["Csv", "MLflow", "WandB", "default_callbacks", "loggers", "require_loggers"]


def default_callbacks(run_dir: Path) -> list[Callback]:
    """Return the callbacks used if none are given. Without matplotlib (the extra `views`) no pictures are drawn."""
    from moe_bsr.callbacks.console import Console
    from moe_bsr.callbacks.expert_views import ExpertViews
    from moe_bsr.callbacks.jsonl import Jsonl
    from moe_bsr.callbacks.mistakes import MistakeViews
    from moe_bsr.callbacks.tensorboard import TensorBoard
    from moe_bsr.callbacks.writer import Writer

    writer = Writer(run_dir / "tensorboard")
    views = [ExpertViews(writer), MistakeViews(writer)] if find_spec("matplotlib") else []
    return [Console(), Jsonl(run_dir), TensorBoard(writer), *views]


def loggers(names: list[str], run_dir: Path) -> list[Callback]:
    """Return the callbacks that `train.log_to` names."""
    made = {"csv": lambda: Csv(run_dir), "wandb": WandB, "mlflow": MLflow}
    return [made[name]() for name in names]


def require_loggers(names: list[str]) -> None:
    """Check that the packages for these loggers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in set(names) - {"csv"}:
        require(name)
