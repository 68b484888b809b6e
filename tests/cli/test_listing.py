"""Test moe-bsr tasks, configs and copy on local and packaged files."""

import json

import pytest

from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError, load, packaged, to_dict

OWN_TASK = "title: Mine\nsource: folder\npath: mine\nclasses: 3\nlicense: none\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty directory, so that every file found is packaged or written by the test."""
    monkeypatch.chdir(tmp_path)


def test_packaged_files_are_found_by_name_by_file_name_and_by_path():
    file = packaged.folder("configs") / "quickstart.yaml"
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert packaged.find("configs", name) == file
    for name in ("other/quickstart.yaml", "quickstart.yml", "/configs/quickstart.yaml", "nothing", ""):
        assert packaged.find("configs", name) is None
    assert packaged.find("tasks", "pets") == packaged.folder("tasks") / "pets.yaml"


def test_a_local_file_takes_precedence_over_the_packaged_one(tmp_path):
    name = "configs/quickstart.yaml"
    assert load(name) == load(packaged.folder("configs") / "quickstart.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / name).write_text("seed: 3\n")
    assert load(name).seed == 3
    with pytest.raises(ConfigError, match="no configuration file configs/quickstrt.yaml"):
        load("configs/quickstrt.yaml")
    with pytest.raises(ConfigError, match="too long"):
        load("x" * 300)


def test_local_tasks_come_first_and_hide_packaged_tasks_of_the_same_name(tmp_path, capsys):
    assert main(["tasks", "--json"]) == 0
    tasks = {task["name"]: task for task in json.loads(capsys.readouterr().out)}
    assert tasks.keys() == set(packaged.names("tasks"))
    assert tasks["pets"]["classes"] == 37 and tasks["pets"]["source"] == "torchvision"
    assert tasks["pets"]["license"].startswith("CC BY-SA") and tasks["pets"]["file"] == "packaged"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pets.yaml").write_text(OWN_TASK)
    assert main(["tasks"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "classes", "source", "file", "license"]
    assert first.split() == ["pets", "3", "folder", "tasks/pets.yaml", "none"]


def test_a_task_file_that_cannot_be_used_is_named_and_the_others_listed(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "broken.yaml").write_text("titel: x\nsource: folder\npath: x\n")
    assert main(["tasks"]) == 1
    captured = capsys.readouterr()
    assert "tasks/broken.yaml" in captured.err and "did you mean 'title'" in captured.err and "pets" in captured.out


def test_configurations_are_listed_with_their_descriptions(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("# moe-bsr train configs/mine.yaml\n# My own. More.\nseed: 1\n")
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.partition("  ")[2].strip() for line in lines if line[0] != " "}
    assert listed.keys() == {"mine", *packaged.names("configs")} and listed["mine"] == "My own"
    assert all(listed.values()) and listed["quickstart"].startswith("Five generated tasks")


@pytest.mark.parametrize("name", packaged.names("configs"))
def test_a_copied_configuration_equals_the_packaged_one(name, tmp_path, capsys):
    assert main(["copy", name]) == 0
    assert f"written: {name}.yaml" in capsys.readouterr().out
    assert to_dict(load(tmp_path / f"{name}.yaml")) == to_dict(load(packaged.find("configs", name)))


def test_copy_also_writes_the_configuration_that_the_copy_extends(tmp_path, capsys):
    assert main(["copy", "configs/quickstart_last.yaml", "inner/mine.yaml"]) == 0
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["mine.yaml", "quickstart.yaml"]
    assert "train inner/mine.yaml" in capsys.readouterr().out
    assert load("inner/mine.yaml").plan.train_blocks == []


def test_a_copy_does_not_take_the_place_of_what_it_extends(tmp_path, capsys):
    for force in ([], ["--force"]):
        assert main(["copy", "quickstart_low_rank", "quickstart.yaml", *force]) == 2
        assert "quickstart_low_rank.yaml extends quickstart.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_copied_task_equals_the_packaged_one(tmp_path, capsys):
    assert main(["copy", "pets", "tasks"]) == 0
    assert (tmp_path / "tasks" / "pets.yaml").read_text() == packaged.find("tasks", "pets").read_text()
    assert main(["copy", "food101"]) == 0
    assert "tasks=[food101.yaml]" in capsys.readouterr().out


def test_files_that_are_there_are_kept_unless_forced(tmp_path, capsys):
    (tmp_path / "quickstart.yaml").write_text("seed: 1\n")
    assert main(["copy", "quickstart_last"]) == 2
    assert "quickstart.yaml: there already; --force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]
    assert load("quickstart.yaml").seed == 1
    assert main(["copy", "quickstart_last", "--force"]) == 0
    assert load("quickstart_last.yaml").seed == 0


def test_an_unknown_name_is_refused_with_the_nearest(capsys):
    assert main(["copy", "quickstrat"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err
    assert main(["copy", "a/b/c"]) == 2
