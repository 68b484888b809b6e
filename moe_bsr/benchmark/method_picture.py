"""Draw the results of compare-methods: memory, FLOPs, time or accuracy of every method, with Pareto fronts.

Without accuracies the panels are peak against time, peak against FLOPs, and kept bytes against the error of the
gradients. With them: test accuracy after equal time against peak, with 95 % intervals, and validation accuracy after
equal updates against peak and FLOPs. Empty panels are left out, and results with a single panel. Names that would
overlap are not drawn; those on the front come first. Published points are hollow: each counts memory by a rule of its
own.
"""

from pathlib import Path
from typing import Any, NamedTuple

from moe_bsr.benchmark.method_page import heading, test_accuracy

MIB = 2**20
FAMILIES = {"timm": "#595959", "full": "#d55e00", "bsr": "#0072b2", "moe": "#009e73", "other": "#cc79a7"}
BACKBONES = {"DeiT-S": "deit_small", "ViT-B": "vit_base"}
EXACT = 1e-4  # an error of 0 is drawn here on the logarithmic axis


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draw one row of up to three panels per result."""
    from matplotlib.figure import Figure

    panels_of = [[panel for panel in _panels(result) if panel[2]] for result in results]
    if any(len(panels) > 1 for panels in panels_of):  # leave out results that are only a supplement to others
        results = [result for result, panels in zip(results, panels_of, strict=True) if len(panels) > 1]
        panels_of = [panels for panels in panels_of if len(panels) > 1]
    columns = max(map(len, panels_of))
    figure = Figure(figsize=(5.4 * columns, 5.2 * len(results)), layout="constrained")
    rows = zip(figure.subplots(len(results), columns, squeeze=False), results, panels_of, strict=True)
    for axes, result, panels in rows:
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, heading(result), *panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if panels[0][3]:  # accuracy against memory
            _published(axes[0], result)
    figure.draw_without_rendering()
    for axis in figure.axes:
        _part_names(axis)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80, metadata={"Software": None})


class Point(NamedTuple):
    """half_width: of the 95 % interval of y; 0 if it is not drawn."""

    name: str
    x: float
    y: float
    half_width: float = 0.0


def _panels(result: dict[str, Any]) -> list[tuple[str, str, list[Point], bool]]:
    """Return (x label, y label, points, whether a high y is good) of each panel."""
    methods = {name: row["train_info"] for name, row in result["methods"].items()}
    peak = {name: info["cost"]["peak_bytes"]["measured"] / MIB for name, info in methods.items()}
    flops = {name: info["cost"]["step_flops"] / 1e9 for name, info in methods.items()}
    memory, work = "peak of an update, MB", "GFLOPs an image, forward and backward"
    if not any("equal_updates" in info for info in methods.values()):
        time = {name: info["time"]["ratio"] for name, info in methods.items() if info.get("time")}
        kept = {name: info["cost"]["kept_bytes"]["measured"] / MIB for name, info in methods.items()}
        error = {n: max(i["gradient"]["error"], EXACT) for n, i in methods.items() if i.get("gradient")}
        error_label = f"relative error of the gradients ({EXACT:g}: none)"
        return [
            (memory, "time of an update, relative", _points(peak, time), False),
            (memory, work, _points(peak, flops), False),
            ("kept for backward, MiB an image", error_label, _points(kept, error), False),
        ]
    val = {name: info["equal_updates"]["val_top1"] for name, info in methods.items() if info.get("equal_updates")}
    test = {name: test_accuracy(info) for name, info in methods.items() if info.get("equal_seconds")}
    count = next(i["equal_updates"]["updates"] for i in methods.values() if i.get("equal_updates"))
    updates = f"val top-1 %, {count} updates"
    panels = [(memory, updates, _points(peak, val), True), (work, updates, _points(flops, val), True)]
    if test:
        run = next(run for info in methods.values() for run in info.get("equal_seconds", {}).values())
        points = [Point(name, peak[name], *found) for name, found in test.items()]
        panels.insert(0, (memory, f"test top-1 %, {run['minutes']:g} minutes", points, True))
    return panels


def _points(x: dict[str, float], y: dict[str, float]) -> list[Point]:
    return [Point(name, x[name], y[name]) for name in x if name in y]


def front(points: list[Point], high_is_good: bool) -> list[Point]:
    """Return the Pareto front, sorted by x: no other point is at least as good in x and y and better in one."""
    best, found = None, []
    for point in sorted(points, key=lambda p: (p.x, -p.y if high_is_good else p.y)):
        if best is None or (point.y > best if high_is_good else point.y < best):
            found.append(point)
            best = point.y
    return found


def _panel(axis: Any, title: str, below: str, side: str, points: list[Point], high_is_good: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(title=title, xlabel=below, ylabel=side)
    edge = front(points, high_is_good)
    for name, x, y, half_width in [*edge, *(point for point in points if point not in edge)]:
        if half_width:
            axis.errorbar(x, y, half_width, color=_color(name), linewidth=0.8, alpha=0.5)
        axis.plot(x, y, "o", color=_color(name), markersize=5)
        axis.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.step([p.x for p in edge], [p.y for p in edge], where="post", color="#595959", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="linear" if high_is_good else "log")
    for line in [axis.xaxis] if high_is_good else [axis.xaxis, axis.yaxis]:
        least, most = line.get_view_interval()
        line.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
        line.set_major_formatter(lambda value, _: f"{value:g}")
        line.set_minor_formatter(NullFormatter())
    axis.grid(color="#e5e5e5")


def _part_names(axis: Any) -> None:
    """Move names that would leave the panel to the left of their point, and remove those that overlap earlier ones."""
    right, shown = axis.get_window_extent().x1, []
    for text in list(axis.texts):
        if text.get_window_extent().x1 > right:
            text.set(horizontalalignment="right", position=(-4, 3))
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in shown):
            text.remove()
        else:
            shown.append(box)


def _published(axis: Any, result: dict[str, Any]) -> None:
    """Draw published results of the same backbone as hollow marks, if their task is in the result."""
    for name, row in result["methods"].items():
        for each in row["run_info"]["method"]["published"]:
            backbone = BACKBONES.get(each["backbone"], each["backbone"])
            if result["base"]["backbone"]["name"].startswith(backbone) and each["task"] in result["base"]["tasks"]:
                axis.plot(each["memory_mb"], each["top1"], "o", color=_color(name), markerfacecolor="none")
                words = f"{name}, {each['task']}: {each['rule']}"
                axis.annotate(words, (each["memory_mb"], each["top1"]), fontsize=5, color="#595959")


def _color(name: str) -> str:
    return FAMILIES.get(name.partition("_")[0], FAMILIES["other"])
