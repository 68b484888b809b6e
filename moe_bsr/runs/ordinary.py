"""Check that the names a run reads and writes in its folder are regular files and folders.

A write through a link would change another file, and reading a pipe would block. The run folder itself may be a link.
Checkpoints are checked when they are read (`checkpoint.damage`), since a damaged one is skipped.
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
    """Check the files and folders of a run.

    Args:
        parts: names of the subfolders that are runs of one task each.
    Raises:
        ConfigError: one of them is something else, such as a link. The message names the first.
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
