"""Format the measurements of a benchmark as tables. The first row of a table has the titles. Memory is in MiB."""

import statistics
from typing import Any

from moe_bsr.benchmark.targets import Results, step_seconds

MIB = 2**20


def of_cases(results: Results, group: str, batch: int) -> list[list[str]]:
    """Return one row per case of a group: time, bytes kept for backward, and peaks relative to the step's start."""
    rows = [[group, "step ms", "images/s", "kept MiB/image", "peak MiB", "inference MiB", "process MiB"]]
    for name, about in results[group].items():
        seconds, memory = step_seconds(results, group, name), about["memory"]
        rows.append(
            [
                name,
                f"{1e3 * seconds:.1f}",
                f"{batch / seconds:.1f}",
                f"{memory['kept_per_image'] / MIB:.3f}",
                f"{max(memory['transients'].values()) / MIB:.1f}",
                f"{memory['inference_peak'] / MIB:.1f}",
                f"{memory['process_peak'] / MIB:.0f}",
            ]
        )
    return rows


def of_scaling(points: list[dict[str, Any]], name: str) -> list[list[str]]:
    """Return one row per point of a sweep: median, fastest and slowest step, peak, and bytes kept for backward."""
    rows = [[name, "step ms", "fastest", "slowest", "peak MiB", "kept MiB"]]
    for point in points:
        taken = point["seconds"]
        rows.append(
            [
                str(point["at"]),
                *(f"{1e3 * of(taken):.0f}" for of in (statistics.median, min, max)),
                f"{point['peak'] / MIB:.1f}",
                f"{point['kept'] / MIB:.1f}",
            ]
        )
    return rows
