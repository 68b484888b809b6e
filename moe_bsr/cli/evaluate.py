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
import statistics
import sys
from typing import Any

from moe_bsr.cli import run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    run_arguments.add_data(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="(val)")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.evaluation.evaluate import table

    report = evaluate_run(arguments)
    if arguments.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0
    print(f"{report['run']}, step {report['step']}, {arguments.split} split")
    if arguments.split == "test":
        print(f"(test evaluation {report['test_evaluations']} of this run)")
    print()
    print(table(report["tasks"]))
    return 0


def evaluate_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of every chosen task, as --json prints them."""
    from moe_bsr.evaluation.evaluate import evaluate
    from moe_bsr.runs import folder

    loaded = folder.load(
        arguments.run, arguments.checkpoint, arguments.data_root, arguments.device, arguments.weights, arguments.task
    )
    data = {task: loaded.data(task) for task in loaded.models}  # if missing, nothing is counted
    report = {"run": str(arguments.run), "step": loaded.step, "split": arguments.split}
    if arguments.split == "test":
        report["test_evaluations"] = folder.count_test_evaluation(arguments.run, list(data))
    results = {}
    for task in data:
        print(f"{task}: {len(getattr(data[task], arguments.split))} images", file=sys.stderr)
        results[task] = evaluate(
            loaded.models[task], data[task], arguments.split, loaded.transforms, loaded.runtime, arguments.batch_size
        )
    mean = statistics.fmean(result["top1"] for result in results.values())
    return report | {"mean_top1": mean, "tasks": results}
