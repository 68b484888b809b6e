"""Compare configurations ("arms") at equally many updates over several seeds: paired differences with intervals.

    moe-bsr sweep experts_scene                      # a sweep that comes with the package
    moe-bsr sweep conflict --config photos.yaml      # do my tasks interfere with each other, and do experts help?
    moe-bsr sweep mine.yaml data.root=data --run runs/mine --seeds 0 1 2 3

A sweep file lists the arms; each is a configuration with changes, and one of them is the baseline. All arms train for
equally many updates of each task, with the same seeds. key=value holds for all arms.

Writes RUN/sweep.json with all results. Finished runs are kept: repeat the command to continue after an interruption, or
with more seeds or arms.

Exit status: 0 done, 1 training failed, 2 invalid arguments or input, 128 + signal if interrupted.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a sweep file, or NAME for the package's configs/sweeps/NAME.yaml"
    parser.add_argument("sweep", metavar="FILE", help=help)
    help = "change a value in all arms, such as data.root=DIR"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)
    parser.add_argument("--config", metavar="FILE", help="configuration of the arms that do not name one")
    help = "folder for the runs (default: runs/NAME_sweep)"
    parser.add_argument("--run", type=Path, metavar="DIR", help=help)
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: those of the file)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, with the baseline (default: all)")
    updates = "updates of each task (default: those of the file)"
    parser.add_argument("--updates", type=run_arguments.at_least(1), metavar="N", help=updates)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--show", action="store_true", help="train nothing; FILE is a sweep.json to show")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.cli.main import program
    from moe_bsr.runtime.text_tables import as_markdown, as_text
    from moe_bsr.study import sweep

    if arguments.show:
        result = run_arguments.read_result(Path(arguments.sweep), {"runs", "baseline", "differences"}, "sweep.json")
    else:
        try:
            result = _run(arguments)
        except sweep.Interrupted as stop:
            print(f"{program('sweep')}: interrupted; repeat the command to continue", file=sys.stderr)
            return 128 + int(stop.args[0])
    if arguments.json:
        say(json.dumps(result, indent=1))
    else:
        rows = sweep.rows(result)
        say(as_markdown(rows) if arguments.markdown else as_text(rows))
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from moe_bsr.config import ConfigError
    from moe_bsr.study import plan, sweep

    asked = plan.read(arguments.sweep)
    if unknown := [arm for arm in arguments.arms or [] if arm not in asked.arms]:
        raise ConfigError(f"--arms {' '.join(unknown)}: one of {', '.join(asked.arms)}")
    asked = dataclasses.replace(
        asked,
        arms={name: asked.arms[name] for name in arguments.arms or asked.arms},
        seeds=arguments.seeds or asked.seeds,
        updates=arguments.updates or asked.updates,
        config=arguments.config or asked.config,
    )
    folder = arguments.run or Path("runs") / f"{Path(arguments.sweep).stem}_sweep"
    return sweep.run(asked, folder, arguments.overrides, lambda line: say(line, error=True))
