"""Test the record of a run's images: changes are reported, and none of them alters the run's splits."""

import gzip
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_data import save
from tiny_runs import make_config, replace_task

import moe_bsr
from moe_bsr import api
from moe_bsr.api import evaluate
from moe_bsr.cli.main import main
from moe_bsr.config import Config, ConfigError
from moe_bsr.data import UnreadableImage, load_spec, load_task
from moe_bsr.runs import checkpoint, data_record
from moe_bsr.runs import folder as run_folder
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.folder import open_tasks

pytestmark = pytest.mark.usefixtures("bare")
CLASSES = ("ant", "bee", "cat")


def config_of(folder: Path) -> Config:
    plan = {"plan__train_blocks": [5], "plan__drop_blocks": [], "plan__moe_blocks": []}
    config = make_config(folder, train__steps=4, train__checkpoint_every=2, train__eval_every=2, **plan)
    return replace_task(config, "bugs")


def train(config: Config, folder: Path, resume: bool = False) -> dict:
    return api.train(config, folder, resume, callbacks=[])


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Return a folder to copy, with data and a run whose last checkpoint is at the second of four updates."""
    root = tmp_path_factory.mktemp("template")
    for k, kind in enumerate(CLASSES):
        for n in range(14):
            split = "train" if n < 12 else "test"
            save(root / "data/bugs" / split / kind / f"{n:02d}.png", 100 * k + n)
    (root / "tasks").mkdir()
    (root / "tasks/bugs.yaml").write_text("title: Bugs\nsource: folder\npath: bugs\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(config_of(root), root / "run")
    (root / "run/report.json").unlink()
    shutil.rmtree(root / "run/checkpoint/4")
    return root


@pytest.fixture
def cwd(template, tmp_path, monkeypatch) -> Path:
    """Change to a working directory with data/bugs (36 training and 6 test images) and tasks/bugs.yaml."""
    for name in ("data", "tasks"):
        shutil.copytree(template / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(cwd) -> Config:
    return config_of(cwd)


@pytest.fixture
def stopped(template, cwd) -> Path:
    """Copy the run into this test's folder. It was stopped after the second of four updates."""
    shutil.copytree(template / "run", cwd / "run")
    file = cwd / "run/config.yaml"
    before = file.read_text()
    assert before.count(str(template)) == 1  # the data root
    file.write_text(before.replace(str(template), str(cwd)))
    return cwd / "run"


def names_in(data, split):
    part = getattr(data, split)
    return [part.source.names[i] for i in part.index]


def first_of(split: str) -> Path:
    """Return the file of the first image of a split."""
    data = load_task(load_spec("bugs"), root=Path("data"))
    return Path("data/bugs/train") / names_in(data, split)[0]


def recolor(path: Path) -> None:
    Image.fromarray(np.full((10, 12, 3), 77, np.uint8)).save(path)


def exchange_classes(split: str) -> None:
    folder = Path("data/bugs/train")
    for old, new in (("ant", "x"), ("bee", "ant"), ("x", "bee")):
        (folder / old).rename(folder / new)


