"""Test the generated tasks: images are reproducible, splits are disjoint, and classes are balanced and distinct."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from moe_bsr.data.generated import FAMILIES, Generated
from moe_bsr.data.generated.task_families import TASK_FAMILIES, alphabet

TASKS = Path(__file__).resolve().parents[2] / "tasks"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_depends_only_on_its_index(family):
    one = Generated(family, "train", 300)
    forward = [one.image(i) for i in range(0, 300, 37)]
    another = Generated(family, "train", 900)  # another length, drawn in reverse order
    backward = [another.image(i) for i in reversed(range(0, 300, 37))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.dtype == np.uint8 and a.shape == (64, 64, 3)
        assert a.std() > 2  # the image is not blank
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.labels, another.labels[:300])


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_and_seeds_share_no_image(family):
    sets = [
        Generated(family, "train", 60),
        Generated(family, "test", 60),
        Generated(family, "train", 60, seed=1),
    ]
    bytes_of = [source.image(i).tobytes() for source in sets for i in range(60)]
    assert len(set(bytes_of)) == 180


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_balanced_and_named(family):
    source = Generated(family, "train", 1000)
    names = source.class_names
    assert source.labels.dtype == np.int64 and len(source) == 1000
    counts = np.bincount(source.labels, minlength=len(names))
    assert len(counts) == len(names) == len(set(names)) and np.ptp(counts) <= 1


def test_the_source_family_has_no_class_of_a_task():
    names = {family: set(Generated(family, "train", 1).class_names) for family in FAMILIES}
    source = names.pop("source")
    assert FAMILIES[-1] == "source" and len(source) >= 200 and len(names) == 5
    for family, classes in names.items():
        assert 10 <= len(classes) <= 60, family
        assert not classes & source


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="'shape'.*shapes.*source"):
        Generated("shape", "train", 10)
    with pytest.raises(ValueError, match="count: 0"):
        Generated("shapes", "train", 0)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"image {index} of 10"):
            Generated("shapes", "train", 10).image(index)


def _figure(family, label, seed):
    """Return one grayscale drawing (float32, H x W) with zero mean."""
    image = TASK_FAMILIES[family][1](label, np.random.default_rng(seed)).astype(np.float32).mean(2)
    return image - image.mean()


@pytest.mark.parametrize("family", list(TASK_FAMILIES))
def test_the_class_changes_the_picture(family):
    """With the same random stream, pose and colors, two classes never give the same image."""
    count = len(TASK_FAMILIES[family][0])
    for seed in range(2):
        figures = np.stack([_figure(family, label, seed).ravel() for label in range(count)])
        norms = (figures**2).sum(1)
        squared = norms[:, None] + norms[None] - 2 * figures @ figures.T
        np.fill_diagonal(squared, np.inf)
        assert squared.min() / 4096 > 1  # gray levels squared, per pixel


def test_colors_are_independent_of_the_class():
    """The mean color of each class equals that of all images, within the sampling error."""
    for family in ("shapes", "fractals"):
        source = Generated(family, "train", 240)
        colors = np.stack([source.image(i).reshape(-1, 3).mean(0) for i in range(len(source))])
        classes = len(source.class_names)
        means = np.stack([colors[source.labels == c].mean(0) for c in range(classes)])
        error = colors.std(0) / np.sqrt(len(source) / classes)
        assert (np.abs(means - colors.mean(0)) < 4.5 * error).all(), family


def test_all_glyphs_are_distinct():
    signs = alphabet()
    assert len(signs) == 40 and all(3 <= len(sign) <= 4 for sign in signs)
    looks = {b"".join(line.tobytes() for line in sign) for sign in signs}
    assert len(looks) == 40


@pytest.mark.parametrize("family", list(TASK_FAMILIES))
def test_the_task_files_agree_with_the_families(family):
    task = yaml.safe_load((TASKS / f"{family}.yaml").read_text())
    assert task["source"] == "generated" and task["family"] == family
    assert task["classes"] == len(TASK_FAMILIES[family][0])
    assert task["train"] >= 2000 and task["test"] >= 500
