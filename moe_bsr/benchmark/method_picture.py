"""One picture of compare-methods' results: memory, FLOPs and time of every method, and the front of each panel.

Without accuracies the panels set peak against time, peak against FLOPs, and kept bytes against the gradients' error;
with them, accuracy against each of the three. A panel that nothing was measured for is left out. Names that would lie
on others are not drawn; the front's come first. Published points are hollow: their memory is by rules of their own.
"""

from pathlib import Path
from typing import Any

MIB = 2**20
FAMILIES = {"timm": "#595959", "full": "#d55e00", "bsr": "#0072b2", "moe": "#009e73", "other": "#cc79a7"}
BACKBONES = {"DeiT-S": "deit_small", "ViT-B": "vit_base"}
EXACT = 1e-4  # where an error of 0 is drawn on a logarithmic axis


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """A row of panels, three at most, for each result."""
    from matplotlib.figure import Figure

    methods_of = [{name: row["train_info"] for name, row in result["methods"].items()} for result in results]
    panels_of = [[panel for panel in _panels(methods) if panel[2]] for methods in methods_of]
    columns = max(map(len, panels_of))
    figure = Figure(figsize=(5.4 * columns, 5.2 * len(results)), layout="constrained")
    rows = zip(figure.subplots(len(results), columns, squeeze=False), results, methods_of, panels_of, strict=True)
    for axes, result, methods, panels in rows:
        name = f"{result['base']['backbone']['name'].partition('.')[0]}, {result['base']['train']['batch_size']} images"
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, name, *panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if _trained(methods):
            _published(axes[0], result)
    figure.draw_without_rendering()
    for axis in figure.axes:
        _part_names(axis)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80, metadata={"Software": None})


Point = tuple[str, float, float]


def _panels(methods: dict[str, dict[str, Any]]) -> list[tuple[str, str, list[Point], bool]]:
    """(what is below, what is at the side, points, whether high is good) of each panel."""
    peak = {name: info["cost"]["peak_bytes"]["measured"] / MIB for name, info in methods.items()}
    flops = {name: info["cost"]["step_flops"] / 1e9 for name, info in methods.items()}
    time = {name: info["time"]["ratio"] for name, info in methods.items() if "time" in info}
    below = {"peak of an update, MB": peak, "GFLOPs an image": flops, "time of an update, relative": time}
    if scored := _trained(methods):
        return [
            (what, "top-1 %", [(n, x[n], y) for n, y in scored.items() if n in x], True) for what, x in below.items()
        ]
    kept = {name: info["cost"]["kept_bytes"]["measured"] / MIB for name, info in methods.items()}
    error = {n: max(i["gradient"]["error"], EXACT) for n, i in methods.items() if i.get("gradient")}
    (memory, _), (work, _), (seconds, _) = below.items()
    return [
        (memory, seconds, [(name, peak[name], time[name]) for name in time], False),
        (memory, work, [(name, peak[name], flops[name]) for name in methods], False),
        (
            "kept for backward, MiB an image",
            f"relative error of the gradients ({EXACT:g}: none)",
            [(name, kept[name], error[name]) for name in error],
            False,
        ),
    ]


def _trained(methods: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: info["equal_updates"]["val_top1"] for name, info in methods.items() if "equal_updates" in info}


def front(points: list[Point], high_is_good: bool) -> list[Point]:
    """Those that no other is better than in one and as good as in the other, from the left."""
    best, found = None, []
    for point in sorted(points, key=lambda p: (p[1], -p[2] if high_is_good else p[2])):
        if best is None or (point[2] > best if high_is_good else point[2] < best):
            found.append(point)
            best = point[2]
    return found


def _panel(axis: Any, title: str, below: str, side: str, points: list[Point], high_is_good: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(title=title, xlabel=below, ylabel=side)
    edge = front(points, high_is_good)
    for name, x, y in [*edge, *(point for point in points if point not in edge)]:
        axis.plot(x, y, "o", color=_color(name), markersize=5)
        axis.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.step([p[1] for p in edge], [p[2] for p in edge], where="post", color="#595959", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="linear" if high_is_good else "log")
    for line in [axis.xaxis] if high_is_good else [axis.xaxis, axis.yaxis]:
        least, most = line.get_view_interval()
        line.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
        line.set_major_formatter(lambda value, _: f"{value:g}")
        line.set_minor_formatter(NullFormatter())
    axis.grid(color="#e5e5e5")


def _part_names(axis: Any) -> None:
    """Take away each name that lies on one before it, or beyond the panel."""
    shown = []
    for text in list(axis.texts):
        box = text.get_window_extent()
        if box.x1 > axis.get_window_extent().x1 or any(box.overlaps(other) for other in shown):
            text.remove()
        else:
            shown.append(box)


def _published(axis: Any, result: dict[str, Any]) -> None:
    """Hollow, on the panel of memory; of the same backbone and task."""
    for name, row in result["methods"].items():
        for each in row["run_info"]["method"]["published"]:
            if result["base"]["backbone"]["name"].startswith(BACKBONES.get(each["backbone"], each["backbone"])):
                axis.plot(each["memory_mb"], each["top1"], "o", color=_color(name), markerfacecolor="none")
                words = f"{name}, {each['task']}: {each['rule']}"
                axis.annotate(words, (each["memory_mb"], each["top1"]), fontsize=5, color="#595959")


def _color(name: str) -> str:
    return FAMILIES.get(name.partition("_")[0], FAMILIES["other"])
