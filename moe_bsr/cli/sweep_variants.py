"""Compare the variants at equal images: learning rate from one grid on validation, then one test each.

    moe-bsr sweep-variants --data DIR --weights FILE --out runs/variants [--steps 300] [--grid-steps 75]

Every variant sees the same images of each task (steps x batch / tasks). The learning rate is the best of
the grid by mean validation top-1 after --grid-steps (one value: that one); the test split is scored once, after
the full run. Finished runs are kept, so that the command can be repeated. `moe-bsr compare` makes the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

VARIANTS = ["last", "stl_full", "stl_bsr", "dense_bsr", "moe_full", "moe_bsr", "random_router"]
GRID = [1e-4, 4e-4]
TASKS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", "--data-root", required=True, help="data root of the five real datasets")
    parser.add_argument("--weights", required=True, help="DeiT-Tiny weights, or hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="updates in all, over the five tasks")
    parser.add_argument("--grid-steps", type=int, default=75)
    parser.add_argument("--grid", type=float, nargs="+", default=GRID)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs import report

    for variant in arguments.variants:
        scores = dict.fromkeys(arguments.grid, 0.0)
        for rate in arguments.grid if len(arguments.grid) > 1 else []:
            folder = arguments.out / "grid" / f"{variant}_{rate:g}"
            train(arguments, variant, rate, arguments.grid_steps, folder, "train.evaluate_test=false")
            scores[rate] = report.read(folder)["selected_mean_val_top1"]
        best = max(scores, key=scores.get)
        print(json.dumps({"variant": variant, "validation": scores, "chosen": best}), flush=True)
        train(arguments, variant, best, arguments.steps, arguments.out / variant)
    return 0


def train(arguments: argparse.Namespace, variant: str, rate: float, steps: int, folder: Path, *more: str) -> None:
    """One run, in a process of its own; it goes on where it was stopped."""
    steps = steps // TASKS if variant.startswith("stl") else steps  # there they are counted per task
    subprocess.run(
        [
            sys.executable,
            "-m",
            "moe_bsr",
            "train",
            f"configs/deit_tiny_{variant}.yaml",
            "--run",
            folder,
            "--resume",
            f"data.root={arguments.data}",
            f"backbone.weights={arguments.weights}",
            "train.eval_every=null",
            "backbone.name=deit_tiny_patch16_224",
            f"train.steps={steps}",
            f"train.lr={rate}",
            "train.head_lr_scale=10",  # the same for all: a head starts from nothing and wants more than a block
            *more,
            *arguments.overrides,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
