"""Expert figures: legible for any number of tasks and experts, and colored by their values."""

import io

import color_vision
import numpy as np
import pytest
from color_vision import lightness
from fresh import run as run_fresh
from PIL import Image
from tiny_models import normal
from tiny_routing import by_logits, spread

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.visualize import experts as expert_figures
from moe_bsr.visualize import theme


def make(tasks: int, experts: int, k: int, unseen: int | None = None) -> RoutingStatistics:
    statistics = RoutingStatistics([f"task {'x' * (i % 20)}{i}" for i in range(tasks)], experts)
    for row, name in enumerate(statistics.tasks):
        if row != unseen:
            statistics.add(name, by_logits(2 * normal(2, 30, experts, seed=row), k))
    return statistics


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts] + theme.numbers(figure)


SIZES = [(2, 2, 2), (10, 16, 4), (11, 16, 4), (3, 17, 4), (20, 64, 4), (1, 1, 1)]  # with numbers, then without


@pytest.mark.parametrize(("tasks", "experts", "k"), SIZES)
def test_all_texts_lie_within_the_figure_and_do_not_overlap(tasks, experts, k):
    statistics = make(tasks, experts, k, unseen=2 if tasks > 2 else None)
    for figure in (
        expert_figures.heatmap(statistics, 3, "training", 20),
        expert_figures.distances(statistics, 3, "training"),
        expert_figures.overview({3: statistics, 11: statistics}),
    ):
        height, width, _ = theme.pixels(figure).shape
        assert width == theme.WIDTH and height < 1400
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.axes[0].texts
            if text.get_text() and not text.get_rotation()
        ]
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for index, (text, box) in enumerate(boxes):
            for other, second in boxes[index + 1 :]:
                across = min(box.x1, second.x1) - max(box.x0, second.x0)
                down = min(box.y1, second.y1) - max(box.y0, second.y0)
                assert across <= 1 or down <= 4, (text, other)  # boxes include space for ascenders


def test_cells_have_numbers_up_to_sixteen_experts_and_ten_tasks():
    statistics = make(10, 16, 4)
    shown = words(expert_figures.heatmap(statistics, 3, "validation", 1200))
    assert shown[:2] == ["Block 3: experts used by each task", "validation, step 1,200"]
    for of in ("count", "gate"):
        for share in statistics.shares(of).flatten():
            assert f"{100 * share:.0f}" in shown
    assert len(shown) > 2 * 160
    for tasks, experts in ((11, 16), (10, 17)):
        assert not expert_figures.has_room_for_numbers(tasks, experts)
        assert len(words(expert_figures.heatmap(make(tasks, experts, 4), 3, ""))) < 90


def test_the_uniform_level_is_marked_at_its_color():
    statistics = RoutingStatistics(["a", "b"], 8)
    for task in statistics.tasks:
        statistics.add(task, spread(8, list(range(8))))
    figure = expert_figures.heatmap(statistics, 3, "")
    assert "uniform 12.5 %" in words(figure)
    cells, *_, bar = (image for image in figure.axes[0].images)
    left, right, *_ = bar.get_extent()
    mark = next(line for line in figure.axes[0].lines if line.get_linewidth() == 3).get_xdata()[0]
    at_mark = np.asarray(bar.get_array())[0, round((mark - left) / (right - left) * 255)]
    assert np.abs(np.asarray(cells.get_array()) - at_mark).max() < 0.02


def test_a_task_without_data_is_marked():
    shown = words(expert_figures.heatmap(make(4, 6, 2, unseen=1), 3, ""))
    assert shown.count("no data") == 2 and "nan" not in " ".join(shown)
    assert "nan" not in " ".join(words(expert_figures.distances(make(4, 6, 2, unseen=1), 3, "")))
    empty = RoutingStatistics(["a"], 4)
    for figure in (expert_figures.heatmap(empty, 0, ""), expert_figures.overview({0: empty})):
        assert theme.png(figure) and "nan" not in " ".join(words(figure))


# --- theme ---


def test_sequential_colors_darken_steadily_for_every_kind_of_color_vision():
    colors = theme.sequential(np.linspace(0, 1, 100))
    assert (np.diff(lightness(colors)) < 0).all()
    for eye in color_vision.oklab(colors):
        assert (np.diff(eye[:, 0]) < 0).all()
    assert np.allclose(theme.sequential(np.array([-1.0, 2.0])), colors[[0, -1]])
    assert np.allclose(theme.sequential(np.array(np.nan)), color_vision.rgb(theme.EMPTY))
    both = theme.diverging(np.array([-1, -0.5, 0, 0.5, 1]))
    assert np.allclose(both[2], 1) and np.abs(lightness(both) - lightness(both)[::-1]).max() < 0.06


def test_expert_colors_are_distinct_for_every_kind_of_color_vision():
    for count, least in ((16, 0.07), (32, 0.05), (64, 0.03)):
        colors = theme.expert_colors(count)
        assert np.array_equal(colors, theme.expert_colors(64)[:count])
        for index, color in enumerate(colors):
            assert np.delete(color_vision.distance(colors, color), index).min() > least
    assert np.array_equal(theme.expert_colors(66)[64:], theme.expert_colors(2))
    assert np.allclose(theme.expert_colors(64), color_vision.search())


def test_text_is_readable_on_every_color():
    for color in [*theme.expert_colors(64), *theme.sequential(np.linspace(0, 1, 50))]:
        ink = 1.0 if theme.text_color_on(color) == "white" else lightness(color_vision.rgb(theme.INK))
        dark, light = sorted((float(lightness(color)), float(ink)))
        assert (light + 0.05) / (dark + 0.05) > 3  # the contrast that WCAG requires for large text


def test_a_png_has_the_pixels_of_the_figure_and_fewer_colors_make_it_smaller():
    figure = expert_figures.heatmap(make(5, 16, 4), 3, "")
    pixels = theme.pixels(figure)
    exact, small = theme.png(figure), theme.png(figure, 256)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(exact)).convert("RGB")), pixels)
    close = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert np.abs(close - pixels).mean() < 2 and len(small) < len(exact) / 2


def test_importing_the_package_loads_no_matplotlib():
    code = (
        "import sys, moe_bsr, moe_bsr.api, moe_bsr.visualize.experts; "
        "sys.exit(any(name.split('.')[0] == 'matplotlib' for name in sys.modules))"
    )
    assert run_fresh(code).returncode == 0
