"""Measure accuracy after a given number of minutes: `moe-bsr fit` against what one would usually train.

    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 1 2 5 --seeds 0 1 2
    moe-bsr budgets configs/deit_tiny_moe_bsr.yaml data.root=data --minutes 2 --methods fit timm_full --json
    moe-bsr budgets runs/deit_tiny_moe_bsr_budgets/budgets.json --show --picture minutes.png

Methods: fit; probe (heads on the class token of the last block); timm_full and timm_lora (plain code without the
kernels of this package; timm_lora needs peft); and those of configs/methods/all.yaml, such as bsr and moe_bsr (the plan
of the configuration) or full (every block trains, nothing is dropped).

The runs follow one another, each in a process of its own whose schedule fits the budget. A budget covers everything
from opening the images, except the final test, which is scored once. No method is tuned: all use the learning rates of
the configuration, LoRA twice these. timm_full and timm_lora clip the norm of the whole gradient, whatever
train.grad_clip_per is. Leave the machine otherwise idle.

Writes RUN/budgets.json with all results. Finished runs are kept: repeat the command to continue after an interruption,
or with more budgets, methods or seeds.

Exit status: 0 done, 1 a run failed, 2 invalid arguments or input.
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

METHODS = ["fit", "probe", "bsr", "moe_bsr", "timm_full", "timm_lora"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    help = "budgets (default: 1 2 5)"
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 2.0, 5.0], metavar="N", help=help)
    help = f"run these, in this order (default: {' '.join(METHODS)})"
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help=help)
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: the configuration's)")
    help = "folder for the runs (default: runs/NAME_budgets)"
    parser.add_argument("--run", type=Path, metavar="DIR", help=help)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw accuracy over minutes; needs matplotlib")
    parser.add_argument("--show", action="store_true", help="run nothing; CONFIG is a budgets.json to show")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load
    from moe_bsr.runtime.text_tables import as_markdown, as_text
    from moe_bsr.study import budgets

    if arguments.show:
        result = run_arguments.read_result(Path(arguments.config), {"environment", "runs"}, "budgets.json")
    else:
        config = load(arguments.config, arguments.overrides)
        folder = arguments.run or Path("runs") / f"{run_arguments.named(arguments.config).stem}_budgets"
        seeds = arguments.seeds or [config.seed]
        progress = lambda line: say(line, error=True)  # noqa: E731
        result = budgets.race(config, folder, arguments.minutes, arguments.methods, seeds, progress)
    if arguments.picture:
        from moe_bsr.study import budgets_picture

        budgets_picture.draw(result, arguments.picture)
    if arguments.json:
        say(json.dumps(result, indent=1))
    else:
        rows = budgets.table(result)
        say(as_markdown(rows) if arguments.markdown else as_text(rows))
    return 0
