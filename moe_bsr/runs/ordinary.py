"""What a run folder may hold under the names that a run reads and writes: ordinary files and folders.

A link there would be written through, and a pipe would be waited for. The run folder itself may be a link.
Checkpoints are looked at where they are read (`checkpoint.damage`): a spoiled one is passed over.
"""

from pathlib import Path

from moe_bsr.config import ConfigError
from moe_bsr.runtime import files

FILES = (
    *("config.yaml", "metrics.jsonl", "metrics.csv", "report.json", "report.md", "test_evaluations.log", "lock"),
    *("source_report.json", "config.json", "model.safetensors", "rejection.safetensors"),
)
FOLDERS = ("checkpoint", "images", "tensorboard", "views")


def check(run: Path, parts: list[str] | tuple[str, ...] = ()) -> None:
    """Refuse a run folder in which something else has the name of a file or folder of the run.

    Args:
        parts: names of the runs in it, one for each task.
    Raises:
        ConfigError: naming the first such thing.
    """
    try:
        for name in FILES:
            files.require(run / name, "a file")
        for name in (*FOLDERS, *parts):
            files.require(run / name, "a folder")
        for events in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
            files.require(events, "a file")
    except files.NotOrdinary as error:
        raise ConfigError(str(error)) from None
    for part in parts:
        check(run / part)
