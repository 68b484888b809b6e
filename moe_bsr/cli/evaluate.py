"""Evaluate a run, task by task: accuracy with its interval, calibration, tokens kept, experts used.

    moe-bsr evaluate runs/quickstart
    moe-bsr evaluate runs/real --task flowers102 pets --split test --json > test.json

RUN is a folder that `moe-bsr train` wrote, of one model for all tasks or of one model per task. The
numbers are those of the trainer's own evaluation; data, backbone and device are the run's, unless an
option says where they are now. With --json stdout holds one JSON object and nothing else. Every
evaluation of the test split is counted in the run; choose by val.
"""

import argparse
import json

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    run_arguments.add_data(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="(val)")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.evaluation.tables import table
    from moe_bsr.runtime.top_list import are_many

    trained = moe_bsr.load(
        arguments.run, arguments.checkpoint, arguments.data_root, arguments.device, arguments.weights, arguments.task
    )
    with trained.runtime.in_effect():
        report = moe_bsr.evaluate(trained, arguments.split, batch_size=arguments.batch_size, on_task=announce)
    if arguments.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0
    say(f"{report['run']}, step {report['step']}, {arguments.split} split")
    if arguments.split == "test":
        say(f"(test evaluation {report['test_evaluations']} of this run)")
    for task, changed in report["data_changes"].items():
        say(f"{task}: these images changed since the run began: {changed}")
    say()
    say(table(report["tasks"]))
    if are_many(report["tasks"]):
        say(f"\nall {len(report['tasks'])} tasks: --json; some of them: --task NAME ...")
    return 0


def announce(task: str, images: int) -> None:
    say(f"{task}: {images} images", error=True)
