"""What follows a training run: the console, metrics.jsonl, TensorBoard, views of experts and mistakes."""

from importlib.util import find_spec
from pathlib import Path

from moe_bsr.training.callback import Callback


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
