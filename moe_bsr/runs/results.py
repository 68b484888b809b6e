"""Write the index of a folder of results: `README.md`, made from the JSON files in and below it.

The kind of a file is recognized by its keys, not by its name. The index shows for each file its main figures, the
machine, the code's commit and the command. Older files that lack one of these show a dash.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.text_tables import as_markdown

HEAD = """# Results

Written by `moe-bsr results` from the JSON files of this folder. Do not edit it: add or replace a file, and run the
command again.
"""


def write_readme(folder: Path) -> Path:
    """Write `README.md` for all JSON files in and below the folder, and return its path.

    Raises:
        ValueError: a file is not JSON, or of no known kind. The message names it.
    """
    file = folder / "README.md"
    write_whole(file, readme(folder))
    return file


def readme(folder: Path) -> str:
    """Return the text of `README.md`: one table per kind of result."""
    tables: dict[str, list[list[str]]] = {title: [] for title, _, _ in KINDS}
    for file in sorted(folder.rglob("*.json")):
        result = _read(file)
        title, figures = _kind(file, result)
        name = file.relative_to(folder).as_posix()
        cells = [f"[{name.removesuffix('/report.json')}]({name})", figures(result)]
        tables[title].append([*cells, _environment(result), _commit(result), _command(result)])
    header = ["file", "figures", "environment", "commit", "command"]
    parts = [f"## {title}\n\n{as_markdown([header, *rows])}\n" for title, rows in tables.items() if rows]
    return "\n".join([HEAD, *parts])


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: cut or damaged: {error}; remove it or put a copy in its place") from error
    if not isinstance(result, dict):
        raise ValueError(f"{file}: not an object with named values, as a result is")
    return result


def _kind(file: Path, result: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], str]]:
    for title, keys, figures in KINDS:
        if keys <= result.keys():
            return title, figures
    raise ValueError(
        f"{file}: of no known kind, it has {', '.join(list(result)[:6])}; known are "
        + ", ".join(f"{title.lower()} ({', '.join(sorted(keys))})" for title, keys, _ in KINDS)
    )


def _run(report: dict[str, Any]) -> str:
    tasks, mean = report["tasks"], report["mean_top1"]
    images = sorted({task["images"] for task in tasks.values()})
    scored = f"mean top-1 {mean:.1f} % ({report['split']})" if mean is not None else report["status"]
    gflops = report["gflops_per_image"]  # None if the cost could not be predicted
    return (
        f"{scored} of {len(tasks)} tasks; {'-'.join(f'{n:,}' for n in dict.fromkeys((images[0], images[-1])))} images "
        f"a task, {report['train_seconds']:,.0f} s; peak {report['measured_peak_mb']:,.0f} MB"
        + ("" if gflops is None else f"; {gflops:.2f} GFLOPs an image")
    )


def _benchmark(result: dict[str, Any]) -> str:
    asked, targets = result["arguments"], result["targets"]
    cases = sum(map(len, result["groups"].values()))
    reached = f"{sum(bool(target['reached']) for target in targets)} of {len(targets)} targets reached"
    measured = [f"; {t['what']}: {t['value']:.2f}" for t in targets if t["value"] is not None]
    return f"{asked['backbone']}, batch {asked['batch']}: {cases} cases, {reached}{''.join(measured[:1])}"


def _scaling(result: dict[str, Any]) -> str:
    asked, series = result["arguments"], result["scaling"]
    points = ", ".join(f"{name} ({len(values)} points)" for name, values in series.items())
    return f"{asked['backbone']}, batch {asked['batch']}: {points}"


def _sweep(result: dict[str, Any]) -> str:
    worst = ", ".join(
        f"{name} {100 * about['worst']:.1f} %"
        for name, about in result["summary"].items()
        if name in ("parameters", "gradients", "kept", "peak", "transients")
    )
    within = "within" if result["within_tolerance"] else "not within"
    return f"{len(result['records'])} cases, {within} tolerance; predicted against measured, at worst: {worst}"


def _storages(result: dict[str, Any]) -> str:
    means = {storage: fmean(fmean(values) for values in tasks.values()) for storage, tasks in result["top1"].items()}
    exact = means.pop("exact")
    others = ", ".join(f"{storage} {mean - exact:+.2f} points" for storage, mean in means.items())
    runs = f"{len(result['top1']['exact'])} tasks, {len(result['seeds'])} seeds"
    return f"{result['config']}, {result['steps']} updates, {runs}: top-1 {exact:.1f} % exact, {others}"


def _arms(result: dict[str, Any]) -> str:
    runs, baseline = result["runs"], result["baseline"]
    means = {arm: fmean(seed["mean_top1"] for seed in seeds.values()) for arm, seeds in runs.items()}
    others = []
    for arm, about in result["differences"].items():
        low, high = about["mean"]["low"], about["mean"]["high"]
        interval = "" if low is None else f" ({low:+.1f} to {high:+.1f})"
        others.append(f"{arm} {about['mean']['mean']:+.1f}{interval}")
    seeds, sweep = len(runs[baseline]), result["sweep"]
    head = f"{sweep['updates']} updates of a task, {seeds} seeds, mean top-1 % ({sweep['split']})"
    return f"{head}: {baseline} {means[baseline]:.1f}; points over it: {', '.join(others)}"


def _drops(result: dict[str, Any]) -> str:
    rows = {row["setting"]: row for row in result["settings"]}
    own, best = rows[result["own"]], rows[result["best"]]
    found = f"{own['setting']} loses {own['lost']:.1f} points, {best['setting']} {best['lost']:.1f}"
    return f"{len(rows)} settings, {result['images']} images of {', '.join(own['val_top1'])}: {found}"


def _export(result: dict[str, Any]) -> str:
    tasks = result["tasks"].values()
    parity = max(task["parity"]["difference"] / task["parity"]["tolerance"] for task in tasks)
    return (
        f"{len(tasks)} tasks, {result['bytes'] / 1e6:.1f} MB, {result['precision']}: mean validation top-1 "
        f"{fmean(task['top1'] for task in tasks):.1f} %; float32 logits within {parity:.2f} of the tolerance"
    )


def _fit(result: dict[str, Any]) -> str:
    candidates = ", ".join(f"{each['name']} {each['val_top1']:.1f}" for each in result["candidates"])
    tested = f"; test {result['test']['mean_top1']:.1f} %" if "test" in result else ""
    return (
        f"{result['minutes']:g} minutes, {result['memory_bytes'] / 2**20:,.0f} MB: {result['best']}{tested} "
        f"(validation top-1 %: {candidates})"
    )


def _budgets(result: dict[str, Any]) -> str:
    found: dict[tuple[float, str], list[float]] = {}
    for run in result["runs"]:
        found.setdefault((run["minutes"], run["method"]), []).append(run["mean_top1"])
    means: dict[float, list[str]] = {}
    for (minutes, method), top1 in found.items():
        means.setdefault(minutes, []).append(f"{method} {fmean(top1):.1f}")
    return "; ".join(f"{minutes:g} minutes, test top-1 %: {', '.join(values)}" for minutes, values in means.items())


def _methods(result: dict[str, Any]) -> str:
    base, methods = result["base"], result["methods"]
    costs = {name: row["train_info"]["cost"] for name, row in methods.items()}
    peaks = {name: about["peak_bytes"]["measured"] for name, about in costs.items()}
    least, most = min(peaks, key=peaks.__getitem__), max(peaks, key=peaks.__getitem__)
    span = ", ".join(f"{name} {peaks[name] / 2**20:,.0f} MB" for name in (least, most))
    return f"{base['backbone']['name']}, {base['train']['batch_size']} images: {len(methods)} methods; peaks of {span}"


def _selftest(result: dict[str, Any]) -> str:
    parts = {name: about for name, about in result.items() if isinstance(about, dict) and "tried" in about}
    return ", ".join(f"{name}: {about['tried']:,} tried, {about['failed']} failed" for name, about in parts.items())


# (title, keys by which a file of this kind is recognized, function that returns its figures)
KINDS: list[tuple[str, set[str], Callable[[dict[str, Any]], str]]] = [
    ("Trained runs", {"tasks", "mean_top1", "status"}, _run),
    ("Arms compared", {"sweep", "runs", "differences"}, _arms),
    ("Storages compared", {"top1", "seeds", "config"}, _storages),
    ("The best model for some minutes", {"candidates", "best", "minutes"}, _fit),
    ("Accuracy after so many minutes", {"runs", "environment"}, _budgets),
    ("Methods side by side", {"base", "reference", "methods"}, _methods),
    ("Dropping before training", {"settings", "own", "best"}, _drops),
    ("Exports", {"bundle", "bytes", "precision"}, _export),
    ("Attacks on the product", {"failed", "torch", "commit"}, _selftest),
    ("Benchmarks", {"arguments", "groups", "targets"}, _benchmark),
    ("How cost grows", {"arguments", "scaling"}, _scaling),
    ("Predicted against measured cost", {"summary", "records", "within_tolerance"}, _sweep),
]


def _environment(result: dict[str, Any]) -> str:
    """Describe the machine by the values of `provenance.environment`. Older files have these at their top level."""
    about = result.get("environment", result)
    if "processor" not in about:
        return about.get("machine", "-")
    return f"{about['processor']}, {about['threads']} threads, {about['precision']}, torch {about['torch']}"


def _commit(result: dict[str, Any]) -> str:
    commit = result.get("commit")
    return "-" if commit is None else f"`{commit[:10]}{'-dirty' * commit.endswith('-dirty')}`"


def _command(result: dict[str, Any]) -> str:
    commands = result.get("command") or []
    return "<br>".join(f"`{line}`" for line in ([commands] if isinstance(commands, str) else commands)) or "-"
