"""All methods side by side on one backbone: memory, FLOPs, time, gradients, and with --train accuracy.

    moe-bsr compare-methods configs/deit_tiny_moe_bsr.yaml data.root=data --out methods.json
    moe-bsr compare-methods configs/deit_small_moe_bsr.yaml backbone.weights=random train.batch_size=8 --no-gradients \\
        --methods timm_full bsr lora_all --out small.json
    moe-bsr compare-methods configs/deit_tiny_moe_bsr.yaml data.root=data --train --updates 400 --minutes 2 --out m.json
    moe-bsr compare-methods --from-json results/methods_*.json --markdown --picture docs/images/methods.png

The configuration is the base, one of MoE-BSR; a method is what it changes of it (configs/methods/all.yaml, or a file
of your own). Cost is of an update of train.batch_size images of the first task. Every time is that of a method in
turns with --reference. Gradients are of real images, compared with storage exact. --train gives each method three
learning rates on validation images at equal updates, and races it at the best one for --minutes, tested once.

FILE grows row by row: the same command goes on where it was stopped, and computes no finished row again.
Exit status: 0 done, 2 refused.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.config import Config
    from moe_bsr.config.methods import Method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=run_arguments.CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch_size=8")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="in this order (all of the file)")
    parser.add_argument("--file", type=Path, metavar="FILE", help="of methods (configs/methods/all.yaml)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON that rows are added to")
    parser.add_argument("--reference", default="bsr", metavar="NAME", help="method that times are relative to (bsr)")
    parser.add_argument("--rounds", type=run_arguments.at_least(1), default=3, metavar="N", help="of timing (3)")
    parser.add_argument("--no-gradients", action="store_true", help="then no images are needed")
    parser.add_argument("--train", action="store_true", help="accuracy too: hours")
    parser.add_argument("--updates", type=run_arguments.at_least(1), default=400, metavar="N", help="of --train (400)")
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N", help="of --train (2)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/methods"), metavar="DIR", help="of its runs (runs/methods)"
    )
    parser.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="measure nothing, show these")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the fronts into it")
    parser.add_argument("--markdown", action="store_true", help="the page docs/methods.md")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.benchmark import method_page, method_picture
    from moe_bsr.config import require

    if arguments.from_json:
        files = arguments.from_json
    else:
        require(arguments.config is not None, "CONFIG", None, "a configuration to compare methods on, or --from-json")
        require(arguments.out is not None, "--out", None, "a file for the rows, such as methods.json")
        from moe_bsr.cli.main import program
        from moe_bsr.study.sweep import Interrupted

        try:
            measure(arguments)
        except Interrupted as stop:
            print(f"{program('compare-methods')}: interrupted; the same command goes on", file=sys.stderr)
            return 128 + int(stop.args[0])
        files = [arguments.out]
    results = {file.name: json.loads(file.read_text()) for file in files}
    if arguments.picture:
        method_picture.draw(list(results.values()), arguments.picture)
    if arguments.json:
        print(json.dumps(results if len(results) > 1 else next(iter(results.values())), indent=1))
    else:
        print((method_page.as_markdown if arguments.markdown else method_page.as_text)(results))
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Add to the file what it lacks."""
    from moe_bsr.benchmark import methods as cost
    from moe_bsr.cli.cost import classes_of
    from moe_bsr.config import load, methods, packaged, to_dict
    from moe_bsr.model.backbones import require_tokens
    from moe_bsr.study import equal

    base = load(packaged.find_config(arguments.config), arguments.overrides)
    require_tokens(base.backbone, "compare-methods")
    every = methods.read(arguments.file)
    chosen = methods.read(arguments.file, arguments.methods)
    (reference,) = methods.read(arguments.file, [arguments.reference]).values()
    for name, method in chosen.items():
        check(name, method, base)
    task, classes = next(iter(classes_of(base, None).items()))
    result = begin(arguments.out, portable(to_dict(base)), arguments.reference, task, classes)
    if arguments.train:
        same_lengths(result, arguments)
    for name in (name for name in every if name in chosen):
        method = chosen[name]
        stages = {
            "cost": lambda m=method: cost.cost(m, base, classes),
            "time": lambda m=method: cost.times(m, reference, base, classes, arguments.rounds),
        }
        if not arguments.no_gradients:
            stages["gradient"] = lambda m=method: cost.fidelity(m, base)
        if arguments.train:
            about = (name, method, base)
            stages["equal_updates"] = lambda a=about: equal.at_equal_updates(*a, arguments.run, arguments.updates)
            stages["equal_seconds"] = lambda a=about, n=name: equal.at_equal_seconds(
                *a,
                arguments.run,
                arguments.minutes,
                result["methods"][n]["train_info"]["equal_updates"]["factor"],
            )
        fill(result, name, method, base, stages, arguments.out)


