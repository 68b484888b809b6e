"""Figures of mistakes: legible for any number of classes and any names."""

import warnings

import numpy as np
import pytest
from tiny_names import AWKWARD

from moe_bsr.evaluation.mistakes import Mistake, Mistakes
from moe_bsr.visualize import mistakes, theme


def answers(classes: int, names: list[str] | None = None, worst: int = 8) -> Mistakes:
    rng = np.random.default_rng(classes)
    counts = rng.integers(0, 3, (classes, classes)) * (rng.random((classes, classes)) < 0.2) + 9 * np.eye(
        classes, dtype=int
    )
    names = names or [f"class {i}" for i in range(classes)]
    image = rng.integers(0, 256, (3, 16, 16), dtype=np.uint8)
    return Mistakes(names, counts, [Mistake(image, names[0], names[-1], 0.8, 2.0)] * worst)


@pytest.mark.parametrize("classes", [1, 20, 21, 1000])
def test_a_confusion_matrix_fits_for_any_number_of_classes(classes):
    figure = mistakes.confusion("pets", answers(classes), "validation, 200 images")
    height, width, _ = theme.pixels(figure).shape
    assert width == theme.WIDTH and height < 1200
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width + 1 and box.y0 >= 0 and box.y1 <= height, text.get_text()


def test_cells_are_counts_and_only_the_most_confused_of_many_classes_are_shown():
    found = answers(3)
    assert mistakes_numbers(found) == [str(n) for n in found.counts.ravel() if n]
    many = answers(40)
    wrong = many.counts.sum(0) + many.counts.sum(1) - 2 * many.counts.diagonal()
    shown = [t.get_text() for t in mistakes.confusion("pets", many, "").axes[0].texts]
    chosen = {f"class {i}" for i in np.argsort(-wrong, kind="stable")[: mistakes.CLASSES]}
    assert {text for text in shown if text.startswith("class ")} == chosen and mistakes.OTHERS in shown
    assert any("20 most confused of 40 classes" in text for text in shown)
    rows = sorted(np.argsort(-wrong, kind="stable")[: mistakes.CLASSES])
    assert sum(map(int, mistakes_numbers(many))) == many.counts[rows].sum()  # no image of a row is lost


def mistakes_numbers(found: Mistakes) -> list[str]:
    return theme.numbers(mistakes.confusion("pets", found, ""))


def test_right_answers_are_blue_and_mistakes_red():
    found = Mistakes(["a", "b"], np.array([[5, 5], [0, 4]]), [])
    colors = np.asarray(mistakes.confusion("pets", found, "").axes[0].images[0].get_array())
    assert colors[0, 0, 2] > colors[0, 0, 0] and colors[0, 1, 0] > colors[0, 1, 2] and (colors[1, 0] == 1).all()


@pytest.mark.parametrize("worst", [1, 4, 5, 8, 20])
def test_the_worst_answers_show_image_true_class_and_prediction(worst):
    figure = mistakes.worst("pets", answers(3, worst=worst), "")
    shown = [t.get_text() for t in figure.axes[0].texts]
    count = min(worst, mistakes.WORST)
    assert len(figure.axes[0].images) == count == shown.count("class 0") == shown.count("class 2 80 %")


def test_without_mistakes_there_is_no_figure():
    assert mistakes.worst("pets", answers(3, worst=0), "") is None


def test_any_names_are_drawn_without_a_warning():
    names = list(AWKWARD.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            mistakes.confusion("t", answers(len(names), names), ""),
            mistakes.worst("t", answers(3, names), ""),
        ):
            assert theme.png(figure)
