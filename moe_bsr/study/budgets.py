"""Accuracy after so many minutes: the ladder beside everything somebody would train in its place.

Each run is a process of its own, scheduled for its budget, which counts everything from opening the images on but
the test. All have the same splits. The test is scored once, at the end.
"""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.methods import Method
from moe_bsr.config.methods import read as read_methods
from moe_bsr.fit import rungs
from moe_bsr.fit.ladder import Budget, Ladder
from moe_bsr.model.multitask import build
from moe_bsr.runs.folder import make_transforms, open_task
from moe_bsr.runtime.device import prepare
from moe_bsr.study import rivals
from moe_bsr.training.probe_trainer import probe_config

# Beside those of a methods file, which are configurations.
OTHERS = {
    "fit": "moe-bsr fit",
    "probe": "the heads alone, solved, on the class token of the last block",
    "timm_full": "timm's network and a head for each task, every weight trains: plain code, no kernels of ours",
    "timm_lora": "the same with LoRA of rank 8 on all linear layers, by peft",
}
FOR_TRAINING = 0.9  # of a budget; opening, building and validation have the rest
FOR_SOLVING = 0.25  # of a probe's
VALIDATION = 50  # images of a task: more would take longer than a short budget


def race(
    config: Config,
    folder: Path,
    minutes: list[float],
    methods: list[str],
    say: Callable[[str], None],
    known: dict[str, Method] | None = None,
) -> list[dict[str, Any]]:
    """A result for each method and budget, in turns: method, minutes, seconds, mean_top1, tasks, updates, peak_mb.

    Args:
        folder: for the runs, empty or new; a run is named METHOD_MINUTES.
        known: the methods that are configurations, by default the package's.
    Raises:
        ConfigError: a method that is none. RuntimeError: a run failed.
    """
    known = read_methods() if known is None else known
    if unknown := [method for method in methods if method not in OTHERS | known]:
        raise ConfigError(f"methods: {', '.join(unknown)} is none of {', '.join(OTHERS | known)}")
    results = []
    for budget in minutes:
        for method in methods:
            say(f"{method}, {budget:g} minutes")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(run, (method, config, folder / f"{method}_{budget:g}", budget, known)))
            say(f"{method}, {budget:g} minutes: {results[-1]['mean_top1']:.2f} % of the test images")
    return results


def run(
    method: str, config: Config, folder: Path, minutes: float, known: dict[str, Method] | None = None
) -> dict[str, Any]:
    """One method within one budget."""
    began = time.monotonic()
    few = min(config.data.val_images or VALIDATION, VALIDATION)
    settings = {"train__steps": None, "train__epochs": None, "train__minutes": FOR_TRAINING * minutes}
    quiet = {"train__eval_every": None, "train__pictures": False, "train__evaluate_test": False}
    config = configuration.replace(config, **settings, **quiet, data__val_images=few)
    if method in rivals.RATES:
        return _rival(method, config, minutes, began)
    if method == "fit":
        found = Ladder(config, folder, Budget(minutes), callbacks=[]).climb()
        best, about = Path(found["run"]), {"rung": found["best"], "peak_mb": max(r["peak_mb"] for r in found["rungs"])}
    else:
        report = api.train(_own(method, config, known), folder, callbacks=[])
        best, about = folder, {"updates": report["step"], "peak_mb": report["measured_peak_mb"]}
    seconds = time.monotonic() - began
    test = api.evaluate(best, "test")
    return _result(method, minutes, seconds, {task: told["top1"] for task, told in test["tasks"].items()}, **about)


def _own(method: str, config: Config, known: dict[str, Method] | None = None) -> Config:
    """The configuration of one of our own runs."""
    if method != "probe":
        return (read_methods(names=[method]) if known is None else known)[method].of(config)
    whole = configuration.replace(config, plan__drop_blocks=[], plan__keep_rate=1.0)
    probe = probe_config(whole, [])
    minutes = (1 - FOR_SOLVING) * config.train.minutes
    return dataclasses.replace(probe, train=dataclasses.replace(probe.train, minutes=minutes))


def _rival(method: str, config: Config, minutes: float, began: float) -> dict[str, Any]:
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        runtime.reset_peak()
        tasks = {name: open_task(config, file) for name, file in config.task_files().items()}
        counts = {name: len(data.class_names) for name, data in tasks.items()}
        transforms = make_transforms(config, build(rungs.start(config), counts))
        left = 60 * minutes - (time.monotonic() - began)
        network, heads, updates = rivals.train(method, config, tasks, transforms, runtime, left)
        seconds, peak = time.monotonic() - began, runtime.peak_mb()
        top1 = {name: rivals.top1(network, heads, data, "test", transforms, runtime) for name, data in tasks.items()}
    return _result(method, minutes, seconds, top1, updates=updates, peak_mb=peak)


def _result(method: str, minutes: float, seconds: float, top1: dict[str, float], **about: Any) -> dict[str, Any]:
    mean = sum(top1.values()) / len(top1)
    return {"method": method, "minutes": minutes, "seconds": seconds, "mean_top1": mean, "tasks": top1, **about}
