"""Evaluate a run, task by task: accuracy with its interval, calibration, tokens kept, experts used.

    python tools/evaluate.py RUN [--task NAME ...] [--split val|test] [--json] [--batch-size N]
                             [--data-root DIR] [--weights FILE] [--device cpu|cuda|...]
                             [--checkpoint best|last|STEP]

RUN is a run folder of tools/train.py, of one model for all tasks or of one model per task. The
numbers are those of the trainer's own evaluation; data, backbone and device are the run's, unless an
option says where they are now. With --json stdout holds one JSON object and
nothing else. Every evaluation of the test split is counted in the run; choose by val.

    python tools/evaluate.py runs/quickstart
    python tools/evaluate.py runs/real --task flowers102 pets --split test --json > test.json
"""

if __name__ == "__main__":
    from moe_bsr.runtime import allocator

    allocator.start_again()  # before anything else is imported, or it would be imported twice

import argparse
import json
import statistics
import sys
from pathlib import Path

from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.evaluation.tables import table
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.folder import count_test_evaluation
from moe_bsr.runs.load import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--task", nargs="+", action="extend", metavar="NAME", help="only these (all)")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="(val)")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (64)")
    parser.add_argument("--data-root", metavar="DIR", help="where data lie (the run's data.root)")
    parser.add_argument(
        "--weights", metavar="FILE", help="where the backbone's weights are (the run's backbone.weights)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, ... (the run's runtime.device)")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (best)")
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    try:
        report = run_evaluation(args)
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return
    print(f"{report['run']}, step {report['step']}, {args.split} split")
    if args.split == "test":
        print(f"(test evaluation {report['test_evaluations']} of this run)")
    print()
    print(table(report["tasks"]))


def run_evaluation(args: argparse.Namespace) -> dict:
    loaded = load(args.run, args.checkpoint, args.data_root, args.device, args.weights, args.task)
    data = {task: loaded.data(task) for task in loaded.models}  # if missing, nothing is counted
    report = {"run": str(args.run), "step": loaded.step, "split": args.split}
    if args.split == "test":
        report["test_evaluations"] = count_test_evaluation(args.run, list(data))
    results = {}
    for task in data:
        print(f"{task}: {len(getattr(data[task], args.split))} images", file=sys.stderr)
        results[task] = evaluate(
            loaded.models[task], data[task], args.split, loaded.transforms, loaded.runtime, args.batch_size
        )
    mean = statistics.fmean(result["top1"] for result in results.values())
    return report | {"mean_top1": mean, "tasks": results}


if __name__ == "__main__":
    main()
