"""What follows a training run: the console, metrics.jsonl, TensorBoard, views of experts and mistakes.

`Csv`, `WandB` and `MLflow` are there for who asks for them: `train(..., callbacks=[...])`, or `train.log_to`.
"""

from importlib.util import find_spec
from pathlib import Path

from moe_bsr.callbacks.csv_file import Csv
from moe_bsr.callbacks.trackers import MLflow, WandB, require
from moe_bsr.training.callback import Callback

__all__ = ["Csv", "MLflow", "WandB", "default_callbacks", "loggers", "require_loggers"]


def default_callbacks(run_dir: Path) -> list[Callback]:
    """Those of a run for which none are named; without matplotlib (the extra `views`) no pictures are drawn."""
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
    """Those that `train.log_to` names."""
    made = {"csv": lambda: Csv(run_dir), "wandb": WandB, "mlflow": MLflow}
    return [made[name]() for name in names]


def require_loggers(names: list[str]) -> None:
    """
    Raises:
        ConfigError: a package of one of these is not installed.
    """
    for name in set(names) - {"csv"}:
        require(name)
