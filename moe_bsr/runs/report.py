"""Write and read the report of a run: `report.json` for programs, `report.md` for people.

A report is self-contained: it also has the configuration, the machine, the code's commit and the command.
"""

import json
import re
from pathlib import Path
from typing import Any

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.train import LENGTHS
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.files import NotOrdinary, read_text, write_whole
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.provenance import command, commit, environment
from moe_bsr.runtime.top_list import are_many, shown, spread


def make(
    *,
    config: Config,
    runtime: Runtime,
    status: str,
    signal: int,
    scores: dict[str, dict[str, Any]] | None,
    split: str,
    progress: dict[str, dict[str, float]],
    best: tuple[float | None, int] | None,
    val_scores: dict[str, dict[str, Any]] | None = None,
    lost: dict[str, Any] | None = None,
    step: int = 0,
    skipped: dict[str, dict[str, dict[str, str]]] | None = None,
    kept: dict[str, dict[str, Any]] | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """Make the report of one run.

    Args:
        runtime: device and precision of the run.
        status, signal: whether the run finished, and the number of the signal that ended it (0 if none).
        scores: scores on `split` by task, from `evaluate`. None if the run did not get that far.
        split: split of the scores.
        progress: updates, images and epochs by task, at `step`.
        best: mean validation top-1 and step of the selected weights. The scores were measured with these weights.
        val_scores: scores of the selected weights on the validation split.
        lost: step, mean_top1, scores and reason of a better evaluation whose checkpoint could not be read.
        step: number of updates done.
        skipped: images that could not be read, by task and split: name -> reason.
        kept: entries of tasks that did not train, from an earlier report (`kept_tasks.entries`).
        measured: further numbers for the report.
    """
    scored = {"scored_step": best and best[1]} if scores else {}
    val = {name: {"val_top1": each["top1"]} for name, each in (val_scores or {}).items()}
    tasks = {
        name: {**(scores[name] if scores else {}), **val.get(name, {}), **scored, **counts}
        for name, counts in progress.items()
    }
    for name, splits in (skipped or {}).items():
        tasks[name]["skipped"] = splits
    tasks = {name: tasks[name] if name in tasks else (kept or {})[name] for name in config.task_names()}
    return {
        "status": status,
        "signal": signal,
        "split": split,
        "tasks": tasks,
        "mean_top1": _mean([t.get("top1") for t in tasks.values()]),
        "selected_step": best and best[1],
        "selected_mean_val_top1": best and best[0],
        "lost_best": lost,
        "step": step,
        **measured,
        "config": configuration.to_dict(config),
        "environment": environment(runtime),
        "commit": commit(),
        "command": command(),
    }


def aggregate(config: Config, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Combine the reports of several single-task runs into one of the same form.

    Times are summed, and memory is the maximum over the runs.

    Args:
        config: configuration of the whole run. Its status is "finished" only if all its tasks are.
        parts: reports so far, by task.
    """
    done, names = list(parts.values()), config.task_names()
    tasks = {name: part["tasks"][name] for name, part in parts.items()}
    finished = list(parts) == names and all(part["status"] == "finished" for part in done)
    return {
        "status": "finished" if finished else "interrupted",
        "signal": done[-1]["signal"],
        "split": done[0]["split"],
        "tasks": tasks,
        "mean_top1": _mean([t.get("top1") for t in tasks.values()]),
        "selected_mean_val_top1": _mean([p["selected_mean_val_top1"] for p in done]),
        "selected_steps": {name: part["selected_step"] for name, part in parts.items()},
        "steps": {name: part["step"] for name, part in parts.items()},
        "lost_best": {name: part["lost_best"] for name, part in parts.items() if part["lost_best"]},
        "predicted_peak_mb": max(p["predicted_peak_mb"] or 0 for p in done) or None,
        "train_seconds": sum(p["train_seconds"] for p in done),
        "measured_peak_mb": max(p["measured_peak_mb"] for p in done),
        "gflops_per_image": _mean([p["gflops_per_image"] for p in done]),
        "test_evaluations": max(p["test_evaluations"] for p in done),
        "weights": done[0]["weights"],
        "parts": list(tasks),
        "config": configuration.to_dict(config),
        **{key: done[-1][key] for key in ("environment", "commit", "command")},
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    write_whole(folder / "report.md", markdown(report))
    write_whole(folder / "report.json", json.dumps(report, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """Return the report of a run, or None if there is none yet.

    Raises:
        ConfigError: it is cut or damaged.
    """
    file = folder / "report.json"
    try:
        report = json.loads(read_text(file))
        if not isinstance(report, dict) or not isinstance(report.get("tasks"), dict):
            raise ValueError("this is no report of a run")
    except FileNotFoundError:
        return None
    except NotOrdinary as error:
        raise ConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: cut or damaged: {error}; remove it, and training with resume=True writes it "
            "again (which evaluates the test split of a finished run once more)"
        ) from error
    return report


def complete(folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the report of a run if it is finished and `config` does not make it longer, else None."""
    done = read(folder)
    return done if done is not None and is_complete(done, config) else None


def is_complete(report: dict[str, Any], config: Config) -> bool:
    """Return whether a run is finished and `config` does not make it longer."""
    then, now = report.get("config", {}).get("train", {}), configuration.to_dict(config)["train"]
    return report["status"] == "finished" and all(then.get(key) == now[key] for key in LENGTHS)


def markdown(report: dict[str, Any], whole: bool = True) -> str:
    """Return the report as Markdown for people.

    Args:
        whole: whether to show all tasks. If not, and there are many, only the worst and the best are shown.
    """
    tasks = report["tasks"]
    if not whole and are_many(tasks):
        chosen = shown({name: about.get("top1", 0.0) for name, about in tasks.items()})
        report = report | {"tasks": {name: tasks[name] for name in chosen}}
    counted = f"{report['test_evaluations']} evaluation(s) of the test split so far."
    lines = [
        f"Status: {report['status']}. {selection(report)}",
        "",
        f"Accuracies are those of the selected weights on the {report['split']} split; {counted}",
        "",
        "| task | top-1 % | 95 % interval | validation top-1 % | top-5 % | mean per class % | calibration error % | "
        "chance % | images seen | epochs | updates |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, t in report["tasks"].items():
        score = [
            f"{t[key]:.1f}" if key in t else "-" for key in ("top1", "top5", "mean_class_accuracy", "ece", "chance")
        ]
        score.insert(1, f"{t['top1_low']:.1f} - {t['top1_high']:.1f}" if "top1" in t else "-")
        score.insert(2, f"{t['val_top1']:.1f}" if "val_top1" in t else "-")
        lines.append(f"| {name} | {' | '.join(score)} | {t['images']} | {t['epochs']:.2f} | {t['updates']} |")
    if len(report["tasks"]) < len(tasks):
        lines.append(f"| ({len(tasks) - len(report['tasks'])} more tasks in report.md) | | | | | | | | | | |")
        known = [about["top1"] for about in tasks.values() if "top1" in about]
        of_all = list(spread(known).items())[1:] if known else []
        lines += [f"| {name} | {value:.2f} | | | | | | | | | |" for name, value in of_all]
    if report["mean_top1"] is not None:
        lines.append(f"| mean | {report['mean_top1']:.2f} | | | | | | | | | |")
    lines += [
        *_confusions(report),
        *_rejection(report.get("rejection")),
        "",
        *_steps(report),
        *_kept(report),
        *_skipped(report),
        "",
        f"Training took {report['train_seconds']:.0f} s; {_gflops(report)} GFLOPs per image forward. {_peaks(report)}",
        "",
        _provenance(report),
    ]
    return "\n".join(lines) + "\n"


def _steps(report: dict[str, Any]) -> list[str]:
    """Return lines on the step up to which images are counted, and on a best evaluation whose weights were lost."""
    steps = report.get("steps", {"": report.get("step")})  # by task if there is one model per task
    counted = ", ".join(f"{step} ({task})" if task else f"{step}" for task, step in steps.items())
    lines = [f"Images seen, epochs and updates are counted up to step {counted}."]
    lost = report.get("lost_best") or {}
    places = {f"{task}: ": each for task, each in lost.items()} if "steps" in report else {"": lost}
    return lines + [_lost(each, place) for place, each in places.items() if each]


def _kept(report: dict[str, Any]) -> list[str]:
    """Return a line that says where the numbers of tasks that did not train come from."""
    train = report["config"]["train"]
    if not (only := train.get("only")):
        return []
    return [f"Trained here: {', '.join(only)}. The other tasks and their numbers are those of {train['init_from']}."]


def _skipped(report: dict[str, Any]) -> list[str]:
    """Return a line with the numbers of images that could not be read."""
    counts = [
        f"{task} {len(images)} of {split}"
        for task, about in report["tasks"].items()
        for split, images in about.get("skipped", {}).items()
    ]
    return (
        [f"Images skipped because they could not be read: {', '.join(counts)} (report.json names them)."]
        if counts
        else []
    )


def _lost(lost: dict[str, Any], place: str) -> str:
    scores = ", ".join(f"{task} {each['top1']:.1f}" for task, each in (lost["scores"] or {}).items())
    return (
        f"{place}The best evaluation was at step {lost['step']}, mean validation top-1 {lost['mean_top1']:.2f} % "
        f"({scores}); its weights are lost: {lost['reason']}."
    )


def selection(report: dict[str, Any]) -> str:
    """Return a sentence that says which weights were selected and why."""
    if "parts" in report:
        selected = report.get("selected_steps", {}).items()
        steps = ", ".join(f"{task} {'not evaluated yet' if step is None else step}" for task, step in selected)
        return f"One model per task, each with the weights of its own step: {steps}."
    step, mean = report.get("selected_step"), report.get("selected_mean_val_top1")
    if step is None:
        return "Nothing was evaluated yet, so no weights are selected."
    if mean is None:
        return f"Weights: those of step {step}, the last; the selected ones were lost with their checkpoint."
    if report["config"]["train"]["checkpoint_selection"] == "last":
        why = f"the last (train.checkpoint_selection); their mean validation top-1 is {mean:.2f} %"
    else:
        why = f"for the highest mean validation top-1: {mean:.2f} %"
    planned = report.get("planned_steps", 0)
    early = report["status"] == "finished" and report["step"] < planned
    ended = f" The run ended early (train.patience): {planned} updates were planned." if early else ""
    return f"Weights selected: those of step {step} of {report['step']}, {why}.{ended}"


def _confusions(report: dict[str, Any]) -> list[str]:
    """Return lines with the largest confusions of each task."""
    lines = []
    for task, about in report["tasks"].items():
        pairs = [
            f"{_code(c['true'])} taken for {_code(c['predicted'])} {c['count']}x ({100 * c['share']:.0f} %)"
            for c in about.get("confusions", ())
        ]
        lines += [f"* {task}: {'; '.join(pairs)}"] if pairs else []
    title = f"Largest confusions on the {report['split']} split, with the share of the true class's images:"
    return ["", title, "", *lines] if lines else []


def _rejection(found: dict[str, Any] | None) -> list[str]:
    """Return lines on how well images that belong to no task are recognized, if the run has learned that."""
    if not found:
        return []
    title = (
        f"A task accepts an image if its score `{found['score']}` is at least that of {found['accepted']:.0%} of the "
        "task's own validation images"
    )
    if not found["mean_auroc"]:
        return ["", f"{title}. With one task nothing could be measured."]
    return [
        "",
        f"{title}. On validation images, in %:",
        "",
        "| task | AUROC against other tasks | other tasks' rejected | own named | own rejected by all others |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {task} | {100 * t['auroc']:.1f} | {100 * t['rejected']:.1f} | {100 * t['named']:.1f} | "
            f"{100 * t['foreign']:.1f} |"
            for task, t in found["tasks"].items()
        ),
    ]


def _code(name: str) -> str:
    """Return a class's name as Markdown code, so that it is shown as it is."""
    name = printable(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    edge = " " if name[:1] in ("`", " ", "") or name[-1:] in ("`", " ") else ""
    return f"{fence}{edge}{name}{edge}{fence}"


def _peaks(report: dict[str, Any]) -> str:
    """Return a sentence with predicted and measured peak memory, and with what each of them counts."""
    on_gpu = report["environment"]["device"].startswith("cuda")
    counted = "CUDA's allocator" if on_gpu else "the process, with libraries and cached images"
    measured = f"eak memory of {counted}: {report['measured_peak_mb']:.0f} MB."
    if report["predicted_peak_mb"] is None:
        return f"P{measured} No peak was predicted."
    return f"Predicted peak of a step's tensors: {report['predicted_peak_mb']:.0f} MB; p{measured}"


def _provenance(report: dict[str, Any]) -> str:
    about, sent = report["environment"], report.get("exchanged_mb_per_update")
    several = "" if sent is None else f"by {about['processes']} processes that exchange {sent:.1f} MB an update "
    return (
        f"Computed {several}on {about['processor']} ({about['device']}, {about['threads']} threads, "
        f"{about['precision']}) "
        f"with torch {about['torch']}; code {report['commit'] or 'of unknown version'}."
    )


def _gflops(report: dict[str, Any]) -> str:
    return "-" if report["gflops_per_image"] is None else f"{report['gflops_per_image']:.2f}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
