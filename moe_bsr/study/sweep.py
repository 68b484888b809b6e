"""Train the arms of a sweep with several seeds, and compare each with the baseline in pairs of equal seeds.

The runs of a pair have the same images in the same order and the same initial heads, so that they differ only in the
arm. Intervals are Student's t intervals over the seeds. With one seed there is none.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_bsr import api
from moe_bsr.config import Config, require
from moe_bsr.evaluation.metrics import over_seeds
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import made_by
from moe_bsr.runtime.top_list import are_many
from moe_bsr.study.plan import Sweep, config_of
from moe_bsr.training.failures import NonFiniteLoss


class Interrupted(Exception):
    """A signal interrupted the sweep. Its number is the argument. Finished runs are kept."""


def run(
    sweep: Sweep, folder: Path, overrides: list[str], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train all unfinished runs, each in FOLDER/ARM/SEED. Write FOLDER/sweep.json and return its content.

    Args:
        overrides: `key=value` for every run, with precedence over the sweep's `set`.
        say: called with a line after each run.

    Raises:
        ConfigError: a run is impossible. All runs are checked before the first one starts.
        Interrupted: a signal arrived.
    """
    order = [(arm, seed) for seed in sweep.seeds for arm in sweep.arms]
    tasks = config_of(sweep, sweep.against(), sweep.seeds[0], overrides).task_names()
    for arm, seed in order:
        config = config_of(sweep, arm, seed, overrides)
        api.check(config)
        same = set(config.task_names()) == set(tasks)
        require(same, f"arms.{arm}: tasks", config.task_names(), f"those of {sweep.against()}: {', '.join(tasks)}")
    chosen = {arm: _tuned(sweep, arm, folder, overrides, say) for arm in sweep.arms} if sweep.tune else {}
    runs: dict[str, dict[str, Any]] = {arm: {} for arm in sweep.arms}
    for arm, seed in order:
        best = [chosen[arm]["set"]] if arm in chosen else []
        config = config_of(sweep, arm, seed, [*overrides, *best])
        report = train(config, folder / arm / str(seed))
        top1 = _top1(report, folder / arm / str(seed), sweep.split)
        runs[arm][str(seed)] = {
            "top1": top1,
            "mean_top1": fmean(top1.values()),
            "train_seconds": report["train_seconds"],
            "predicted_peak_mb": report["predicted_peak_mb"],
            "gflops_per_image": report["gflops_per_image"],
        }
        say(f"{arm}, seed {seed}: {runs[arm][str(seed)]['mean_top1']:.2f} % mean top-1")
        result = _result(sweep, overrides, chosen, {name: about for name, about in runs.items() if about})
        result |= made_by(prepare(config.runtime))
        write_whole(folder / "sweep.json", json.dumps(result, indent=1))
    return result


def differences(runs: dict[str, dict[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """Return the differences to the baseline in percentage points, from pairs of equal seeds.

    Returns:
        {arm: {task or "mean": {"mean", "low", "high", "each"}}}. `low` and `high` are the limits of the 95 % interval,
        None with one seed. Arms without a pair are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, seeds in runs.items():
        pairs = [(seeds[seed], runs[baseline][seed]) for seed in seeds if seed in runs.get(baseline, {})]
        if arm == baseline or not pairs:
            continue
        found[arm] = {
            task: over_seeds([mine["top1"][task] - other["top1"][task] for mine, other in pairs])
            for task in pairs[0][0]["top1"]
        }
        found[arm]["mean"] = over_seeds([mine["mean_top1"] - other["mean_top1"] for mine, other in pairs])
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return a table with a row for each arm: means over the seeds, and the difference of the mean with its interval.

    With many tasks, only their mean has a column.
    """
    runs, baseline = result["runs"], result["baseline"]
    tasks = list(next(iter(next(iter(runs.values())).values()))["top1"])  # an unfinished sweep may lack the baseline
    tasks = [] if are_many(tasks) else tasks
    table = [["top-1 %", *tasks, "mean", f"points over {baseline}", "train s", "peak MB", "GFLOPs"]]
    for arm, seeds in runs.items():
        found = list(seeds.values())
        means = [fmean(seed["top1"][task] for seed in found) for task in tasks]
        cells = [f"{value:.1f}" for value in (*means, fmean(seed["mean_top1"] for seed in found))]
        seconds = fmean(seed["train_seconds"] for seed in found)
        peak, flops = _number(found[0]["predicted_peak_mb"], 0), _number(found[0]["gflops_per_image"], 2)
        gain = in_words(result["differences"][arm]["mean"]) if arm in result["differences"] else ""
        table.append([arm, *cells, gain, f"{seconds:.0f}", peak, flops])
    return table


def in_words(difference: dict[str, Any]) -> str:
    """Format a difference as `+6.1 [+4.0, +8.2]`, or with one seed as `+6.1`."""
    interval = "" if difference["low"] is None else f" [{difference['low']:+.1f}, {difference['high']:+.1f}]"
    return f"{difference['mean']:+.1f}{interval}"


def _number(value: float | None, digits: int) -> str:
    """Format a prediction; a dash if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _result(sweep: Sweep, overrides: list[str], chosen: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    baseline = sweep.against()
    return {
        "sweep": asdict(sweep),
        "overrides": overrides,
        "baseline": baseline,
        "tuned": chosen,
        "runs": runs,
        "differences": differences(runs, baseline),
    }


def _tuned(sweep: Sweep, arm: str, folder: Path, overrides: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the validation accuracy of each value of the tuned key, and the best value as `key=value`."""
    tuning, scores = sweep.tune, {}
    assert tuning is not None
    for value in tuning.values:
        extra = [*overrides, f"{tuning.key}={value}", "train.evaluate_test=false"]
        config = config_of(sweep, arm, tuning.seed, extra, tuning.updates)
        try:
            report = train(config, folder / "tune" / f"{arm}_{value:g}")
            scores[f"{value:g}"] = fmean(about["top1"] for about in report["tasks"].values())
        except NonFiniteLoss:  # a value with which training diverges
            scores[f"{value:g}"] = 0.0
    best = max(scores, key=lambda value: scores[value])
    say(f"{arm}: {tuning.key}={best} of {', '.join(f'{value} ({score:.1f} %)' for value, score in scores.items())}")
    return {"set": f"{tuning.key}={best}", "validation": scores}


def train(config: Config, folder: Path) -> dict[str, Any]:
    """Train or resume a run and return its report. A finished run is not trained again.

    Raises:
        Interrupted: a signal arrived. NonFiniteLoss: training diverged.
    """
    report = api.train(config, folder, resume=True, callbacks=[])
    if report["status"] == "interrupted":
        raise Interrupted(report["signal"])
    return report


def _top1(report: dict[str, Any], folder: Path, split: str) -> dict[str, float]:
    """Return the top-1 accuracy by task. A finished run that was scored on the other split is evaluated again."""
    tasks = report["tasks"] if report["split"] == split else api.evaluate(folder, split)["tasks"]
    return {task: about["top1"] for task, about in tasks.items()}
