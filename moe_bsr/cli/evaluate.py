"""Measure the accuracy of a run, task by task: top-1 with its interval, calibration, tokens kept, experts used.

    moe-bsr evaluate runs/quickstart
    moe-bsr evaluate runs/real --task flowers102 pets --split test --json > test.json

RUN is the folder of a run, with one model for all tasks or one per task, or what `moe-bsr share` made of a run. The
evaluation is the one that training uses. Data, backbone and device are those of the run, unless an option gives others.

Every evaluation of the test split is counted in RUN/test_evaluations.log, so choose between models by the validation
split. With --json, stdout is one JSON object.

Exit status: 0 done, 2 invalid arguments or input.
"""

import argparse
import json

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    run_arguments.add_data(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="images to use (default: val)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.evaluation.tables import table
    from moe_bsr.runtime.top_list import are_many

    trained = run_arguments.loaded(arguments)
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
        say(f"\n--json prints all {len(report['tasks'])} tasks, --task NAME ... the tasks you name")
    return 0


def announce(task: str, images: int) -> None:
    say(f"{task}: {images} images", error=True)
