"""Test unreadable images: a run stops and says what to do, or skips them, with the same result after a resume."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import folder_task, save
from tiny_runs import LATE, Crash, act_at, crash, make_config, make_trainer, state_of

from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.config import replace
from moe_bsr.data import ImageTransforms, Loader, Split, UnreadableImage, load_spec, load_task
from moe_bsr.data.check import check_task
from moe_bsr.runs.folder import RESUMABLE_KEYS

FIELDS = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def data(tmp_path):
    return load_task(load_spec(folder_task(tmp_path)), root=tmp_path)


def file_of(split: Split, position: int) -> Path:
    return split.source.files[split.place(position)]


def batches(data, transforms, positions, known=None, prefetch=0):
    plan = [("pictures", np.array(part), np.zeros(len(part), int)) for part in positions]
    return list(Loader({"pictures": data}, transforms, plan, prefetch, known))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_the_error_names_the_unreadable_image_and_says_what_to_do(data, content):
    bad = file_of(data.train, 3)
    bad.unlink() if content is None else bad.write_bytes(content)
    with pytest.raises(UnreadableImage) as stop:
        batches(data, ImageTransforms(**FIELDS), [[2, 3]])
    message = str(stop.value)
    assert str(bad) in message and "data.unreadable=skip and resume=True" in message and "remove" not in message
    assert "data.unreadable" in RESUMABLE_KEYS


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_next_readable_image_of_the_split_is_used_instead(data, prefetch):
    last = len(data.train) - 1
    for position in (3, 4, last):
        file_of(data.train, position).write_bytes(b"")
    transforms = ImageTransforms(**FIELDS, unreadable="skip")
    with pytest.warns(UserWarning, match="task pictures, train: .*not a readable image.*skipped") as warned:
        found = batches(data, transforms, [[2, 3, 5], [4, last], [3, 3, 4]], prefetch=prefetch)
    assert [batch.positions.tolist() for batch in found] == [[2, 5, 5], [5, 0], [5, 5, 5]]
    for batch in found:
        assert torch.equal(batch.labels, torch.from_numpy(data.train.labels[batch.positions]))
        expected, _ = ImageTransforms(**FIELDS).train_batch(data, batch.positions, np.zeros(len(batch), int))
        assert torch.equal(batch.images, expected)
    assert len(warned) == 3 and len(transforms.skipped["pictures"]["train"]) == 3  # each one is named once
    names = transforms.skipped["pictures"]["train"]
    assert all(Path(name).name in reason and "empty" in reason for name, reason in names.items())
    # The replacement is deterministic, so a later start gives the same images.
    with pytest.warns(UserWarning):
        (late,) = batches(data, ImageTransforms(**FIELDS, unreadable="skip"), [[3, 3, 4]])
    assert torch.equal(late.images, found[2].images)


def test_cached_features_are_looked_up_by_the_replacement_image(data):
    file_of(data.train, 3).write_bytes(b"")
    asked = []
    transforms = ImageTransforms(**FIELDS, unreadable="skip")
    with pytest.warns(UserWarning):
        batches(data, transforms, [[3]], known=lambda *_: False)
        (batch,) = batches(data, transforms, [[3]], known=lambda _, positions, __: asked.append(positions[0]) or True)
    assert asked == [4] and batch.positions.tolist() == [4] and batch.labels.tolist() == [data.train.labels[4]]


def test_a_selection_keeps_the_names_of_missing_images(data):
    split = dataclasses.replace(data.train, index=np.array([-1, 4, -1]), labels=np.zeros(3, int), gone={0: "a", 2: "c"})
    some = split.select(np.array([2, 1]))
    assert some.index.tolist() == [-1, 4]
    with pytest.raises(UnreadableImage, match="^c: gone"):
        some.place(0)


def test_a_missing_image_is_skipped(data):
    index = data.train.index.copy()
    index[2] = -1
    data = dataclasses.replace(data, train=Split(data.train.source, index, data.train.labels))
    with pytest.raises(UnreadableImage, match="gone"):
        batches(data, ImageTransforms(**FIELDS), [[2]])
    transforms = ImageTransforms(**FIELDS, unreadable="skip")
    with pytest.warns(UserWarning, match="gone since the run began; it is skipped"):
        (batch,) = batches(data, transforms, [[2, 0]])
    assert batch.positions.tolist() == [3, 0] and list(transforms.skipped["pictures"]["train"]) == ["image 2"]


def test_evaluation_leaves_out_unreadable_images(data):
    whole = list(ImageTransforms(**FIELDS).eval_batches(data, "test", 4))
    images, labels = (torch.cat(part) for part in zip(*whole, strict=True))
    for position in (0, 4, 5):
        file_of(data.test, position).write_bytes(b"")
    with pytest.raises(UnreadableImage, match="readable copy"):
        list(ImageTransforms(**FIELDS).eval_batches(data, "test", 4))
    transforms = ImageTransforms(**FIELDS, unreadable="skip")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(transforms.eval_batches(data, "test", 4))
        assert [len(labels) for _, labels in found] == [3]
        assert torch.equal(found[0][0], images[1:4]) and torch.equal(found[0][1], labels[1:4])
    assert list(transforms.skipped["pictures"]) == ["test"] and len(transforms.skipped["pictures"]["test"]) == 3


def test_a_split_without_readable_images_is_an_error(data):
    for position in range(len(data.train)):
        file_of(data.train, position).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UnreadableImage, match="not one of its .* can be read"):
        batches(data, ImageTransforms(**FIELDS, unreadable="skip"), [[0]])


def test_a_run_with_skipped_images_is_the_same_after_a_crash(tmp_path, monkeypatch, bare):
    config = make_config(tmp_path, **LATE, train__steps=4, train__checkpoint_every=1, train__batch_size=12)
    file = folder_task(tmp_path)
    config = replace(
        config, tasks=[str(file), config.tasks[1]], data__root=str(tmp_path), data__unreadable="skip",
        data__prefetch=1, data__image_cache_mb=0,
    )  # fmt: skip
    data = load_task(load_spec(file), root=tmp_path)
    for split, position in ((data.train, 1), (data.train, 2), (data.val, 0), (data.test, 1)):
        file_of(split, position).write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped"):
        whole = make_trainer(config, tmp_path / "whole")
        report = whole.fit()
    assert report["tasks"]["pictures"]["n"] == len(data.test) - 1
    with monkeypatch.context() as patch, pytest.warns(UserWarning), pytest.raises(Crash):
        act_at(patch, 3, crash)
        make_trainer(config, tmp_path / "part", [Jsonl(tmp_path / "part")]).fit()
    with pytest.warns(UserWarning):
        resumed = make_trainer(config, tmp_path / "part")
        resumed.fit(resume=True)
    after = state_of(resumed.model)
    assert all(torch.equal(value, after[name]) for name, value in state_of(whole.model).items())


def test_check_task_finds_all_problems_at_once(data, tmp_path):
    train, test = data.train, data.test
    for position in range(len(test)):
        save(file_of(test, position), 5000 + position)
    for position, content in ((0, b""), (5, b"<html>")):
        file_of(train, position).write_bytes(content)
    file_of(test, 0).write_bytes(b"\0" * 40)
    file_of(test, 1).write_bytes(file_of(train, 1).read_bytes())
    file_of(train, 2).write_bytes(file_of(train, len(train) - 1).read_bytes())  # an image of another class
    Image.new("RGB", (6, 40), "red").save(file_of(train, 4))
    calls = []
    found = check_task(data, lambda: calls.append(1))
    assert len(calls) == len(data.train) + len(data.val) + len(data.test)
    assert [(image["split"], image["reason"].split("(")[1]) for image in found["broken"]] == [
        ("train", "it is empty)"), ("train", "it is a web page)"), ("test", "it begins with zeros)"),
    ]  # fmt: skip
    name = train.source.names[train.place(4)]
    assert found["constant"] == found["tiny"] == [{"split": "train", "image": name}]
    (shared,) = found["shared"]
    assert (shared["splits"], shared["images"]) == (["train", "test"], 1)
    assert found["two_labels"]["images"] == 1
    assert found["splits"]["test"] == {"images": len(test), "smallest": (12, 10), "largest": (12, 10)}
    json.dumps(found)
