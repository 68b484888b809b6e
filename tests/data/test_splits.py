"""Test that whether an image is held out depends only on its name."""

import unicodedata

import numpy as np
import pytest

from moe_bsr.data import load_spec, load_task
from moe_bsr.data.splits import held_out
from tests.tiny_data import folder_task, save


def sides(names, fraction=0.2, seed=0, purpose="validation"):
    """Return {name: whether it is held out}. The class of an image is the part of its name before the slash."""
    classes = sorted({name.split("/")[0] for name in names})
    labels = np.array([classes.index(name.split("/")[0]) for name in names])
    kept, out = held_out(labels, names, fraction, seed, purpose)
    assert sorted([*kept, *out]) == list(range(len(names))) and (np.diff(out) > 0).all()
    held = set(out.tolist())
    return {name: i in held for i, name in enumerate(names)}


NAMES = [f"{kind}/{n}.jpg" for kind in ("ant", "bee", "cat") for n in range(200)]


def test_changes_of_other_images_do_not_move_an_image_to_another_split():
    before, rng = sides(NAMES), np.random.default_rng(0)
    for _ in range(20):
        some = [str(name) for name in rng.permutation(NAMES)[:400]]
        after = sides([*some, *(f"{kind}/new{rng.integers(10**6)}.jpg" for kind in ("ant", "dog") for _ in range(30))])
        assert {name: after[name] for name in some} == {name: before[name] for name in some}


def test_the_held_out_share_is_the_requested_fraction_on_average():
    many = [f"a/{n}" for n in range(20_000)]
    for fraction in (0.05, 0.1, 0.45):
        assert abs(np.mean(list(sides(many, fraction).values())) - fraction) < 0.01


def test_seed_and_purpose_choose_independently():
    chosen = [sides(NAMES), sides(NAMES, seed=1), sides(NAMES, purpose="test")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agree = np.mean([chosen[a][name] == chosen[b][name] for name in NAMES])
        assert 0.55 < agree < 0.8  # 0.2**2 + 0.8**2


def test_a_name_in_another_unicode_form_is_the_same_name():
    composed = [f"café/ä{n}.jpg" for n in range(100)]
    decomposed = [unicodedata.normalize("NFD", name) for name in composed]
    assert list(sides(composed).values()) == list(sides(decomposed).values())


@pytest.mark.parametrize("seed", range(30))
def test_every_class_keeps_an_image_and_at_least_one_is_held_out(seed):
    held = sides(["a/0", "b/0", "b/1", "c/0"], fraction=0.1, seed=seed)
    assert not held["a/0"] and not held["c/0"] and held["b/0"] != held["b/1"]


def test_classes_of_single_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="single image"):
        sides(["a/0", "b/0"])
    file = folder_task(tmp_path, each=1)
    with pytest.raises(ValueError, match=r"task pictures: no image can be set aside for validation"):
        load_task(load_spec(file), root=tmp_path)


def test_adding_files_to_a_folder_moves_no_other_image(tmp_path):
    file = folder_task(tmp_path)

    def split():
        data = load_task(load_spec(file), root=tmp_path)
        return {name: {s.source.names[i] for i in s.index} for name, s in (("train", data.train), ("val", data.val))}

    before = split()
    for n in range(5):
        save(tmp_path / f"pictures/train/ant/a{n}.png", n)
    after = split()
    assert before["train"] <= after["train"] and before["val"] <= after["val"]
    assert not after["train"] & after["val"] and len(after["train"] | after["val"]) == 35
    data = load_task(load_spec(file), root=tmp_path, split_seed=1)
    assert {data.val.source.names[i] for i in data.val.index} != after["val"]


def test_val_images_limits_validation_and_the_others_train(tmp_path):
    spec = load_spec(folder_task(tmp_path, each=60))
    whole = load_task(spec, root=tmp_path, val_fraction=0.3)
    few, fewer = (load_task(spec, root=tmp_path, val_fraction=0.3, val_images=count) for count in (20, 5))
    assert (len(few.val), len(fewer.val)) == (20, 5) < (len(whole.val),)
    assert set(fewer.val.index) < set(few.val.index) < set(whole.val.index)
    for data in (whole, few, fewer):
        assert len(data.train) + len(data.val) == 180
        assert np.array_equal(data.train.labels, data.train.source.labels[data.train.index])
        assert np.array_equal(data.test.index, whole.test.index)


def test_train_images_limits_training_to_equally_many_images_of_each_class(tmp_path):
    spec = load_spec(folder_task(tmp_path, each=20))
    for n in range(30):
        save(tmp_path / f"pictures/train/ant/more{n}.png", n)
    whole, few, fewer = (load_task(spec, root=tmp_path, train_images=count) for count in (None, 14, 7))
    assert set(fewer.train.index) < set(few.train.index) < set(whole.train.index)
    assert sorted(np.bincount(few.train.labels)) == [4, 5, 5] and sorted(np.bincount(fewer.train.labels)) == [2, 2, 3]
    assert np.array_equal(few.val.index, whole.val.index) and np.array_equal(few.test.index, whole.test.index)
    assert any(f"14 of {len(whole.train)} training images are used (data.train_images)" in note for note in few.notes)
    rare = min(np.bincount(whole.train.labels))
    most = load_task(spec, root=tmp_path, train_images=3 * rare + 5)  # two classes are too small: the third fills up
    assert max(np.bincount(most.train.labels)) > rare and len(most.train) == 3 * rare + 5


def test_val_images_limits_the_validation_split_of_the_data(tmp_path):
    folder = folder_task(tmp_path)
    for kind in ("ant", "bee", "cat"):
        for n in range(6):
            save(tmp_path / "pictures" / "val" / kind / f"{n}.png", n)
    data = load_task(load_spec(folder), root=tmp_path, val_images=7)
    whole = load_task(load_spec(folder), root=tmp_path)
    assert (len(data.val), len(whole.val), len(data.train)) == (7, 18, len(whole.train))
    assert any("18 images, 7 of them used (data.val_images)" in note for note in data.notes)


def test_classes_without_validation_images_are_reported(tmp_path):
    file = folder_task(tmp_path)
    save(tmp_path / "pictures/train/eel/0.png", 5)
    data = load_task(load_spec(file), root=tmp_path)
    assert 3 in data.train.labels and 3 not in data.val.labels
    assert any("classes have no validation image" in note for note in data.notes)
