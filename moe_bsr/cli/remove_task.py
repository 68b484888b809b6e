"""Remove tasks from a finished run: write a new run folder without their heads and routers.

    moe-bsr remove-task runs/photos birds                      # writes runs/photos_without_birds
    moe-bsr remove-task runs/photos birds cars --out runs/pets

RUN does not change. The answers for the other tasks stay the same to the bit. The new folder has only the best weights:
use it with `evaluate`, `predict`, `share` and `add-task`, or as the start of another run (train.init_from). Its
training cannot be resumed.

Exit status: 0 written, 2 invalid arguments or input.
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder with one model for all its tasks")
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="name of a task to remove")
    parser.add_argument("--out", type=Path, metavar="NEWRUN", help="new run folder (default: RUN_without_TASK)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs.finished import read_finished, write_run

    source = arguments.run
    out = arguments.out or run_arguments.beside(source, f"_without_{'_'.join(arguments.tasks)}")
    finished = read_finished(source, arguments.tasks)
    write_run(finished, source, out)
    tasks = finished.config.task_names()
    if arguments.json:
        print(json.dumps({"run": str(source), "out": str(out), "tasks": tasks, "step": finished.step}, indent=1))
    else:
        say(f"written: {out}, with {', '.join(tasks)}")
    return 0
