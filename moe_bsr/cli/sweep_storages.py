"""Does a storage cost accuracy? Runs in pairs: same seed, same images in the same order, another storage.

    moe-bsr sweep-storages --data DIR --weights FILE --out runs/storages [--steps 80]

DeiT-Tiny with BSR, one model per task. Writes OUT/storages.json and prints a table: test top-1 with `exact`
storage and its 95 % interval (of the finite test set, mean over the seeds), and the other storages' mean difference
in points, with every seed's own. Finished runs are kept, so that the command can be repeated.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from moe_bsr.cli.main import program

CONFIG = "configs/deit_tiny_stl_bsr.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", "--data-root", required=True, help="data root of the tasks")
    parser.add_argument("--weights", required=True, help="DeiT-Tiny weights, or hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["flowers102", "pets", "cifar10"])
    parser.add_argument("--storages", nargs="+", default=["int8"], help="compared with exact")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="updates of each task")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.config import load, packaged

    top1: dict[str, dict[str, list[float]]] = {}
    intervals: dict[str, list[list[float]]] = {}
    for seed in arguments.seeds:
        for storage in ["exact", *arguments.storages]:
            config = load(
                packaged.find_config(CONFIG),
                [
                    f"tasks=[{', '.join(arguments.tasks)}]",
                    f"data.root={arguments.data}",
                    f"seed={seed}",
                    f"backbone.weights={arguments.weights}",
                    "backbone.name=deit_tiny_patch16_224",
                    f"storage={storage}",
                    f"train.steps={arguments.steps}",
                    "train.eval_every=null",
                    *arguments.overrides,
                ],
            )
            report = moe_bsr.train(config, arguments.out / f"{storage}_seed{seed}", True)
            if report["status"] == "interrupted":
                print(f"{program('sweep-storages')}: interrupted; the same command goes on", file=sys.stderr)
                return 128 + report["signal"]
            for task, scores in report["tasks"].items():
                top1.setdefault(storage, {}).setdefault(task, []).append(scores["top1"])
                if storage == "exact":
                    intervals.setdefault(task, []).append([scores["top1_low"], scores["top1_high"]])
    result = {
        "config": CONFIG,
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "set": arguments.overrides,
        "top1": top1,
        "intervals": intervals,
    }
    (arguments.out / "storages.json").write_text(json.dumps(result, indent=1))
    print("\n".join(table(result)))
    return 0


def table(result: dict[str, Any]) -> list[str]:
    """Markdown: a row a task."""
    others = [storage for storage in result["top1"] if storage != "exact"]
    lines = [
        "| test top-1 % | exact | 95 % interval | " + " | ".join(f"{s}, points" for s in others) + " |",
        "| --- | --: | --- |" + " --- |" * len(others),
    ]
    for task, exact in result["top1"]["exact"].items():
        low, high = (statistics.mean(ends) for ends in zip(*result["intervals"][task], strict=True))
        cells = []
        for storage in others:
            gains = [b - a for a, b in zip(exact, result["top1"][storage][task], strict=True)]
            each = ", ".join(f"{gain:+.2f}" for gain in gains)
            cells.append(f"{statistics.mean(gains):+.2f} ({each})")
        lines.append(f"| {task} | {statistics.mean(exact):.2f} | {low:.1f} to {high:.1f} | {' | '.join(cells)} |")
    return lines
