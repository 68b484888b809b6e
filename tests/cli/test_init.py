"""Test moe-bsr init on typical image folders: its files can be trained, and it reports what it cannot use."""

from pathlib import Path

import pytest
from PIL import Image

from moe_bsr.cli.fit import configuration
from moe_bsr.cli.main import main
from moe_bsr.config import load, packaged
from moe_bsr.data import load_spec, load_task

pytestmark = pytest.mark.usefixtures("bare")


def write(folder: Path, *counts: int, names: str = "abcdefgh") -> None:
    """Write class folders with the given numbers of images, each image of one color."""
    for kind, count in zip(names, counts, strict=False):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (20 * len(str(folder)) % 256, 9 * i, 200)).save(folder / kind / f"{i}.png")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def sizes(name: str) -> tuple[int, int, int]:
    data = load_task(load_spec(name), root=Path("data"))
    return len(data.class_names), len(data.train) + len(data.val), len(data.test)


def test_a_folder_of_datasets_of_every_kind_can_be_trained(tmp_path, here, capsys):
    photos = tmp_path / "my photos"
    write(photos / "whole" / "train", 6, 5)
    write(photos / "whole" / "test", 2, 3)
    write(photos / "no test" / "train", 40, 40, 40)
    write(photos / "no test" / "Validation", 1, 2)
    write(photos / "classes", 10, 5, 4)
    (photos / "empty").mkdir()
    assert main(["init", str(photos), "--test-fraction", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert sizes("tasks/whole.yaml") == (2, 11, 5)
    classes, rest, test = sizes("tasks/no_test.yaml")
    assert classes == 3 and rest + test == 123 and 20 <= test <= 52
    classes, rest, test = sizes("tasks/classes.yaml")
    assert classes == 3 and rest + test == 19 and test >= 1
    assert "test_fraction" not in Path("tasks/whole.yaml").read_text()
    assert "test_fraction: 0.3" in Path("tasks/classes.yaml").read_text()
    for words in ("whole: 2 classes, ", " and 5 test images", "the data's own validation split: 3 images",
                  "are set aside", f"not used: {photos / 'empty'}: no class folders",
                  "train my_photos.yaml --dry-run"):  # fmt: skip
        assert words in printed, words
    assert not [path for path in here.rglob("*") if path.is_symlink()]
    assert load("my_photos.yaml").task_names() == ["classes", "no_test", "whole"]
    assert main(["train", "my_photos.yaml", "train.steps=3", "train.batch_size=4", "train.eval_every=null"]) == 0
    assert "| classes |" in capsys.readouterr().out and Path("runs/my_photos/report.json").is_file()


def test_a_single_dataset_becomes_one_task(tmp_path, here):
    write(tmp_path / "test" / "train", 4, 4)
    write(tmp_path / "test" / "test", 1, 1)
    assert main(["init", str(tmp_path / "test"), "--out", "inner"]) == 0
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*.yaml")) == [
        "inner/tasks/test.yaml",
        "inner/test.yaml",
    ]


def test_files_and_folders_that_cannot_be_used_are_reported(tmp_path, capsys):
    data = tmp_path / "data"
    write(data / "mixed", 3, 3)
    (data / "mixed" / "a" / "notes.txt").write_text("")
    write(data / "mixed" / "b" / "more", 2)
    Image.new("RGB", (5, 5)).save(data / "mixed" / "loose.png")
    write(data / "strange" / "train", 2, 2)
    write(data / "strange" / "test", 1, 1, 1)
    write(data / "single", 5)
    write(data / "hollow", 5, 5)
    (data / "hollow" / "c").mkdir()
    assert main(["init", str(data)]) == 0
    unused = [line for line in capsys.readouterr().out.splitlines() if "not used: " in line]
    for words in (
        "1 file that is not an image, such as a/notes.txt",
        "1 image outside of a class folder, such as loose.png",
        "strange/test: class 'c' is not among",
        "task single: 1 class, but at least two are needed",
        "no images of class 'c'; found: nothing",
    ):
        assert sum(words in line for line in unused) == 1, words
    assert len(unused) == 5 and load("data.yaml").task_names() == ["mixed"]
    assert sum(sizes("tasks/mixed.yaml")[1:]) == 8


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    write(tmp_path / "set", 5, 5)
    Path("set.yaml").write_text("mine")
    assert main(["init", str(tmp_path / "set")]) == 2
    assert "set.yaml: there already; --force" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["set.yaml"] and Path("set.yaml").read_text() == "mine"
    assert main(["init", str(tmp_path / "set"), "--force"]) == 0
    assert "fit set.yaml --minutes 10 " in capsys.readouterr().out
    assert load("set.yaml").task_names() == ["set"]


def test_overwriting_a_task_of_the_package_is_not_suggested(tmp_path, here, capsys, monkeypatch):
    """The current folder is a clone here, with the task cifar10."""
    monkeypatch.setattr(packaged, "PACKAGE", here / "moe_bsr")
    Path("tasks").mkdir()
    Path("tasks/cifar10.yaml").write_text("source: torchvision")
    write(tmp_path / "cifar10", 5, 5)
    assert main(["init", str(tmp_path / "cifar10")]) == 2
    error = capsys.readouterr().err
    assert "tasks/cifar10.yaml: there already, and this folder has the tasks of the package; --out FOLDER" in error
    assert "--force" not in error and error.count("\n") == 1
    assert main(["init", str(tmp_path / "cifar10"), "--out", "mine"]) == 0
    assert load("mine/cifar10.yaml").task_names() == ["cifar10"]


@pytest.mark.parametrize("fraction", ["0", "1", "-0.5"])
def test_invalid_folders_and_test_fractions_are_refused(tmp_path, capsys, fraction):
    assert main(["init", str(tmp_path / "nowhere")]) == 2
    assert main(["init", "."]) == 2
    write(tmp_path / "set", 5, 5)
    assert main(["init", str(tmp_path / "set"), f"--test-fraction={fraction}"]) == 2
    assert "above 0 and below 1" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_folders_with_letters_beyond_the_basic_plane_can_be_trained(tmp_path, here):
    write(tmp_path / "pic\U0001f600" / "birds", 10, 10)
    assert main(["init", str(tmp_path / "pic\U0001f600")]) == 0
    assert sizes("tasks/birds.yaml")[0] == 2 and load("pic.yaml").task_names() == ["birds"]
    config, _ = configuration([f"{tmp_path}/pic\U0001f600/birds/"])
    assert config.tasks == [f"{tmp_path}/pic\U0001f600/birds/"]
