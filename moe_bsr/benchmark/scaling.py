"""Measure how step time and peak memory of MoE-BSR grow with image size, batch, experts and tasks."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from moe_bsr.benchmark.cases import Case
from moe_bsr.benchmark.workers import interleave, workers

SWEEPS: dict[str, tuple[list[int], Callable[[int], dict[str, Any]]]] = {
    "image size": ([96, 128, 160, 224, 288, 384], lambda n: {"image_size": n}),
    "batch": ([4, 8, 16, 32, 64], lambda n: {"batch": n}),
    "experts": ([1, 2, 4, 8, 16, 32, 64], lambda n: {"changes": {"moe__num_experts": n, "moe__top_k": min(4, n)}}),
    "tasks": ([1, 2, 5, 10, 20], lambda n: {"tasks": n}),
}
NOTES = {"image size": "px; tokens grow with its square", "experts": "min(4, n) of them active"}


def measure(
    shared: dict[str, Any], precision: str, rounds: int, steps: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Return {"scaling": {sweep: [{"at": n, "seconds": raw times, "peak": bytes, "kept": bytes}, ...]}}.

    The points of a sweep are timed in turn.

    Args:
        shared: fields of `Case` for all points. note: called with a line before each sweep.
    """
    result = {}
    for name, (points, change) in SWEEPS.items():
        note(f"{name}: {points}")
        cases = [replace(Case(subject="moe_bsr", precision=precision, **shared), **change(n)) for n in points]
        with workers(cases) as group:
            times = interleave(group, rounds, steps)
            memory = [one.ask("memory") for one in group]
        result[name] = [
            {"at": n, "seconds": list(chain(*of_point)), "peak": max(m["transients"].values()), "kept": m["kept"]}
            for n, of_point, m in zip(points, times, memory, strict=True)
        ]
    return {"scaling": result}


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw one panel per sweep, with time on the left axis and peak memory on the right, both from zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, len(result["scaling"])), result["scaling"].items(), strict=True):
        at = [p["at"] for p in points]
        seconds, peak = [statistics.median(p["seconds"]) for p in points], [p["peak"] / 2**20 for p in points]
        right = axis.twinx()
        axis.plot(at, seconds, "o-", color="C0")
        right.plot(at, peak, "s--", color="C1")
        if name in NOTES:
            name += f" ({NOTES[name]})"
        axis.set(xlabel=name, ylabel="step, s (circles)", ylim=(0, 1.1 * max(seconds)))
        right.set(ylabel="peak, MiB (squares)", ylim=(0, 1.1 * max(peak)))
    figure.savefig(file, dpi=120)
