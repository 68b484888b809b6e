"""Search for a learning rate: train a little while the rate rises, and see where the loss falls fastest.

    moe-bsr lr configs/quickstart.yaml
    moe-bsr lr photos.yaml train.optimizer=sgd --high 10
    moe-bsr lr photos.yaml --csv > curve.csv

The rate rises with every update, from --low to --high in equal ratios. The search ends early if the loss has risen to
four times its minimum. The loss of each task is divided by its first one and smoothed, and the tasks are averaged.
Layer decay and head_lr_scale apply as in training; warm-up and schedule do not.

Prints the curve, and a value of train.lr to start with: the rate at which the loss falls fastest. Nothing is written,
and no test image is opened.

Exit status: 0 a rate was found, 1 the loss never fell, 2 invalid arguments or input.
"""

import argparse
import csv
import json
import sys
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import FAILED
from moe_bsr.cli.terminal import say

ROWS, WIDTH = 24, 50  # lines of the curve as text, and characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    help = "updates (default: 100, or 30 per task if that is more)"
    parser.add_argument("--steps", type=run_arguments.at_least(10), metavar="N", help=help)
    parser.add_argument("--low", type=float, default=1e-6, metavar="RATE", help="first rate (default: 1e-6)")
    parser.add_argument("--high", type=float, default=1.0, metavar="RATE", help="last rate (default: 1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of text")
    form.add_argument("--csv", action="store_true", help="print only the curve, as lr,loss,smoothed")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.config import load

    config = load(arguments.config, arguments.overrides)
    found = moe_bsr.find_lr(config, arguments.steps, arguments.low, arguments.high)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    elif arguments.csv:
        writer = csv.DictWriter(sys.stdout, ("lr", "loss", "smoothed"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found["curve"])
    else:
        say("\n".join(text_lines(found)))
    return 0 if found["suggestion"] else FAILED


def text_lines(found: dict[str, Any]) -> list[str]:
    """Format the curve as bars, and the suggestion."""
    curve, rate = found["curve"], found["suggestion"]
    shown = curve[:: max(1, -(-len(curve) // ROWS))]
    values = [point["smoothed"] for point in shown]
    top = max(min(max(values), 2.0), min(values))  # a divergence would make all other bars short
    lines = ["      lr  relative loss"]
    nearest = min(range(len(shown)), key=lambda i: abs(shown[i]["lr"] / rate - 1)) if rate else None
    for i, (point, value) in enumerate(zip(shown, values, strict=True)):
        bar = "#" * round(WIDTH * min(value, top) / top)
        lines.append(f"{point['lr']:8.1e}  {value:6.3f} {bar}{' <' if i == nearest else ''}")
    lines.append("")
    if rate is None:
        return [*lines, "the loss never fell: try other rates (--low, --high), or look at the data"]
    ended = "; then it diverged" if found["diverged"] else ""
    return [*lines, f"train.lr={rate:.1e}  (the loss falls fastest; lowest at {found['lowest']:.1e}{ended})"]
