"""Accuracy after a number of minutes: `moe-bsr fit` beside the methods one would train instead.

Each run is a process of its own and plans its schedule for the budget. The budget counts everything from opening the
images, except the test. All runs have the same splits. The test images are scored once, at the end.
"""

import dataclasses
import itertools
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.methods import Method
from moe_bsr.config.methods import read as read_methods
from moe_bsr.config.probe import probe_config
from moe_bsr.evaluation.metrics import over_seeds
from moe_bsr.fit.search import Budget, Search
from moe_bsr.model.multitask import build
from moe_bsr.runs.folder import make_transforms, open_task
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import command, commit, environment
from moe_bsr.study import rivals

# Methods in addition to those of a methods file, which are configurations.
OTHERS = {
    "fit": "moe-bsr fit",
    "timm_full": "full fine-tuning of timm's network with a head for each task, plain code",
    "timm_lora": "timm's network with LoRA of rank 8 on all linear layers (peft), plain code",
}
FOR_TRAINING = 0.9  # share of a budget for training; the rest is for opening images, building the model and validation
FOR_SOLVING = 0.25  # share of a probe's training time for the solver
VALIDATION = 50  # validation images per task: more would take longer than a short budget


def race(
    config: Config,
    folder: Path,
    minutes: list[float],
    methods: list[str],
    seeds: list[int],
    say: Callable[[str], None],
    known: dict[str, Method] | None = None,
) -> dict[str, Any]:
    """Run every method, budget and seed that FOLDER/budgets.json lacks, and return the content of that file.

    "runs" in it is a list with one dictionary per method, budget and seed: method, minutes, seed, seconds, mean_top1,
    tasks, updates, peak_mb.

    Args:
        folder: a run is in FOLDER/METHOD_MINUTES_SEED.
        say: called with one line before and after each run.
        known: methods that are configurations, by default those of the package.
    Raises:
        ConfigError: a method is unknown, or the file is from another machine.
        RuntimeError: a run failed.
    """
    known = read_methods() if known is None else known
    if unknown := [method for method in methods if method not in OTHERS | known]:
        raise ConfigError(f"methods: {', '.join(unknown)} is none of {', '.join(OTHERS | known)}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "budgets.json"
    result = {"environment": environment(prepare(config.runtime)), "runs": []}
    if file.exists():
        earlier = json.loads(file.read_text())
        if earlier["environment"] != result["environment"]:
            raise ConfigError(f"{file} is from another machine or installation, where a minute is worth something else")
        result = earlier
    done = {(run["method"], run["minutes"], run["seed"]) for run in result["runs"]}
    for budget, seed, method in itertools.product(minutes, seeds, methods):
        if (method, budget, seed) in done:
            continue
        say(f"{method}, {budget:g} minutes, seed {seed}")
        seeded = dataclasses.replace(config, seed=seed)
        place = folder / f"{method}_{budget:g}_{seed}"
        shutil.rmtree(place, ignore_errors=True)  # left by a run that was stopped: its budget begins again
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(run, (method, seeded, place, budget, known))
        result["runs"].append(found | {"seed": seed})
        done.add((method, budget, seed))  # a method that is named twice runs once
        write_whole(file, json.dumps({"command": command(), "commit": commit(), **result}, indent=1))
        say(f"{method}, {budget:g} minutes, seed {seed}: {found['mean_top1']:.2f} % of the test images")
    return result


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return one row per budget and method: means over seeds, with a 95 % interval (Student's t) for several seeds."""
    tasks = list(result["runs"][0]["tasks"])
    rows = [["test top-1 %", "minutes", *tasks, "mean", "seeds", "s", "updates", "MB"]]
    for (minutes, method), runs in by_budget(result).items():
        top1 = [f"{fmean(run['tasks'][task] for run in runs):.1f}" for task in tasks]
        found = over_seeds([run["mean_top1"] for run in runs])
        mean = f"{found['mean']:.1f}" + ("" if found["low"] is None else f" [{found['low']:.1f}, {found['high']:.1f}]")
        updates = [run["updates"] for run in runs if "updates" in run]
        numbers = [f"{len(runs)}", f"{fmean(run['seconds'] for run in runs):.0f}"]
        numbers += [f"{fmean(updates):.0f}" if updates else "-", f"{max(run['peak_mb'] for run in runs):.0f}"]
        rows.append([method, f"{minutes:g}", *top1, mean, *numbers])
    return rows


def by_budget(result: dict[str, Any]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Group runs by (minutes, method), sorted by budget, and within a budget from the best method to the worst."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for each in result["runs"]:
        found.setdefault((each["minutes"], each["method"]), []).append(each)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0], -fmean(r["mean_top1"] for r in pair[1]))))


def run(
    method: str, config: Config, folder: Path, minutes: float, known: dict[str, Method] | None = None
) -> dict[str, Any]:
    """Train one method within one budget, and score the test images."""
    began = time.monotonic()
    few = min(config.data.val_images or VALIDATION, VALIDATION)
    settings = {"train__steps": None, "train__epochs": None, "train__minutes": FOR_TRAINING * minutes}
    quiet = {"train__eval_every": None, "train__pictures": False, "train__evaluate_test": False}
    config = configuration.replace(config, **settings, **quiet, data__val_images=few)
    if method in rivals.RATES:
        return _rival(method, config, minutes, began)
    if method == "fit":
        found = Search(config, folder, Budget(minutes), callbacks=[]).run()
        peak = max(each["peak_mb"] for each in found["candidates"])
        best, about = Path(found["run"]), {"candidate": found["best"], "peak_mb": peak}
    else:
        report = api.train(_own(method, config, known), folder, callbacks=[])
        best, about = folder, {"updates": report["step"], "peak_mb": report["measured_peak_mb"]}
    seconds = time.monotonic() - began
    test = api.evaluate(best, "test")
    return _result(method, minutes, seconds, {task: told["top1"] for task, told in test["tasks"].items()}, **about)


def _own(method: str, config: Config, known: dict[str, Method] | None = None) -> Config:
    """Return the configuration of a method of ours."""
    own = (read_methods(names=[method]) if known is None else known)[method].of(config)
    if own.train.optimizer == "lbfgs":  # its minutes limit the features
        own = configuration.replace(own, train__minutes=(1 - FOR_SOLVING) * own.train.minutes)
    return own


def _rival(method: str, config: Config, minutes: float, began: float) -> dict[str, Any]:
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        runtime.reset_peak()
        tasks = {name: open_task(config, file) for name, file in config.task_files().items()}
        counts = {name: len(data.class_names) for name, data in tasks.items()}
        transforms = make_transforms(config, build(probe_config(config, []), counts))
        left = 60 * minutes - (time.monotonic() - began)
        network, heads, updates = rivals.train(method, config, tasks, transforms, runtime, left)
        seconds, peak = time.monotonic() - began, runtime.peak_mb()
        top1 = {name: rivals.top1(network, heads, data, "test", transforms, runtime) for name, data in tasks.items()}
    return _result(method, minutes, seconds, top1, updates=updates, peak_mb=peak)


def _result(method: str, minutes: float, seconds: float, top1: dict[str, float], **about: Any) -> dict[str, Any]:
    mean = sum(top1.values()) / len(top1)
    return {"method": method, "minutes": minutes, "seconds": seconds, "mean_top1": mean, "tasks": top1, **about}
