"""Find the best model of some tasks for a given time and memory on this machine.

    moe-bsr fit photos.yaml --minutes 10
    moe-bsr fit birds flowers --minutes 5 --memory 900MB
    moe-bsr fit configs/deit_tiny_moe_bsr.yaml --minutes 20 data.root=data --run runs/best

Give it a configuration, or names or files of tasks; with tasks, the configuration is configs/fit.yaml. It measures the
speed of the backbone on this machine, and trains as many of these models as the time allows:

    probe         only the heads, on frozen features of several blocks, solved to their optimum
    late          the last two blocks
    bsr, experts  the blocks and token dropping of the configuration, without and with experts

If there is time, late, bsr and experts each continue from the probe for a while, the best of them also at other
learning rates. It then gets the remaining time, and continues from the weights of its trial. Each run is trained in a
form that fits into --memory. The run with the highest validation accuracy is named, with the reason, and tested once.
--minutes cover everything from opening the images, except this test.

Writes one run folder per model in --run, for `predict`, `evaluate`, `views` and `train --resume`, and the table of all
in fit.json.

Exit status: 0 done, 1 training failed, 2 invalid arguments or input, 128 + signal if interrupted.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import program
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.config import Config

BASE = "configs/fit.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a configuration, or one or more tasks; key=value changes a value, such as backbone.weights=FILE"
    parser.add_argument("what", nargs="+", metavar="CONFIG|TASK|key=value", help=help)
    parser.add_argument("--minutes", type=_minutes, required=True, metavar="N", help="time for everything but the test")
    help = "memory of the whole process, such as 900MB or 2GB (default: nine tenths of what is free)"
    parser.add_argument("--memory", metavar="SIZE", help=help)
    help = "new folder for the runs (default: runs/NAME_fit)"
    parser.add_argument("--run", type=Path, metavar="DIR", help=help)
    parser.add_argument("--no-test", action="store_true", help="do not score the test split")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 10**5:
        raise argparse.ArgumentTypeError(f"{text}: above 0")
    return value


_minutes.__name__ = "number"


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr import api
    from moe_bsr.cost.planner import parse_bytes
    from moe_bsr.fit import Budget, Search
    from moe_bsr.runtime.files import write_whole

    config, name = configuration(arguments.what)
    folder = arguments.run or Path("runs") / f"{name}_fit"
    budget = Budget(arguments.minutes, arguments.memory and parse_bytes(arguments.memory, "--memory", 2**20))
    search = Search(
        config, folder, budget, lambda line: say(line, error=arguments.json), [] if arguments.json else None
    )
    result = search.run()
    if result["signal"]:
        say(f"interrupted; the runs are in {folder}", error=True)
        return 128 + result["signal"]
    if not arguments.no_test:
        say("testing the best run once", error=True)
        result["test"] = api.evaluate(Path(result["run"]), "test")
        write_whole(folder / "fit.json", json.dumps(result, indent=1))
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    say(table(result))
    say(f"\n{result['reason']}. Everything took {result['seconds']:.0f} s of {60 * result['minutes']:.0f}.")
    if "test" in result:
        tasks = ", ".join(f"{task} {about['top1']:.1f}" for task, about in result["test"]["tasks"].items())
        say(f"Test: {result['test']['mean_top1']:.1f} % top-1 on average ({tasks}).")
    say(f"Use it: {program('predict')} {result['run']} IMAGE")
    return 0


def configuration(what: list[str]) -> "tuple[Config, str]":
    """Return the configuration that the arguments mean, and a name for its runs."""
    from moe_bsr.config import ConfigError, load
    from moe_bsr.config.yaml_text import json_text
    from moe_bsr.data import load_spec

    overrides = [item for item in what if "=" in item]
    named = [item for item in what if "=" not in item]
    if not named:
        raise ConfigError("name a configuration, or at least one task (moe-bsr tasks lists them)")
    if len(named) == 1 and is_configuration(named[0]):
        return load(named[0], overrides), run_arguments.named(named[0]).stem
    tasks = [load_spec(item).name for item in named]
    listed = f"tasks={json_text(named)}"
    return load(BASE, [listed, *overrides]), "_".join(tasks[:3])


def is_configuration(name: str) -> bool:
    """Return whether an argument means a configuration: a file with a section of one, or something that is no task."""
    from moe_bsr.config import Config, packaged
    from moe_bsr.config.yaml_text import read_yaml
    from moe_bsr.data import load_spec

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        try:
            load_spec(name)
        except FileNotFoundError:
            return True
        except ValueError:  # reported when it is loaded
            pass
        return False
    path = path if path.is_file() else packaged.find("configs", path) or path
    entries = read_yaml(path, str(path)) if path.is_file() else {}
    sections = {"extends", *Config.__dataclass_fields__}
    return not isinstance(entries, dict) or not entries or not sections.isdisjoint(entries)


def table(result: dict[str, Any]) -> str:
    """Format the models in the order of training. A star marks the best."""
    from moe_bsr.runtime.text_tables import as_text

    tasks = list(result["candidates"][0]["tasks"]) if result["candidates"] else []
    cells = [["validation top-1 %", *tasks, "mean", "+-", "updates", "s in all", "training", "planned", "MB", ""]]
    for candidate in result["candidates"]:
        numbers = [*candidate["tasks"].values(), candidate["val_top1"], candidate["interval"]]
        limits = [f"{candidate[key]:.0f}" for key in ("updates", "seconds", "training", "planned", "peak_mb")]
        star = "*" if candidate["name"] == result["best"] else ""
        cells.append([candidate["name"], *(f"{number:.1f}" for number in numbers), *limits, star])
    return as_text(cells)
