"""Test suites of generated tasks: the same images with independent, balanced labels."""

import itertools

import numpy as np
import pytest

from moe_bsr.data.generated import Generated
from moe_bsr.data.generated.suites import SUITE_FAMILIES, SUITES


def opened(suite: str, split: str = "train", count: int = 800) -> dict[str, Generated]:
    return {factor: Generated(f"{suite}_{factor}", split, count) for factor in SUITES[suite][0]}


@pytest.mark.parametrize("suite", list(SUITES))
def test_tasks_of_a_suite_have_the_same_images(suite):
    tasks = list(opened(suite).values())
    for index in (0, 7, 311):
        drawn = [task.image(index) for task in tasks]
        assert drawn[0].dtype == np.uint8 and drawn[0].shape == (64, 64, 3) and drawn[0].std() > 5
        assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
    assert not np.array_equal(tasks[0].image(1), tasks[0].image(2))
    assert not np.array_equal(tasks[0].image(1), Generated(f"{suite}_{next(iter(opened(suite)))}", "test", 5).image(1))


@pytest.mark.parametrize("suite", list(SUITES))
def test_labels_are_balanced_and_independent(suite):
    tasks = opened(suite)
    for name, task in tasks.items():
        counts = np.bincount(task.labels, minlength=len(task.class_names))
        assert np.ptp(counts) == 0 and len(set(task.class_names)) == len(task.class_names), name
        assert np.array_equal(task.labels[:50], Generated(f"{suite}_{name}", "train", 50).labels)
    for a, b in itertools.combinations(tasks.values(), 2):
        table = np.zeros((len(a.class_names), len(b.class_names)))
        np.add.at(table, (a.labels, b.labels), 1)
        expected = len(a) / table.size
        degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
        # A chi-squared sum has mean `degrees` and variance 2 x `degrees`.
        assert ((table - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_labels_describe_the_image():
    """Check the factors that can be measured: more figures cover more pixels, and the hue is the figures' color."""
    tasks = opened("factor", count=60)
    covered, hues = {}, []
    for index in range(60):
        image = tasks["count"].image(index).astype(float) / 255
        colored = np.ptp(image, -1) > 0.25
        covered.setdefault(tasks["count"].labels[index], []).append(colored.mean())
        red, green, blue = image[colored].mean(0)
        hues.append((tasks["hue"].labels[index], max((red, 0), (green, 3), (blue, 5))[1]))
    means = [np.mean(covered[count]) for count in range(4)]
    assert means == sorted(means) and means[3] > 2 * means[0]
    assert all(seen == label for label, seen in hues if label in (0, 3, 5))


def test_an_unknown_family_is_refused_with_the_known_ones():
    assert set(SUITE_FAMILIES) >= {"factor_hue", "scene_ground"}
    with pytest.raises(ValueError, match="'factor_colour' is unknown.*factor_hue.*scene_ground"):
        Generated("factor_colour", "train", 10)
