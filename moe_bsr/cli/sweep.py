"""Compare arms at equally many images, with several seeds: differences in pairs, with their intervals.

    moe-bsr sweep experts_scene                      a sweep that comes with the package
    moe-bsr sweep conflict --config photos.yaml      do my tasks get in each other's way, and do experts help?
    moe-bsr sweep mine.yaml data.root=data --run runs/mine --seeds 0 1 2 3

A sweep file has arms; each is a configuration with changes. All arms train for equally many updates of each task, with
the same seeds. key=value holds for all of them. Finished runs are kept, so that the same command goes on, and more
seeds or arms can be added. RUN/sweep.json has everything.
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
    parser.add_argument("sweep", metavar="FILE", help="a sweep file; configs/sweeps/NAME.yaml is found in the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all arms, such as data.root=DIR")
    parser.add_argument("--config", metavar="FILE", help="the configuration of all arms that name none of their own")
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="for the runs (runs/NAME_sweep)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the file's")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, the baseline among them")
    updates = "of each task, in place of the file's"
    parser.add_argument("--updates", type=run_arguments.at_least(1), metavar="N", help=updates)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--show", action="store_true", help="train nothing: FILE is a sweep.json")


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
            print(f"{program('sweep')}: interrupted; the same command goes on", file=sys.stderr)
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
