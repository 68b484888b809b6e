"""Accuracy after so many minutes: of fit, and of what somebody would train in its place.

    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 1 2 5 --seeds 0 1 2
    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 2 --methods fit timm_full --json
    moe-bsr budgets runs/deit_tiny_moe_bsr_budgets/budgets.json --show --picture minutes.png

Each run is a process of its own, one after the other, scheduled for its budget. A budget counts everything from opening
the images on but the test, which is scored once. Nothing is tuned: all train at the configuration's rates, LoRA at
twice them. timm_lora needs peft. Let the machine do nothing else meanwhile.

Methods: fit, probe (the last block's class token), timm_full and timm_lora (plain code without kernels of ours), and
those of configs/methods/all.yaml, such as bsr and moe_bsr (the configuration's plan) or full (every block, nothing
dropped).

RUN/budgets.json has everything. Finished runs are kept: the same command goes on, and budgets, methods and seeds can be
added.
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
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(the configuration's)")
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="for the runs (runs/NAME_budgets)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw accuracy over minutes; needs matplotlib")
    parser.add_argument("--show", action="store_true", help="run nothing: CONFIG is a budgets.json")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load, packaged
    from moe_bsr.runtime.text_tables import as_markdown, as_text
    from moe_bsr.study import budgets

    if arguments.show:
        result = run_arguments.read_result(Path(arguments.config), {"environment", "runs"}, "budgets.json")
    else:
        config = load(packaged.find_config(arguments.config), arguments.overrides)
        folder = arguments.run or Path("runs") / f"{Path(arguments.config).stem}_budgets"
        seeds = arguments.seeds or [config.seed]
        told = lambda line: say(line, error=True)  # noqa: E731
        result = budgets.race(config, folder, arguments.minutes, arguments.methods, seeds, told)
    if arguments.picture:
        from moe_bsr.study import budgets_picture

        budgets_picture.draw(result, arguments.picture)
    if arguments.json:
        say(json.dumps(result, indent=1))
    else:
        rows = budgets.table(result)
        say(as_markdown(rows) if arguments.markdown else as_text(rows))
    return 0
