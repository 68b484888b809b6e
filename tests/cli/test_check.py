"""Test moe-bsr check and train --dry-run --decode, which report all broken images at once."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_data import folder_task
from tiny_runs import make_config

from moe_bsr.cli.main import main
from moe_bsr.config import dump, replace

BROKEN = ["train/ant/3.png", "train/bee/0.png", "test/cat/1.png"]


@pytest.fixture
def task(tmp_path) -> Path:
    file = folder_task(tmp_path)
    (tmp_path / "pictures/train/ant/IMG_1.svg").write_text("<svg/>")
    return file


def test_readable_images_give_status_0(task, tmp_path, capsys):
    assert main(["check", str(task), "--root", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for words in (
        "pictures: 3 classes",
        "12 x 10 to 12 x 10 pixels",
        "1 .svg file",
        "all can be read",
        "in train as well",
    ):
        assert words in captured.out, words
    assert not captured.err  # stderr is no terminal, so there is no progress bar


@pytest.mark.parametrize("as_json", [False, True])
def test_all_broken_images_are_listed_at_once(task, tmp_path, capsys, as_json):
    for name in BROKEN:
        (tmp_path / "pictures" / name).write_bytes(b"")
    Image.new("L", (20, 20), 7).save(tmp_path / "pictures" / "train" / "cat" / "blank.png")
    assert main(["check", str(task), str(task), "--root", str(tmp_path), *(["--json"] if as_json else [])]) == 1
    text = capsys.readouterr().out
    if as_json:
        found = json.loads(text)
        assert len(found) == 2 and [image["image"] for image in found[0]["broken"]] == [
            name.split("/", 1)[1] for name in BROKEN
        ]
    else:
        assert all(text.count(f"{name}: not a readable image (it is empty)") == 2 for name in BROKEN)
        assert "3 cannot be read" in text and "1 of a single color" in text and "cat/blank.png" in text


def test_data_that_cannot_be_opened_gives_status_2(tmp_path, capsys):
    assert main(["check", "nothing", "--root", str(tmp_path)]) == 2
    (tmp_path / "mine.yaml").write_text("title: Mine\nsource: folder\npath: nowhere\n")
    assert main(["check", str(tmp_path / "mine.yaml"), "--root", str(tmp_path)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_dry_run_with_decode_reports_broken_images(task, tmp_path, capsys):
    config = replace(make_config(tmp_path), tasks=[str(task)], data__root=str(tmp_path))
    (tmp_path / "small.yaml").write_text(dump(config))
    call = ["train", str(tmp_path / "small.yaml"), "--run", str(tmp_path / "run"), "--decode"]
    assert main(call) == 2
    assert main([*call, "--dry-run"]) == 0
    for name in BROKEN:
        (tmp_path / "pictures" / name).write_bytes(b"")
    assert main([*call, "--dry-run"]) == 1
    text = capsys.readouterr().out
    assert all(name in text for name in BROKEN) and not (tmp_path / "run").exists()
