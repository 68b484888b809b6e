"""Teach a finished run one task more: one head, and one router for each layer of experts; all else is frozen.

    moe-bsr add-task runs/photos birds                         # runs/photos_birds
    moe-bsr add-task runs/photos tasks/birds.yaml --out runs/more --data-root data
    moe-bsr add-task runs/photos birds train.optimizer=adamw train.epochs=10
    moe-bsr add-task runs/photos birds --resume

RUN stays as it is, and so do the answers of its tasks, to the bit. Only images of the new task are read, each once.
The new routers are the mean of the others; the head is solved at once, as by moe-bsr probe. With train.optimizer=adamw
both learn by updates. The new folder is a run like any other; its report has all tasks.

Exit status: as of moe-bsr train.
"""

import argparse
from pathlib import Path

from moe_bsr.cli import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN", help="run folder, with one model for all its tasks")
    parser.add_argument(
        "task", metavar="TASK", help="a task's name (moe-bsr tasks), its YAML file, or a configuration of it"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.penalty=mild")
    parser.add_argument("--out", dest="run", type=Path, metavar="NEWRUN", help="the new run folder (RUN_TASK)")
    parser.add_argument("--data-root", metavar="DIR", help="where data lie (where RUN found its own)")
    parser.add_argument("--weights", metavar="FILE", help="where the backbone's weights are (RUN's backbone.weights)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of NEWRUN")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, exit")
    parser.add_argument("--decode", action="store_true", help="with --dry-run: read every image, as moe-bsr check does")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import override, replace
    from moe_bsr.training.added_task import added_task_config

    source = Path(arguments.config)
    places = {"data__root": arguments.data_root, "backbone__weights": arguments.weights}
    config = replace(added_task_config(source, arguments.task), **{k: v for k, v in places.items() if v is not None})
    config = override(config, arguments.overrides)
    arguments.run = arguments.run or source.with_name(f"{source.stem}_{config.task_names()[-1]}")
    return train.train(arguments, config, "add-task")
