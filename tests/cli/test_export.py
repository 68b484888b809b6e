"""Test the command line of moe-bsr export."""

import json
from pathlib import Path

import pytest
from tiny_runs import TASKS, make_config

import moe_bsr
from moe_bsr.cli import export as command
from moe_bsr.cli.export import print_result
from moe_bsr.cli.main import main

pytest.importorskip("onnx", reason="the extra export")
pytest.importorskip("onnxruntime", reason="the extra export")


@pytest.fixture(scope="module")
def run(tmp_path_factory, bare) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    moe_bsr.train(make_config(folder, train__steps=4), folder / "run", callbacks=[])
    return folder / "run"


def test_stdout_has_only_the_json_and_the_table_agrees_with_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--out", str(out), "--int8", "--experts", "2", "--images", "5", "--json"]
    assert main(["export", str(run), *options]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["bundle"] == str(out) and "fractals: comparing with the run" in captured.err
    assert all(report["tasks"][task]["n"] == 5 for task in TASKS)
    print_result(report)
    text = capsys.readouterr().out
    assert all(f"\n{task} " in "\n" + text for task in TASKS) and f"{out}/predict.py --check" in text
    assert "with all experts %" in text and "float32 %" in text and "int8, step 4" in text


def test_tasks_are_chosen_by_name(run, capsys):
    assert main(["export", str(run), "--task", "shape"]) == 2
    assert "did you mean shapes" in capsys.readouterr().err


def test_a_format_that_cannot_be_written_is_refused_with_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda module: None)
    assert main(["export", str(run), "--format", "executorch"]) == 2
    error = capsys.readouterr().err
    assert "--format executorch: " in error and "pip install executorch" in error


def test_another_device_is_refused(run, capsys):
    assert main(["export", str(run), "--device", "cuda"]) == 2
    assert "--device cuda: a run is exported on the CPU" in capsys.readouterr().err
