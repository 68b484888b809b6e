"""Compare fine-tuning methods on one backbone: memory, FLOPs, time, gradients, and with --train accuracy.

    moe-bsr compare-methods configs/deit_tiny_moe_bsr.yaml data.root=data --out methods.json
    moe-bsr compare-methods configs/deit_small_moe_bsr.yaml backbone.weights=random train.batch_size=8 --no-gradients \\
        --methods timm_full bsr lora_all --out small.json
    moe-bsr compare-methods configs/deit_tiny_moe_bsr.yaml data.root=data --train --seeds 0 1 2 --out methods.json
    moe-bsr compare-methods --from-json results/methods_*.json --markdown --picture docs/images/methods.png

CONFIG is the base, a configuration of MoE-BSR. A method is a set of changes to it, from configs/methods/all.yaml or a
file of your own. Cost is that of one update with train.batch_size images of the first task. Times are measured in turns
with --reference. Gradients are computed on real images and compared with storage exact. --train also measures accuracy
on all tasks: it tries three learning rates for --updates on validation images, then trains with the best one for
--minutes and scores the test images once, for each of --seeds.

The JSON file grows row by row. The same command resumes where it was stopped and computes only what is missing.
Exit status: 0 done, 2 refused.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.config import Config
    from moe_bsr.config.methods import Method

Stages = dict[tuple[str, ...], Callable[[], Any]]  # keys: where the result goes in train_info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=run_arguments.CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch_size=8")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods to compare (default: all of the file)")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="definitions of methods (default: configs/methods/all.yaml)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to which rows are added")
    parser.add_argument(
        "--reference", default="bsr", metavar="NAME", help="method that times are divided by (default: bsr)"
    )
    parser.add_argument(
        "--rounds",
        type=run_arguments.at_least(0),
        default=3,
        metavar="N",
        help="rounds of timing, 0 for none (default: 3)",
    )
    parser.add_argument(
        "--no-gradients", action="store_true", help="skip the comparison of gradients, which needs images"
    )
    parser.add_argument("--train", action="store_true", help="also measure accuracy: takes hours")
    parser.add_argument(
        "--updates",
        type=run_arguments.at_least(1),
        default=400,
        metavar="N",
        help="updates for each learning rate of --train (default: 400)",
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, metavar="N", help="of each timed run of --train (default: 2)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="of the timed runs of --train (default: the base's)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/methods"),
        metavar="DIR",
        help="folder of the runs of --train (default: runs/methods)",
    )
    parser.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="measure nothing, show these files")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the Pareto fronts into this file")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/methods.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.benchmark import method_page, method_picture
    from moe_bsr.config import require

    if arguments.from_json:
        files = arguments.from_json
    else:
        require(
            arguments.config is not None, "CONFIG", None, "give a configuration to compare methods on, or --from-json"
        )
        require(arguments.out is not None, "--out", None, "give a file for the rows, such as methods.json")
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
    """Compute the rows and stages that the file lacks, and add them."""
    from moe_bsr.benchmark import methods as cost
    from moe_bsr.cli.cost import classes_of
    from moe_bsr.config import load, methods, to_dict
    from moe_bsr.model.backbones import require_tokens
    from moe_bsr.study import equal

    base = load(arguments.config, arguments.overrides)
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
        stages: Stages = {
            ("cost",): lambda m=method: cost.cost(m, base, classes),
        }
        if arguments.rounds:
            stages["time",] = lambda m=method: cost.times(m, reference, base, classes, arguments.rounds)
        if not arguments.no_gradients:
            stages["gradient",] = lambda m=method: cost.fidelity(m, base)
        if arguments.train:
            about = (name, method, base)
            stages["equal_updates",] = lambda a=about: equal.at_equal_updates(*a, arguments.run, arguments.updates)
            for seed in arguments.seeds or [base.seed]:
                stages["equal_seconds", str(seed)] = lambda a=about, n=name, s=seed: equal.at_equal_seconds(
                    *a,
                    arguments.run,
                    arguments.minutes,
                    (result["methods"][n]["train_info"]["equal_updates"] or {"factor": 1.0})["factor"],
                    s,
                )
        fill(result, name, method, base, stages, arguments.out)


def check(name: str, method: "Method", base: "Config") -> None:
    """Raise ConfigError for a method that the base does not allow, before anything is measured."""
    from moe_bsr.config import ConfigError
    from moe_bsr.model.multitask import build_on_meta

    try:
        build_on_meta(method.of(base).of_task(base.task_names()[0]), {base.task_names()[0]: 2})
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from None


def same_lengths(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Raise ConfigError if rows in the file were trained for other lengths: one table cannot hold both."""
    from moe_bsr.config import ConfigError

    for name, row in result["methods"].items():
        info = row["train_info"]
        trained = [
            ("updates", info.get("equal_updates")),  # None for a solved probe
            *(("minutes", r) for r in info.get("equal_seconds", {}).values()),
        ]
        for length, run in trained:
            if run is not None and run[length] != getattr(arguments, length):
                raise ConfigError(
                    f"{arguments.out}: {name} has {run[length]:g} {length}, not {getattr(arguments, length)}: "
                    f"give --{length} {run[length]:g}, or another --out"
                )


def portable(base: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration's values without folders of this machine, and other paths reduced to their last part."""
    from moe_bsr.runs.share import without_folder

    base["data"]["root"] = Path(base["data"]["root"]).name
    base["backbone"]["weights"] = Path(base["backbone"]["weights"]).name
    base["storage"] = without_folder(base["storage"])
    base["data"]["feature_cache_dir"] = None
    return base


def begin(file: Path, base: dict[str, Any], reference: str, task: str, classes: int) -> dict[str, Any]:
    """Read the file, or return a result without rows.

    Raises:
        ConfigError: the file was made from another base, task or reference.
    """
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
            before = defaults[section] | before  # for keys that are newer than the file
        if before != value:
            raise ConfigError(f"{file}: its base has another {section}: give the same base, or another --out")
    return old | {"base": base}


def fill(result: dict[str, Any], name: str, method: "Method", base: "Config", stages: Stages, file: Path) -> None:
    """Compute the stages that the method's row lacks, and write the file after each."""
    import dataclasses
    import time

    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.files import write_whole
    from moe_bsr.runtime.provenance import commit, environment, made_by

    runtime = prepare(base.runtime)
    about = dataclasses.asdict(method)
    row = result["methods"].get(name)
    if row is None or row["run_info"]["method"] != about:  # the method was redefined
        row = {"run_info": {"method": about, "total_seconds": 0.0}, "train_info": {}, "meta_info": {}}
    result["methods"][name] = row
    for (stage, *seed), compute in stages.items():
        place = row["train_info"].setdefault(stage, {}) if seed else row["train_info"]
        key = seed[0] if seed else stage
        if key in place:
            continue
        say(f"{name}: {stage}{f', seed {key}' if seed else ''}", error=True)
        began = time.monotonic()
        place[key] = compute()
        row["run_info"]["total_seconds"] += time.monotonic() - began
        row["run_info"]["created_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row["meta_info"][stage] = {"commit": commit(), **environment(runtime)}
        result |= made_by(runtime)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result, indent=1) + "\n")
