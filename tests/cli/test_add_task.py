"""Test the command line of moe-bsr add-task, remove-task, share and tasks RUN."""

import json
import shutil

import pytest
import torch
from tiny_runs import TASK

import moe_bsr
from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import main

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def petals(tmp_path) -> str:
    file = tmp_path / "petals.yaml"
    file.write_text(TASK.format("petals", 24, 60))
    return str(file)


def test_a_task_is_added_listed_shared_and_removed(tiny_run, petals, tmp_path, capsys):
    out, left, given = (str(tmp_path / name) for name in ("more", "left", "given.zip"))
    assert main(["add-task", str(tiny_run), petals, "--out", out, "train.pictures=false"]) == 0
    text = capsys.readouterr().out
    assert (
        "only these tasks' own parameters train: petals (head 6.2 kB, routers 2.0 kB)" in text and "| petals |" in text
    )
    router = moe_bsr.load(out).models["petals"].vit.blocks[3].mlp.router.weight
    assert torch.equal(router["petals"], torch.stack([router["shapes"], router["fractals"]]).mean(0))
    assert main(["add-task", str(tiny_run), petals, "--out", out]) == 2
    assert f"{out} holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert main(["tasks", out]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "classes", "train/val/test", "added", "data", "val", "%", "test", "%"]
    assert [row.split()[0] for row in rows] == ["shapes", "fractals", "petals"] and "51/9/24" in rows[2]
    assert main(["share", out, "--out", given, "--with-backbone", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == given and result["files"]["model.safetensors"] > 10_000
    assert main(["evaluate", given, "--json"]) == 0
    capsys.readouterr()
    assert main(["remove-task", given, "shapes", "fractals", "--out", left, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == ["petals"]
    assert list(moe_bsr.load(left).models) == ["petals"]


def test_outputs_are_written_beside_the_run_by_default(tiny_run, petals, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").symlink_to(tiny_run)
    assert main(["add-task", str(tmp_path / "here"), petals, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"run folder {tmp_path / 'here_petals'}" in text and "petals: 24 classes, train 51, val 9, test 24" in text
    assert main(["remove-task", str(tmp_path / "here"), "shapes"]) == 0
    assert (tmp_path / "here_without_shapes/config.yaml").is_file()
    assert main(["share", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here.zip").is_file() and "predict" in capsys.readouterr().out
    assert run_arguments.beside(tmp_path / "here.zip", "_petals") == tmp_path / "here_petals"


@pytest.mark.parametrize("name", [".", "checkpoint/.."])
def test_the_current_folder_can_be_the_run(tiny_run, petals, tmp_path, capsys, monkeypatch, name):
    run = shutil.copytree(tiny_run, tmp_path / "here")
    monkeypatch.chdir(run)
    assert main(["share", name]) == 0 and (tmp_path / "here.zip").is_file()
    assert main(["remove-task", name, "shapes"]) == 0 and (tmp_path / "here_without_shapes/config.yaml").is_file()
    assert main(["add-task", name, petals, "--dry-run"]) == 0
    assert f"run folder {tmp_path / 'here_petals'}" in capsys.readouterr().out
    assert main(["probe", name, "--dry-run"]) == 0 and "run folder runs/here_probe" in capsys.readouterr().out


def test_add_task_accepts_a_configuration_of_one_task(tiny_run, petals, tmp_path, capsys):
    """add-task accepts the configuration that `moe-bsr init` writes, because users pass it here too."""
    config = tmp_path / "garden.yaml"
    config.write_text(f"tasks: [{petals}]\n")
    out = str(tmp_path / "out")
    assert main(["add-task", str(tiny_run), str(config), "--dry-run", "--out", out]) == 0
    assert "petals: 24 classes, train 51" in capsys.readouterr().out
    config.write_text(f"tasks: [{petals}, shapes]\n")
    assert main(["add-task", str(tiny_run), str(config), "--dry-run", "--out", out]) == 2
    assert f"garden.yaml is a configuration of several tasks: name one of {petals}, shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["share", "{run}", "--private"], "--private goes with --push"),
        (["share", "{run}", "--timm", "x"], "has the tasks shapes, fractals"),
        (["share", "{run}", "--timm", "x", "--task", "shapes"], r"blocks [3, 5] have experts"),
        (["share", "{run}", "--timm", "x", "--out", "y"], "leave out --out"),
        (["add-task", "{run}", "shapes"], "has a task shapes already"),
        (["add-task", "nowhere", "pets"], "nowhere is not a run folder"),
        (["remove-task", "{run}", "pets"], "no task 'pets'"),
        (["tasks", "nowhere"], "nowhere is not a run folder: it does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=tiny_run) for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not list(tmp_path.iterdir())