def check(name: str, method: "Method", base: "Config") -> None:
    """Refuse a method that the base cannot have, before anything is measured."""
    from moe_bsr.config import ConfigError
    from moe_bsr.model.multitask import build_on_meta

    try:
        build_on_meta(method.of(base).of_task(base.task_names()[0]), {base.task_names()[0]: 2})
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from None


def same_lengths(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Refuse lengths that differ from those of rows the file holds: they would stand in one table."""
    from moe_bsr.config import ConfigError

    for stage, length in (("equal_updates", "updates"), ("equal_seconds", "minutes")):
        asked = getattr(arguments, length)
        for name, row in result["methods"].items():
            if (told := row["train_info"].get(stage, {}).get(length, asked)) != asked:
                raise ConfigError(
                    f"{arguments.out}: {name} has {told:g} {length}, not {asked:g}: give --{length} {told:g}, or "
                    "another --out"
                )


def portable(base: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values without the folders of this machine."""
    base["data"]["root"] = Path(base["data"]["root"]).name
    base["backbone"]["weights"] = Path(base["backbone"]["weights"]).name
    return base


def begin(file: Path, base: dict[str, Any], reference: str, task: str, classes: int) -> dict[str, Any]:
    """What the file holds already, or a result without rows."""
    from moe_bsr.config import ConfigError, from_dict, to_dict

    new = {"base": base, "reference": reference, "task": task, "classes": classes, "methods": {}}
    if not file.exists():
        return new
    old = json.loads(file.read_text())
    for key in ("reference", "task", "classes"):
        if old.get(key) != new[key]:
            raise ConfigError(f"{file}: its {key} is {old.get(key)!r}, not {new[key]!r}: give another --out")
    defaults = to_dict(from_dict({}))
    for section, value in base.items():
        before = old["base"].get(section, defaults[section])
        if isinstance(value, dict):
            before = defaults[section] | before  # keys that are newer than the file
        if before != value:
            raise ConfigError(f"{file}: its base has another {section}: give the same base, or another --out")
    return old | {"base": base}


def fill(
    result: dict[str, Any], name: str, method: "Method", base: "Config", stages: dict[str, Any], file: Path
) -> None:
    """Compute the stages that the method's row lacks, each written at once."""
    import dataclasses
    import time

    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.files import write_whole
    from moe_bsr.runtime.provenance import command, commit, environment

    runtime = prepare(base.runtime)
    about = dataclasses.asdict(method)
    row = result["methods"].get(name)
    if row is None or row["run_info"]["method"] != about:  # another method of that name
        row = {"run_info": {"method": about, "total_seconds": 0.0}, "train_info": {}, "meta_info": {}}
    result["methods"][name] = row
    for stage, compute in stages.items():
        if stage in row["train_info"]:
            continue
        say(f"{name}: {stage}", error=True)
        began = time.monotonic()
        row["train_info"][stage] = compute()
        row["run_info"]["total_seconds"] += time.monotonic() - began
        row["run_info"]["created_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row["meta_info"][stage] = {"commit": commit(), **environment(runtime)}
        result |= {"command": command(), "commit": commit(), "environment": environment(runtime)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result, indent=1) + "\n")
