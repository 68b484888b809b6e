"""Take tasks out of a finished run: a new run folder without their heads and routers.

    moe-bsr remove-task runs/photos birds                      # runs/photos_without_birds
    moe-bsr remove-task runs/photos birds cars --out runs/pets

RUN stays as it is. What the other tasks answer does not change by a bit. The new folder has the best weights alone:
it is for evaluate, predict, share and add-task, or to start another run from (train.init_from), and not resumed.

Exit status: 0 written, 2 refused.
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with one model for all its tasks")
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="name of a task to leave out")
    parser.add_argument("--out", type=Path, metavar="NEWRUN", help="the new run folder (RUN_without_TASK)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs.finished import read_finished, write_run

    source = arguments.run
    out = arguments.out or source.with_name(f"{source.stem}_without_{'_'.join(arguments.tasks)}")
    finished = read_finished(source, arguments.tasks)
    write_run(finished, source, out)
    tasks = finished.config.task_names()
    if arguments.json:
        print(json.dumps({"run": str(source), "out": str(out), "tasks": tasks, "step": finished.step}, indent=1))
    else:
        say(f"written: {out}, with {', '.join(tasks)}")
    return 0
