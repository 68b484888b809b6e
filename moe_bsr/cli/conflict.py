"""Do tasks get in each other's way? What blocks of its own bring each task over blocks that all share.

    moe-bsr conflict configs/conflict_scene.yaml
    moe-bsr conflict birds flowers --updates 300 --seeds 0 1 2 3 --run runs/conflict
    moe-bsr conflict configs/deit_tiny_moe_bsr.yaml data.root=data --json > conflict.json

Give it a configuration, or the names or files of tasks (then configs/fit.yaml is the configuration). For each seed it
trains all tasks together and each task alone, without experts, at equally many updates of each task. The conflict
index is the difference in top-1, in points, with its 95 % interval over seeds. Above 0, tasks conflict, and experts or
blocks of their own can help. Below 0 they help each other, and a shared model is best.

Validation images are scored, or with --split test the test's. The same command goes on where it was stopped.

Exit status: 0 done, 1 training failed, 2 refused before it began, 130 if interrupted.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.fit.conflict import Index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a configuration, or tasks; and key=value, such as backbone.weights=FILE"
    parser.add_argument("what", nargs="+", metavar="CONFIG|TASK|key=value", help=help)
    count = run_arguments.at_least(1)
    parser.add_argument("--updates", type=count, default=200, metavar="N", help="of each task (200)")
    parser.add_argument("--seeds", type=run_arguments.at_least(0), nargs="+", default=[0, 1, 2, 3], help="(0 1 2 3)")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="images that are scored (val)")
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="for the runs (runs/NAME_conflict)")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.cli.fit import configuration
    from moe_bsr.fit import conflict
    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.provenance import command, commit, environment

    config, name = configuration(arguments.what)
    folder = arguments.run or Path("runs") / f"{name}_conflict"
    seeds = list(dict.fromkeys(arguments.seeds))
    found = conflict.measure(
        config, folder, arguments.updates, seeds, arguments.split, lambda line: say(line, error=True)
    )
    mean = found["mean"]
    if arguments.json:
        told = {"command": command(), "commit": commit(), "environment": environment(prepare(config.runtime))}
        told |= {"split": arguments.split, "updates": arguments.updates, "seeds": seeds, "mean": mean.as_dict()}
        told["tasks"] = {task: index.as_dict() for task, index in found.items() if task != "mean"}
        print(json.dumps(told, indent=1))
        return 0
    say(table(found, arguments.split))
    say(f"\n{conclusion(mean)}")
    return 0


def table(found: "dict[str, Index]", split: str) -> str:
    """A row for each task, and their mean."""
    from statistics import fmean

    from moe_bsr.runtime.text_tables import as_text

    rows = [[f"top-1 %, {split}", "shared", "apart", "index", "95 % interval"]]
    for task, index in found.items():
        interval = "-" if index.interval is None else "{:+.1f} to {:+.1f}".format(*index.interval)
        rows.append([task, f"{fmean(index.shared):.1f}", f"{fmean(index.apart):.1f}", f"{index.mean:+.1f}", interval])
    return as_text(rows)


def conclusion(mean: "Index") -> str:
    """One sentence."""
    if mean.interval is None:
        return "One seed cannot tell this from chance: give --seeds 0 1 2 3."
    low, high = mean.interval
    if low > 0:
        return f"The tasks conflict: blocks of their own bring {mean.mean:.1f} points. Experts can pay here."
    if high < 0:
        return f"The tasks help each other: sharing brings {-mean.mean:.1f} points. A shared model is best."
    return "Neither conflict nor help is certain in the mean: more seeds or images would tell."