CHANGES = {
    "gone": lambda split: first_of(split).unlink(),
    "renamed": lambda split: first_of(split).rename(first_of(split).with_name("zz.png")),
    "contents": lambda split: recolor(first_of(split)),
    "classes exchanged": exchange_classes,
    "test image in its place": lambda split: shutil.copy("data/bugs/test/cat/13.png", first_of(split)),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_prevents_resume_and_is_named(config, stopped, change, split):
    name = f"{first_of(split).parent.name}/{first_of(split).name}"
    CHANGES[change](split)
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="cannot resume .* images of task bugs changed") as error:
        train(config, stopped, resume=True)
    assert change == "classes exchanged" or (name in str(error.value) and split in str(error.value))
    assert (stopped / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("change", ["gone", "contents", "classes exchanged"])
def test_changed_validation_images_prevent_validation_but_not_testing(stopped, change):
    CHANGES[change]("val")
    with pytest.raises(ConfigError, match="val images of task bugs are not those of the run"):
        evaluate(stopped, "val")
    assert evaluate(stopped, "test")["data_changes"] == {}


def test_added_images_change_neither_the_training_nor_the_validation_split(config, stopped, capsys):
    whole = train(config, stopped.parent / "whole")
    shutil.copytree(stopped, stopped.parent / "untouched")
    before = evaluate(stopped)
    for n in range(30):
        save(Path(f"data/bugs/train/ant/0{n}_new.png"), n)
    after = evaluate(stopped)
    assert after["tasks"]["bugs"]["loss"] == before["tasks"]["bugs"]["loss"]
    assert "new" in after["data_changes"]["bugs"] and before["data_changes"] == {}
    tasks, notes = open_tasks(config, stopped, resume=True)
    assert any("train images changed" in note and "_new.png" in note and "not used" in note for note in notes)
    assert names_in(tasks["bugs"], "train") == names_in(moe_bsr.load(stopped).data("bugs"), "train")
    resumed = train(config, stopped, resume=True)
    assert resumed["tasks"]["bugs"]["loss"] == whole["tasks"]["bugs"]["loss"]
    held = [checkpoint.read(folder / "checkpoint/4")[0]["weights"] for folder in (stopped, stopped.parent / "whole")]
    assert all((held[0][key] == held[1][key]).all() for key in held[1])


def test_a_readable_copy_in_place_of_a_broken_image_is_accepted(config, cwd):
    for split in ("train", "val"):
        name = first_of(split)
        name.write_bytes(b"broken")
        with pytest.raises(UnreadableImage, match="put a readable copy in its place"):
            train(config, cwd / split)
        recolor(name)
        report = train(config, cwd / split, resume=True)
        assert report["status"] == "finished" and not report["tasks"]["bugs"].get("skipped", {}).get(split)


def test_a_run_stopped_by_a_broken_image_resumes_without_it(config, cwd):
    """The other images keep their positions, so the rest of the run is unaffected by the removal."""
    name = first_of("train")
    name.write_bytes(b"broken")
    config = moe_bsr.config.replace(config, train__eval_every=None)
    with pytest.raises(UnreadableImage, match="put a readable copy in its place, or .* data.unreadable=skip"):
        train(config, cwd / "broken")
    shutil.copytree(cwd / "broken", cwd / "removed")
    skip = moe_bsr.config.replace(config, data__unreadable="skip")
    with pytest.warns(UserWarning, match="it is skipped"):
        train(skip, cwd / "whole")
    whole = checkpoint.read(cwd / "whole/checkpoint/4")[0]["weights"]
    for how in ("broken", "removed"):
        if how == "removed":
            name.unlink()
        with pytest.warns(UserWarning, match="it is skipped"):
            report = train(skip, cwd / how, resume=True)
        assert report["status"] == "finished" and report["step"] == 4
        assert len(report["tasks"]["bugs"]["skipped"]["train"]) == 1
        assert "Images skipped because they could not be read: bugs 1 of train" in (cwd / how / "report.md").read_text()
        weights = checkpoint.read(cwd / how / "checkpoint/4")[0]["weights"]
        assert all((weights[key] == whole[key]).all() for key in whole)


@pytest.mark.parametrize("change", ["gone", "added", "contents"])
def test_changed_test_images_are_reported_and_prevent_nothing(config, stopped, change, capsys):
    file = Path("data/bugs/test/bee/12.png")
    match change:
        case "gone":
            file.unlink()
        case "added":
            save(file.with_name("more.png"), 1)
        case "contents":
            recolor(file)
    _, notes = open_tasks(config, stopped, resume=True)
    assert any("the test images changed" in note for note in notes)
    if change == "contents":
        assert train(config, stopped, resume=True)["status"] == "finished"
    result = evaluate(stopped, "test")
    assert result["tasks"]["bugs"]["n"] == {"gone": 5, "added": 7, "contents": 6}[change]
    assert ("more.png" if change == "added" else "bee/12.png") in result["data_changes"]["bugs"]
    assert main(["evaluate", str(stopped), "--split", "test"]) == 0
    assert "these images changed since the run began" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("flip", False), ("crop_scale", [0.5, 0.6])])
def test_a_changed_key_of_a_task_file_prevents_resume(config, stopped, key, value):
    file = Path("tasks/bugs.yaml")
    file.write_text(file.read_text() + f"{key}: {json.dumps(value)}\n")
    with pytest.raises(ConfigError, match=rf"in the file of task bugs {key} was .*, now"):
        train(config, stopped, resume=True)
    file.write_text(file.read_text().replace("title: Bugs", "title: Insects").split(key)[0])
    assert train(config, stopped, resume=True)["status"] == "finished"


def test_evaluation_uses_the_recorded_task_specification_from_any_directory(stopped, tmp_path_factory, monkeypatch):
    expected = evaluate(stopped)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (stopped.parent / "tasks/bugs.yaml").write_text("title: Bugs\nsource: folder\npath: nowhere\n")
    found = evaluate(stopped)
    assert found["tasks"]["bugs"]["loss"] == expected["tasks"]["bugs"]["loss"]
    moved = tmp_path_factory.mktemp("disk")
    shutil.move(stopped.parent / "data", moved / "data")
    with pytest.raises((ConfigError, FileNotFoundError), match="data"):
        evaluate(stopped)
    again = evaluate(stopped, data_root=str(moved / "data"))
    assert again["tasks"]["bugs"]["loss"] == expected["tasks"]["bugs"]["loss"]


