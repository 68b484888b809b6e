"""Test the report of a run, as JSON and as text."""

import re
import sys

import pytest
import torch
from tiny_names import AWKWARD
from tiny_runs import LATE, make_config

import moe_bsr
from moe_bsr import config as configuration
from moe_bsr.config import ConfigError
from moe_bsr.runs import report
from moe_bsr.runtime.device import Runtime, prepare
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.provenance import environment

pytestmark = pytest.mark.usefixtures("bare")

MEASURED = {
    "weights": "live",
    "train_seconds": 12.0,
    "predicted_peak_mb": 34.0,
    "measured_peak_mb": 56.0,
    "test_evaluations": 0,
    "gflops_per_image": 0.5,
}


def make(tmp_path, **changes) -> dict:
    config = make_config(tmp_path)
    progress = {name: {"updates": 1, "images": 8, "epochs": 0.5} for name in config.task_names()}
    values = {
        "config": config,
        "runtime": prepare(config.runtime),
        "status": "interrupted",
        "signal": 15,
        "scores": None,
        "split": "test",
        "progress": progress,
        "best": None,
        **MEASURED,
    }
    return report.make(**values | changes)


def test_a_report_has_configuration_environment_commit_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "/somewhere/bin/moe-bsr", "train", "my config.yaml"])
    config = make_config(tmp_path, **LATE, train__steps=2)
    moe_bsr.train(config, tmp_path / "run")
    written = report.read(tmp_path / "run")
    assert configuration.from_dict(written["config"]) == config
    about = written["environment"]
    assert about == environment(prepare(config.runtime))
    assert about["device"] == "cpu" and about["threads"] == 1 and about["precision_reason"] == "asked for"
    assert about["torch"] == torch.__version__ and about["processor"] and isinstance(about["cpu_flags"], list)
    assert written["commit"]
    assert written["command"] == "moe-bsr train 'my config.yaml'"


def test_a_single_task_report_has_configuration_environment_commit_and_command(tmp_path):
    config = make_config(tmp_path, **LATE, mode="single_task", train__steps=2)
    whole = moe_bsr.train(config, tmp_path / "run")
    assert configuration.from_dict(whole["config"]) == config
    part = report.read(tmp_path / "run" / "shapes")
    assert {key: whole[key] for key in ("environment", "commit", "command")} == {
        key: part[key] for key in ("environment", "commit", "command")
    }
    assert list(part["config"]["tasks"]) != list(whole["config"]["tasks"])


def test_the_text_says_what_each_peak_includes(tmp_path):
    known = make(tmp_path)
    text = report.markdown(known)
    assert "Predicted peak of a step's tensors: 34 MB" in text
    assert "peak memory of the process, with libraries and cached images: 56 MB" in text
    assert known["environment"]["processor"] in text and known["commit"] in text
    on_gpu = known | {"environment": known["environment"] | {"device": "cuda:0"}}
    assert "peak memory of CUDA's allocator: 56 MB" in report.markdown(on_gpu)
    assert "libraries" not in report.markdown(on_gpu)


def test_without_a_prediction_the_text_says_so(tmp_path):
    text = report.markdown(make(tmp_path, predicted_peak_mb=None))
    assert "nan" not in text and "No peak was predicted" in text and "56 MB" in text


@pytest.mark.parametrize("content", ["", '{"status": "fini', "[]", "{}", '{"tasks": []}'])
def test_a_damaged_report_is_refused_with_what_to_do(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=r"report\.json: cut or damaged: .*resume=True"):
        report.read(tmp_path)


def test_the_processor_of_a_gpu_run_is_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert environment(Runtime(torch.device("cuda"), "fp32", 2, ""))["processor"] == "some GPU"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": (63.64, 80), "step": 120}, "those of step 80 of 120, for the highest mean validation top-1: 63.64 %"),
        ({"best": None, "step": 3}, "no weights are selected"),
        ({"best": (None, 120), "step": 120}, "those of step 120, the last; the selected ones were lost"),
    ],
)
def test_the_text_names_the_selected_step_and_why(tmp_path, changes, words):
    assert words in report.markdown(make(tmp_path, **changes))


def test_the_text_names_the_last_step_if_the_configuration_selects_it(tmp_path):
    config = make_config(tmp_path, train__checkpoint_selection="last")
    text = report.markdown(make(tmp_path, config=config, best=(50.0, 8), step=8))
    assert "those of step 8 of 8, the last (train.checkpoint_selection)" in text and "50.00 %" in text


def test_a_single_task_report_has_a_step_for_each_task(tmp_path):
    config = make_config(tmp_path, **LATE, mode="single_task", train__steps=2, train__evaluate_test=False)
    text = report.markdown(moe_bsr.train(config, tmp_path / "run"))
    assert "each with the weights of its own step: shapes 2, fractals 2" in text


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_the_largest_confusions_are_listed_with_escaped_class_names(tmp_path, name):
    known = make(tmp_path, best=(1.0, 8), step=8)
    known["tasks"]["shapes"]["confusions"] = [{"true": name, "predicted": "b", "count": 3, "share": 0.5}]
    (line,) = [line for line in report.markdown(known).splitlines() if line.startswith("* shapes: ")]
    fence, shown = re.match(r"\* shapes: (`+)(.*?)\1 taken for `b` 3x \(50 %\)$", line).groups()
    assert shown.strip() == printable(name).strip() and fence not in shown
    report.write(tmp_path, known)
    assert line in (tmp_path / "report.md").read_text(encoding="utf-8")
