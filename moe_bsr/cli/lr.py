"""Look for a learning rate: train a little while the rate rises, and see where the loss falls fastest.

    moe-bsr lr configs/quickstart.yaml
    moe-bsr lr photos.yaml train.optimizer=sgd --high 10
    moe-bsr lr photos.yaml --csv > curve.csv

Every update has a larger rate than the one before, from --low to --high in equal ratios; the search ends where the loss
has risen to four times its lowest. The loss is relative to each task's first, smoothed, and the mean of the tasks.
Layer decay and head_lr_scale hold as in training; warm-up and schedule do not. The rate suggested is where the loss
falls fastest: a train.lr to begin with. No run folder is written, and the test images are not looked at.

Exit status: 0 a rate was found, 1 the loss never fell, 2 refused.
"""

import argparse
import csv
import json
import sys
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import FAILED
from moe_bsr.cli.terminal import say

ROWS, WIDTH = 24, 50  # of the curve as text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    parser.add_argument("--steps", type=run_arguments.at_least(10), metavar="N", help="updates (100, or 30 a task)")
    parser.add_argument("--low", type=float, default=1e-6, metavar="RATE", help="the first rate (1e-6)")
    parser.add_argument("--high", type=float, default=1.0, metavar="RATE", help="the last one (1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON on stdout instead of text")
    form.add_argument("--csv", action="store_true", help="the curve alone, as lr,loss,smoothed")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.config import load, packaged

    config = load(packaged.find_config(arguments.config), arguments.overrides)
    found = moe_bsr.find_lr(config, arguments.steps, arguments.low, arguments.high)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    elif arguments.csv:
        writer = csv.DictWriter(sys.stdout, ("lr", "loss", "smoothed"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found["curve"])
    else:
        say("\n".join(told(found)))
    return 0 if found["suggestion"] else FAILED


def told(found: dict[str, Any]) -> list[str]:
    """The curve as bars, and the suggestion."""
    curve, rate = found["curve"], found["suggestion"]
    shown = curve[:: max(1, -(-len(curve) // ROWS))]
    values = [point["smoothed"] for point in shown]
    top = max(min(max(values), 2.0), min(values))  # where it diverges it would flatten everything else
    lines = ["      lr  relative loss"]
    nearest = min(range(len(shown)), key=lambda i: abs(shown[i]["lr"] / rate - 1)) if rate else None
    for i, (point, value) in enumerate(zip(shown, values, strict=True)):
        bar = "#" * round(WIDTH * min(value, top) / top)
        lines.append(f"{point['lr']:8.1e}  {value:6.3f} {bar}{' <' if i == nearest else ''}")
    lines.append("")
    if rate is None:
        return [*lines, "the loss never fell: try other rates (--low, --high), or look at the data"]
    ended = "; then it diverged" if found["diverged"] else ""
    return [*lines, f"train.lr={rate:.1e}  (falls fastest; lowest at {found['lowest']:.1e}{ended})"]