def test_data_before_the_first_checkpoint_may_change(config, cwd):
    run = cwd / "early"
    open_tasks(config, run)
    run.mkdir()
    first_of("train").unlink()
    assert train(config, run, resume=True)["status"] == "finished"


def test_a_lost_or_altered_image_record_is_not_trusted(stopped):
    file = stopped / "images/bugs.json.gz"
    data = moe_bsr.load(stopped).data("bugs")
    listed = json.loads(gzip.decompress(file.read_bytes()))
    assert listed["train"]["names"] == names_in(data, "train") and len(listed["test"]["names"]) == 6
    assert listed["val"]["sizes"] == [os.stat(f"data/bugs/train/{name}").st_size for name in names_in(data, "val")]
    file.write_bytes(file.read_bytes()[:50])
    assert evaluate(stopped)["data_changes"] == {}  # nothing has changed, so the list is not read
    save(Path("data/bugs/train/ant/0_new.png"), 1)
    listed["val"]["names"], listed["train"]["names"] = listed["train"]["names"], listed["val"]["names"]
    for content in (None, b"", gzip.compress(json.dumps(listed).encode()), gzip.compress(b"[]")):
        file.unlink() if content is None else file.write_bytes(content)
        tasks = moe_bsr.load(stopped)
        changed = data_record.follow(stopped, load_task(load_spec("bugs"), root=Path("data")), tasks.recorded["bugs"])
        assert changed[1]["train"].other and changed[1]["train"].lost("skip")


def test_changed_classes_are_named(config, stopped):
    Path("data/bugs/train/cat").rename("data/bugs/train/cow")
    Path("data/bugs/test/cat").rename("data/bugs/test/cow")
    for attempt in (lambda: train(config, stopped, resume=True), lambda: evaluate(stopped, "test")):
        with pytest.raises(ConfigError, match="'cat' is gone, 'cow' is new"):
            attempt()


@pytest.fixture
def set_aside(config, cwd) -> Path:
    """Return a finished run whose test split was set aside from the data: they have no test folder."""
    shutil.rmtree("data/bugs/test")
    train(config, cwd / "set_aside")
    return cwd / "set_aside"


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"broken")], ids=["gone", "broken"])
def test_a_lost_image_of_a_set_aside_test_split_is_left_out_when_asked(set_aside, capsys, damage):
    name = first_of("test")
    damage(name)
    assert main(["evaluate", str(set_aside), "--split", "test"]) == 2
    told = capsys.readouterr().err
    assert name.name in told and "--skip-unreadable" in told and "--resume" not in told
    assert run_folder.test_evaluations(set_aside) == 1
    with pytest.warns(UserWarning, match="it is skipped"):
        assert main(["evaluate", str(set_aside), "--split", "test", "--skip-unreadable", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    images = read_config(set_aside)[1]["tasks"]["bugs"]["splits"]["test"]["images"]
    assert found["tasks"]["bugs"]["n"] == images - 1 and name.name in found["data_changes"]["bugs"]
    assert run_folder.test_evaluations(set_aside) == 2


def test_a_missing_validation_image_is_left_out_when_asked_and_an_altered_one_never_is(stopped):
    name, content = first_of("val"), first_of("val").read_bytes()
    whole = evaluate(stopped)["tasks"]["bugs"]["n"]
    name.unlink()
    with pytest.raises(ConfigError, match="skip_unreadable=True"):
        evaluate(stopped)
    with pytest.warns(UserWarning, match="it is skipped"):
        found = evaluate(stopped, skip_unreadable=True)
    assert found["tasks"]["bugs"]["n"] == whole - 1 and name.name in found["data_changes"]["bugs"]
    name.write_bytes(content[:-20])
    with pytest.raises(ConfigError, match="are not those of the run") as refusal:
        evaluate(stopped, skip_unreadable=True)
    assert "skip_unreadable" not in str(refusal.value)


@pytest.mark.parametrize("form", ["NFD", "NFC"])
def test_the_unicode_form_of_names_may_change(config, cwd, form):
    """Disks of macOS and of other systems store the same name in other bytes."""
    other = {"NFD": "NFC", "NFC": "NFD"}[form]
    for file in sorted(Path("data/bugs").rglob("*.png")):
        file.rename(file.with_name(unicodedata.normalize(other, f"\u00e4{file.name}")))
    first = moe_bsr.config.replace(config, train__steps=2)
    train(first, cwd / "run")
    before = {split: evaluate(cwd / "run", split)["tasks"]["bugs"]["loss"] for split in ("val", "test")}
    for file in sorted(Path("data/bugs").rglob("*.png")):
        file.rename(file.with_name(unicodedata.normalize(form, file.name)))
    for split, loss in before.items():
        found = evaluate(cwd / "run", split)
        assert found["data_changes"] == {} and found["tasks"]["bugs"]["loss"] == pytest.approx(loss)
    assert train(config, cwd / "run", resume=True)["step"] == 4
