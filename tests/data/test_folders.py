"""Test folders of images: every file is used or reported, splits are found, and similar class names are reported."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
from tiny_data import save

from moe_bsr.config import Config, ConfigError
from moe_bsr.data import load_spec, load_task
from moe_bsr.data.formats import EXTENSIONS
from moe_bsr.data.sources.folder import FolderTask


def write(folder: Path, *folders: str, images: int = 3) -> None:
    """Write a few images to each of these folders."""
    for number, name in enumerate(folders):
        for n in range(images):
            save(folder / name / f"{n}.png", 100 * number + n)


def opened(folder: Path, **keys):
    return FolderTask(name="mine", title="Mine", path=str(folder), **keys).open(Path())


def report(images) -> str:
    return "\n".join(images.unused)


def test_subfolders_of_a_class_are_read_at_any_depth(tmp_path):
    write(tmp_path, "train/a", "train/a/more", "train/a/more/x/y", "train/b", "test/a", "test/b/deep")
    images = opened(tmp_path)
    assert len(images.train) == 12 and len(images.test) == 6 and not images.unused
    assert images.train.names[:4] == ["a/0.png", "a/1.png", "a/2.png", "a/more/0.png"]
    assert images.train.labels.tolist() == [0] * 9 + [1] * 3


ODD = {
    "IMG_1.HEIC": r"1 \.heic file, such as train/a/IMG_1\.HEIC \(cannot be read here: pip install pillow-heif",
    "raw.CR2": r"1 \.cr2 file, .*camera raw",
    "drawing.svg": r"1 \.svg file, .*export them as PNG",
    "layers.psd": r"1 \.psd file",
    "notes.txt": r"1 file that is not an image, such as train/a/notes\.txt",
    "labels": "1 file that is not an image",
}


@pytest.mark.parametrize("name", ODD)
def test_unused_files_are_counted_by_kind_with_an_example(name, tmp_path):
    if Path(name).suffix.lower() in EXTENSIONS:
        pytest.skip("it is read here")
    write(tmp_path, "train/a", "train/b", "test/a")
    (tmp_path / "train" / "a" / name).write_bytes(b"?")
    images = opened(tmp_path)
    assert len(images.train) == 6 and re.search(f"not used: {ODD[name]}", report(images))
    (tmp_path / "test" / "a" / f"zz{Path(name).suffix}").write_bytes(b"?")
    assert len(opened(tmp_path).unused) == 1 and report(opened(tmp_path)).startswith("not used: 2 ")


def test_unused_images_links_and_special_files_are_reported(tmp_path):
    write(tmp_path, "train/a", "train/b", "extra/c", "Test/a")
    save(tmp_path / "loose.png", 0)
    save(tmp_path / "train" / "loose.png", 0)
    (tmp_path / "readme.md").write_text("?")
    os.mkfifo(tmp_path / "train" / "a" / "fifo.png")
    (tmp_path / "train" / "a" / "lost.png").symlink_to("nowhere")
    (tmp_path / "train" / "b" / "zero.png").symlink_to("/dev/zero")
    images = opened(tmp_path)
    assert len(images.train) == 6 and len(images.test) == 3
    for words in (
        "3 images outside of train, val and test, such as extra/c/0.png",
        "2 images outside of a class folder",
        "1 file that is not an image, such as readme.md",
        "is a FIFO, such as train/a/fifo.png",
        "is a link that leads nowhere, such as train/a/lost.png",
        "is a device, such as train/b/zero.png",
    ):
        assert words in report(images), words
    notes = load_task(FolderTask(name="mine", title="Mine", path=str(tmp_path)), root=Path()).notes
    assert set(images.unused) <= set(notes)  # shown at the start of training and in the dry run


def test_files_of_file_managers_are_ignored_silently(tmp_path):
    write(
        tmp_path,
        "train/a",
        "train/b",
        "train/.hidden",
        "train/__MACOSX",
        "train/a/.ipynb_checkpoints",
        "train/a/@eaDir",
        "train/System Volume Information",
    )
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (tmp_path / "train" / "a" / name).write_bytes(b"?")
    images = opened(tmp_path)
    assert images.train.class_names == ["a", "b"] and len(images.train) == 6 and not images.unused


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("val", ["val", "VAL", "valid", "Validation", None])
@pytest.mark.parametrize("test", ["test", "testing", None])
def test_own_splits_are_used_under_any_usual_name(train, val, test, tmp_path):
    write(tmp_path, f"{train}/a", f"{train}/b", images=10)
    for split, count in ((val, 2), (test, 4)):
        if split is not None:
            write(tmp_path, f"{split}/a", f"{split}/b", images=count)
    images = opened(tmp_path)
    assert (len(images.train), images.val and len(images.val), images.test and len(images.test)) == (
        20, 4 if val else None, 8 if test else None,
    )  # fmt: skip
    data = load_task(FolderTask(name="mine", title="Mine", path=str(tmp_path)), root=Path())
    assert len(data.train) + len(data.val) + len(data.test) == 20 + 4 * bool(val) + 8 * bool(test)


def test_a_plain_folder_of_classes(tmp_path):
    write(tmp_path, "train", "bus", "car")  # a class may be called train
    images = opened(tmp_path)
    assert images.train.class_names == ["bus", "car", "train"] and images.test is None and images.val is None
    data = load_task(FolderTask(name="mine", title="Mine", path=str(tmp_path), test_fraction=0.5), root=Path())
    assert len(data.train) + len(data.val) + len(data.test) == 9 and len(data.test) >= 1


@pytest.mark.parametrize(
    "places, words",
    [
        (["test/a", "test/b"], "no train folder"),
        (["train", "test"], "no train folder with class folders.*source: csv"),
        (["a/train", "a/test", "b/train", "b/test"], "train folders are inside the class folders; expected .*/train"),
        (["train/train/a", "train/train/b", "val/a"], "train: the class folders are in 'train' within it: move"),
        (["train/a", "train/b", "test/Test/a"], "test: the class folders are in 'Test' within it: move them up"),
        (["one/train/a", "one/train/b", "two/train/a"], "the train folder is in 'one' within it: add that"),
        (["train/a", "train/b", "val/a", "validation/a"], "'val' and 'validation' are both for val: keep one"),
        (["train/a", "train/b", "test/c"], "class 'c' is not among the 2 classes .*add training images"),
        (["train/a", "train/b", "val/c"], "class 'c' is not among"),
        ([], "no class folders"),
    ],
)
def test_ambiguous_or_invalid_layouts_are_refused(places, words, tmp_path):
    write(tmp_path, *places)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        opened(tmp_path)


def test_an_empty_class_folder_is_absent_in_test_and_named_in_train(tmp_path):
    write(tmp_path, "train/a", "train/b", "test/a")
    for name in ("test/b", "test/never", "val"):
        (tmp_path / name).mkdir()
    images = opened(tmp_path)
    assert images.test.labels.tolist() == [0, 0, 0] and images.val is None
    for name in ("val/a", "val/b"):
        (tmp_path / name).mkdir()
    assert opened(tmp_path).val is None
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="no images of class 'c'; found: nothing"):
        opened(tmp_path)
    (tmp_path / "train" / "c" / "a.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"no images of class 'c'; found: 1 \.svg file"):
        opened(tmp_path)


NAMES = ["café", "Ångström", "한국", "nino\u0303"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["NFD", "NFC"])
def test_a_class_in_another_unicode_form_is_the_same_class(name, form, tmp_path):
    other = {"NFD": "NFC", "NFC": "NFD"}[form]
    here, there = unicodedata.normalize(form, name), unicodedata.normalize(other, name)
    write(tmp_path, f"train/{here}", "train/b", f"test/{there}")
    images = opened(tmp_path)
    label = images.train.class_names.index(unicodedata.normalize("NFC", name))
    assert images.test.labels.tolist() == [label] * 3
    write(tmp_path, f"train/{there}")  # a file system may store both forms
    assert len(opened(tmp_path).train.class_names) == 2 and len(opened(tmp_path).train) == 9


@pytest.mark.parametrize("near", ["Cat", "CAT", "cat ", " cat", "cat.", "ca\u200bt", "\ufeffcat", "cat\u00ad"])
def test_a_class_name_that_looks_like_another_one_is_refused_or_reported(near, tmp_path):
    write(tmp_path, "train/cat", "train/dog", f"test/{near}")
    with pytest.raises(
        ValueError, match=rf"class {re.escape(repr(near))} .*differs from 'cat' only in case, .*: rename it"
    ) as error:
        opened(tmp_path)
    assert "remove" not in str(error.value)
    write(tmp_path, f"train/{near}")
    assert f"{near!r}" in report(opened(tmp_path)) and "rename one" in report(opened(tmp_path))


def test_links_are_followed_without_cycles(tmp_path):
    write(tmp_path, "elsewhere/a", "data/train/b")
    (tmp_path / "data/train/a").symlink_to(tmp_path / "elsewhere/a")
    (tmp_path / "data/train/b/up").symlink_to(tmp_path / "data/train")
    (tmp_path / "data/train/b/self").symlink_to(tmp_path / "data/train/b")
    images = opened(tmp_path / "data")
    assert images.train.class_names == ["a", "b"]
    assert len(images.train) < 20 and "link" in report(images)


def test_opening_a_folder_reads_no_metadata_of_images(tmp_path, monkeypatch):
    write(tmp_path, "train/a", "train/b", "test/a", images=20)
    paths = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **keys: paths.append(str(path)) or stat(path, **keys))
    opened(tmp_path)
    assert not [path for path in paths if path.endswith(".png")]


def test_a_task_is_named_after_the_folder_as_written_also_if_that_is_a_link(tmp_path):
    write(tmp_path / "birds", "a", "b")
    (tmp_path / "mine").symlink_to(tmp_path / "birds")
    for written in (tmp_path / "mine", tmp_path / "birds"):
        entry = f"{written}/"
        (name,) = Config(tasks=[entry]).task_names()
        spec = load_spec(entry)
        assert load_task(spec, root=tmp_path).name == spec.name == name == written.name
        assert Path(spec.path) == tmp_path / "birds"


def test_folders_that_give_one_name_are_named_in_the_error(tmp_path):
    with pytest.raises(ConfigError, match="each task once: photos/дом/ and photos/кот/ have the name images, rename"):
        Config(tasks=["photos/дом/", "photos/кот/"])


def test_names_that_are_not_utf8(tmp_path):
    """An image may have such a name. A class may not, because a run's files hold the names of the classes."""
    write(tmp_path, "a", "b", images=20)
    os.rename(os.fsencode(tmp_path / "a" / "0.png"), os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    data = load_task(FolderTask(name="mine", title="Mine", path=str(tmp_path)), root=tmp_path)
    counted = [f"{len(split)} images, " for split in (data.train, data.val, data.test)]
    assert [
        split.digest()[: len(c)] for split, c in zip((data.train, data.val, data.test), counted, strict=True)
    ] == counted
    os.rename(os.fsencode(tmp_path / "b"), os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"the class 'caf\\udce9' is not UTF-8 text.*rename"):
        load_task(FolderTask(name="mine", title="Mine", path=str(tmp_path)), root=tmp_path)
