"""Test moe-bsr predict: class names for images and folders of images, and unreadable files."""

import json

import pytest
import torch
from PIL import Image
from tiny_names import AWKWARD
from tiny_runs import TASKS

import moe_bsr
from moe_bsr.cli.main import main
from moe_bsr.cli.predict import print_report
from moe_bsr.runtime.names import printable


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Write three images of different sizes, one of them in a subfolder."""
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / "a.png", tmp_path / "b.PNG", tmp_path / "inner" / "c.png"]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (30 + i, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return list(map(str, paths))


def test_predictions_are_those_of_the_full_forward_pass(tiny_run, images, capsys):
    assert main(["predict", str(tiny_run), *images, "--json", "--top", "11"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in report["images"]] == images
    loaded = moe_bsr.load(tiny_run)
    batch = torch.stack([loaded.transforms.eval_image(Image.open(path)) for path in images])
    for task, (classes, _) in TASKS.items():
        with torch.inference_mode():
            whole = loaded.models[task](loaded.transforms.normalize(batch), task).logits.softmax(1)
        for row, image in zip(whole, report["images"], strict=True):
            best = row.argsort(descending=True)[:11].tolist()
            assert [n["name"] for n in image["tasks"][task]] == [loaded.class_names[task][i] for i in best]
            assert len(best) == min(11, classes)
            assert [n["probability"] for n in image["tasks"][task]] == pytest.approx(row[best].tolist(), abs=1e-6)


def test_a_folder_means_all_images_in_it_and_its_subfolders(tiny_run, images, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    assert main(["predict", str(tiny_run), str(tmp_path), "--task", "shapes"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in images] == images and "fractals" not in printed
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tiny_run), str(tmp_path / "empty")]) == 2
    assert "empty: no images below it" in capsys.readouterr().err


def test_the_output_says_which_blocks_ran_once_for_all_tasks(tiny_run, images, capsys):
    assert main(["predict", str(tiny_run), images[0]]) == 0
    assert "2 tasks: 3 of 6 blocks ran once for all of them, 3 once for each task" in capsys.readouterr().out
    assert main(["predict", str(tiny_run), images[0], "--task", "shapes"]) == 0
    assert "ran once" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "bad.png: no such file"),
        (b"", "bad.png: not a readable image"),
        (b"no image", "bad.png: not a readable image"),
    ],
)
def test_an_unreadable_image_is_named_and_the_others_are_predicted(tiny_run, images, tmp_path, capsys, content, words):
    good, bad = images[0], tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    assert main(["predict", str(tiny_run), good, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    for paths, expected in (([bad, good], alone), ([bad], alone | {"images": []})):
        assert main(["predict", str(tiny_run), *map(str, paths), "--json"]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and len(captured.err.splitlines()) == 1
        report = json.loads(captured.out)
        assert [skipped["image"] for skipped in report["skipped"]] == [str(bad)]
        assert report | {"skipped": []} == expected
    assert main(["predict", str(tiny_run), str(bad)]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_control_characters_in_names_are_escaped(name, capsys):
    answer = {"image": f"photos/{name}.jpg", "tasks": {"pets": [{"name": name, "probability": 0.9}]}}
    print_report({"images": [answer], "groups": []})
    assert capsys.readouterr().out == f"photos/{printable(name)}.jpg\n  pets  {printable(name)} 90 %\n\n"


def test_control_characters_in_error_messages_are_escaped(tiny_run, tmp_path, capsys):
    assert main(["predict", str(tiny_run), str(tmp_path / "\x1b]0;x\x07\u202e.png")]) == 1
    (tmp_path / "a\x1b[2J\nb").mkdir()
    assert main(["predict", str(tiny_run), str(tmp_path / "a\x1b[2J\nb")]) == 2
    assert main(["evaluate", str(tmp_path / "a\x1b[2J\nb")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and r"\x1b]0;x\x07\u202e.png: no such file" in lines[0]
    assert all(r"a\x1b[2J b" in line for line in lines[1:])  # one line per error, even if a name contains a line break
