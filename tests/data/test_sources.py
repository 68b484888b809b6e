"""Test task files, sources in their official directory layouts, and splits."""

import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torchvision
from tiny_data import fake_cifar, fake_flowers, fake_food, fake_pets, folder_task, picture, save

from moe_bsr.config import ConfigError
from moe_bsr.data import SOURCES, TaskSpec, load_spec, load_task
from moe_bsr.data.sources.folder import FolderSource
from moe_bsr.data.sources.torchvision_datasets import TORCHVISION, TorchvisionSource

FAKES = {
    "CIFAR10": lambda root, mp: fake_cifar(root, torchvision.datasets.CIFAR10, mp),
    "CIFAR100": lambda root, mp: fake_cifar(root, torchvision.datasets.CIFAR100, mp),
    "Flowers102": fake_flowers,
    "OxfordIIITPet": lambda root, mp: fake_pets(root),
    "Food101": lambda root, mp: fake_food(root),
}
EXPECTED = {  # splits, labels in order
    "CIFAR10": (["train"], [0, 1] * 10),
    "CIFAR100": (["test"], [0, 1] * 2),
    "Flowers102": (["train", "val"], [0, 1, 101] * 2),
    "OxfordIIITPet": (["trainval"], [0, 0, 0, 1, 1, 1]),
    "Food101": (["test"], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("dataset", FAKES)
def test_official_layout_gives_torchvisions_images_and_labels(dataset, tmp_path, monkeypatch):
    FAKES[dataset](tmp_path, monkeypatch)
    splits, labels = EXPECTED[dataset]
    source = TorchvisionSource(dataset, tmp_path, splits)
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels
    assert len(source) == len(labels) and len(source.class_names) > max(labels)
    kind = getattr(torchvision.datasets, dataset)
    plain = [
        item
        for split in splits
        for item in (
            kind(tmp_path, train=split == "train") if dataset.startswith("CIFAR") else kind(tmp_path, split=split)
        )
    ]
    for i, (image, label) in enumerate(plain):
        assert label == source.labels[i]
        np.testing.assert_array_equal(source.image(i), np.asarray(image))


@pytest.mark.parametrize("dataset", FAKES)
def test_absent_dataset_says_where_it_is_expected(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected .*download"):
        TorchvisionSource(dataset, tmp_path, EXPECTED[dataset][0])


def test_damaged_cifar_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    FAKES["CIFAR10"](tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(FileNotFoundError, match="corrupted"):
        TorchvisionSource("CIFAR10", tmp_path, ["train"])


def test_half_unpacked_dataset_is_refused(tmp_path):
    fake_food(tmp_path)
    (tmp_path / "food-101/images/waffles/4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing.*waffles/4\.jpg"):
        TorchvisionSource("Food101", tmp_path, ["test"])


@pytest.mark.parametrize(
    "dataset, splits, word", [("CIFAR1", ["train"], "CIFAR10"), ("Food101", ["val"], "train, test")]
)
def test_an_unknown_dataset_or_split_is_refused(dataset, splits, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        TorchvisionSource(dataset, tmp_path, splits)


def test_folder_task(tmp_path):
    data = load_task(load_spec(folder_task(tmp_path)), root=tmp_path)
    assert data.class_names == ["ant", "bee", "cat"] and data.name == "pictures"
    assert len(data.train) + len(data.val) == 30 and 1 <= len(data.val) <= 8 and len(data.test) == 6
    assert not set(data.train.index) & set(data.val.index)
    for split in (data.train, data.val, data.test):
        np.testing.assert_array_equal(split.labels, split.source.labels[split.index])
    np.testing.assert_array_equal(data.train.source.image(11), np.asarray(picture(1001)))
    assert "folder" in data.origin


def test_test_folder_may_lack_classes_but_not_add_any(tmp_path):
    folder_task(tmp_path)
    save(tmp_path / "test" / "cat" / "0.png", 0)
    assert FolderSource(tmp_path / "test", ["ant", "bee", "cat"]).labels.tolist() == [2]
    save(tmp_path / "test" / "dog" / "0.png", 0)
    with pytest.raises(ValueError, match="'dog'"):
        FolderSource(tmp_path / "test", ["ant", "bee", "cat"])


def test_unreadable_image_is_named(tmp_path):
    folder_task(tmp_path)
    (tmp_path / "pictures/train/bee/3.png").write_bytes(b"\x89PNG and no more")
    source = FolderSource(tmp_path / "pictures/train")
    with pytest.raises(ValueError, match=r"bee/3\.png.*not a readable image"):
        source.image(13)


def test_a_task_with_one_class_is_refused(tmp_path):
    folder_task(tmp_path)
    for split in ("train", "test"):
        for other in sorted((tmp_path / "pictures" / split).iterdir())[1:]:
            shutil.rmtree(other)
    with pytest.raises(ValueError, match="1 class, but at least two are needed"):
        load_task(load_spec(tmp_path / "pictures.yaml"), root=tmp_path)


def test_generated_task_is_drawn_by_its_family(tmp_path, monkeypatch):
    class Generated:
        def __init__(self, family, split, count, seed):
            self.asked = (family, split, count, seed)
            self.labels, self.class_names, self.names = np.arange(count) % 2, ["a", "b"], None

        def __len__(self):
            return len(self.labels)

    module = types.ModuleType("generated")
    module.Generated = Generated
    monkeypatch.setitem(sys.modules, "moe_bsr.data.generated", module)
    file = tmp_path / "dots.yaml"
    file.write_text("title: Dots\nsource: generated\nfamily: dots\nclasses: 2\ntrain: 20\ntest: 6\nseed: 7\n")
    data = load_task(load_spec(file), root=tmp_path)
    assert data.train.source.asked == ("dots", "train", 20, 7)
    assert data.test.source.asked == ("dots", "test", 6, 7)


@pytest.mark.parametrize(
    "text, word",
    [
        ("title: x\nsource: folder\npath: p\ncrop_scael: [1, 1]", "crop_scale"),
        ("title: x\nsource: foldr\npath: p", "folder"),
        ("title: x\nsource: folder", "'path'"),
        ("source: folder\npath: p", "'title'"),
        ("title: x\nsource: folder\npath: p\nfamily: dots", "family for source folder: it belongs to source generated"),
        ("title: x\nsource: folder\npath: p\nflip: 1", "flip"),
        ("title: x\nsource: folder\npath: p\ncrop_scale: [0.5, 0.2]", "crop_scale"),
        ("title: x\nsource: folder\npath: p\nclasses: ten", "classes"),
        ("title: x\nsource: folder\npath: 3", "path"),
        ("title:\nsource: folder\npath: p", "title"),
        ("title: x\nsource: [folder]\npath: p", "source"),
        ("title: x\nsource: folder\npath: p\nname: other", "unknown key name for source folder"),
        ("title: x\nsource: torchvision\ndataset: CIFAR10\nsplits: {train: [train]}", "splits"),
        (
            "title: x\nsource: torchvision\ndataset: C\nsplits: {train: [a], test: [a]}",
            "in train and in test or val",
        ),
        (
            "title: x\nsource: torchvision\ndataset: Food101\nsplits: {train: [train], test: [test], val: [test]}",
            "test",
        ),
        ("title: x\nsource: folder\npath: p\nbits: 7", "bits = 7: null or 8 to 16"),
        ("title: x\nsource: torchvision\ndataset: CIFAR1", "did you mean 'CIFAR10'"),
        ("title: x\nsource: torchvision\ndataset: Food101\nsplits: {train: [train], test: [val]}", "has train, test"),
        ("title: x\nsource: generated\nfamily: dots\ntrain: 20\ntest: 6", "'classes' is missing"),
        ("title: x\nsource: generated\nfamily: dots\nclasses: 2\ntrain: 1\ntest: 6", "train = 1: at least 2"),
        ("title: x\npath: p", "'source' is missing: one of .*folder"),
        ("- a list", "keys and values"),
        ("title: [", "YAML"),
    ],
)
def test_invalid_task_files_are_refused(text, word, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=word):
        load_spec(file)


def test_unknown_task_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar100.*did you mean 'pets'"):
        load_spec("petz")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text("title: Mine\nsource: folder\npath: p\n")
    assert load_spec("mine").title == "Mine"


def test_a_task_file_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("title: Mine\nsource: folder\npath: photos\n")
    assert load_spec("~/mine.yaml").title == "Mine"


def test_a_torchvision_split_may_serve_as_validation_split(tmp_path, monkeypatch):
    fake_flowers(tmp_path, monkeypatch)
    file = tmp_path / "flowers.yaml"
    splits = "{train: [train], val: [val], test: [test]}"
    file.write_text(f"title: Flowers\nsource: torchvision\ndataset: Flowers102\nsplits: {splits}\n")
    data = load_task(load_spec(file), root=tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [3, 3, 6]
    assert data.train.source is not data.val.source and data.val.labels.tolist() == [0, 1, 101]


def test_classes_must_agree_with_the_data(tmp_path):
    file = folder_task(tmp_path)
    file.write_text(file.read_text() + "classes: 4\n")
    with pytest.raises(ValueError, match="classes: 4 in its file, but 3"):
        load_task(load_spec(file), root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets", "food101"])
def test_shipped_task_files_name_splits_that_exist(name):
    spec = load_spec(name)
    assert spec.source == "torchvision" and spec.homepage and spec.license != "not stated"
    assert {s for part in spec.splits.values() for s in part} <= set(TORCHVISION[spec.dataset][0])


def test_download_only_on_request(tmp_path, monkeypatch):
    def fetch(dataset) -> None:
        if not dataset._check_exists():
            fake_food(Path(dataset.root))

    monkeypatch.setattr(torchvision.datasets.Food101, "_download", fetch)
    spec = load_spec("food101")
    with pytest.raises(FileNotFoundError):
        load_task(spec, root=tmp_path)
    with pytest.raises(ValueError, match="classes: 101 in its file, but 2"):
        load_task(spec, root=tmp_path, download=True)
    assert (tmp_path / "food-101").is_dir()


def test_a_new_source_is_one_decorated_class(tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @SOURCES.register("stripes")
    @dataclass(frozen=True, kw_only=True)
    class Stripes(TaskSpec):
        width: int
        color: str = "red"

    file = tmp_path / "mine.yaml"
    file.write_text("title: Mine\nsource: stripes\nwidth: 3\n")
    spec = load_spec(file)
    assert (spec, spec.source) == (Stripes(name="mine", title="Mine", width=3), "stripes")
    file.write_text("title: Mine\nsource: stripes\nwidth: 3\ncolour: blue\n")
    with pytest.raises(ConfigError, match="unknown key colour for source stripes; did you mean 'color'"):
        load_spec(file)
