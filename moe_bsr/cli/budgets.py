"""Accuracy after so many minutes: of fit, and of what somebody would train in its place.

    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 1 2 5
    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 2 --methods fit timm_full --json

Each run is a process of its own, one after the other, scheduled for its budget. A budget counts everything from opening
the images on but the test, which is scored once. Nothing is tuned: all train at the configuration's rates, LoRA at
twice them. timm_lora needs peft. Let the machine do nothing else meanwhile.

Methods: fit, probe (the last block's class token), timm_full and timm_lora (plain code without kernels of ours), and
those of configs/methods/all.yaml, such as bsr and moe_bsr (the configuration's plan) or full (every block, nothing
dropped).
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

METHODS = ["fit", "probe", "bsr", "moe_bsr", "timm_full", "timm_lora"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 2.0, 5.0], metavar="N", help="(1 2 5)")
    help = f"in this order ({' '.join(METHODS)})"
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help=help)
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="for the runs (runs/NAME_budgets)")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load, packaged
    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.provenance import command, commit, environment
    from moe_bsr.runtime.text_tables import as_text
    from moe_bsr.study import budgets

    config = load(packaged.find_config(arguments.config), arguments.overrides)
    folder = arguments.run or Path("runs") / f"{Path(arguments.config).stem}_budgets"
    results = budgets.race(config, folder, arguments.minutes, arguments.methods, lambda line: say(line, error=True))
    if arguments.json:
        about = {"command": command(), "commit": commit(), "environment": environment(prepare(config.runtime))}
        print(json.dumps({**about, "seed": config.seed, "results": results}, indent=1))
        return 0
    tasks = list(results[0]["tasks"])
    rows = [["test top-1 %", "minutes", *tasks, "mean", "s", "updates", "MB"]]
    for result in results:
        shares = [f"{value:.1f}" for value in (*result["tasks"].values(), result["mean_top1"])]
        numbers = [f"{result['seconds']:.0f}", str(result.get("updates", "-")), f"{result['peak_mb']:.0f}"]
        rows.append([result["method"], f"{result['minutes']:g}", *shares, *numbers])
    say(as_text(rows))
    return 0
