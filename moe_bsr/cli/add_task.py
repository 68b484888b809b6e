"""Add a task to a finished run: a head, and a router for each layer of experts. All other weights stay frozen.

    moe-bsr add-task runs/photos birds                         # writes runs/photos_birds
    moe-bsr add-task runs/photos tasks/birds.yaml --out runs/more --data-root data
    moe-bsr add-task runs/photos birds train.optimizer=adamw train.epochs=10
    moe-bsr add-task runs/photos birds --resume

Only images of the new task are read, each once. Its routers are the mean of the other tasks' routers, and its head is
solved to the optimum, as by `moe-bsr probe`. With train.optimizer=adamw, head and routers are trained by gradient steps
instead.

Writes a new run folder with all tasks; its report has the new and the old ones. RUN does not change, and the answers
for its tasks stay the same to the bit.

Exit status: as of `moe-bsr train`.
"""

import argparse
from pathlib import Path

from moe_bsr.cli import run_arguments, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN", help="run folder with one model for all its tasks")
    help = "name of the new task (see moe-bsr tasks), its YAML file, or a configuration with this one task"
    parser.add_argument("task", metavar="TASK", help=help)
    help = "change a value of the configuration, such as train.penalty=mild"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)
    parser.add_argument("--out", dest="run", type=Path, metavar="NEWRUN", help="new run folder (default: RUN_TASK)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the datasets (default: that of RUN)")
    help = "weights of the backbone (default: RUN's backbone.weights)"
    parser.add_argument("--weights", metavar="FILE", help=help)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of NEWRUN")
    train.add_dry_run(parser)


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import override, replace
    from moe_bsr.training.added_task import added_task_config

    source = Path(arguments.config)
    places = {"data__root": arguments.data_root, "backbone__weights": arguments.weights}
    config = replace(added_task_config(source, arguments.task), **{k: v for k, v in places.items() if v is not None})
    config = override(config, arguments.overrides)
    arguments.run = arguments.run or run_arguments.beside(source, f"_{config.task_names()[-1]}")
    return train.train(arguments, config, "add-task")
