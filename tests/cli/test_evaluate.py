"""Test the command line of moe-bsr evaluate."""

import json
import shutil

import pytest
from fresh import COMMAND
from fresh import run as run_fresh
from tiny_names import AWKWARD
from tiny_runs import TASKS

import moe_bsr
from moe_bsr.cli.main import main
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.evaluation.tables import table
from moe_bsr.runtime.names import printable


def test_the_command_reports_the_results_of_the_evaluate_function(tiny_run, capsys):
    assert main(["evaluate", str(tiny_run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    loaded = moe_bsr.load(tiny_run)
    for task in TASKS:
        direct = evaluate(loaded.models[task], loaded.data(task), "val", loaded.transforms, loaded.runtime)
        assert report["tasks"][task] | {"images_per_second": 0} == direct | {"images_per_second": 0}
    assert report["mean_top1"] == pytest.approx(sum(task["top1"] for task in report["tasks"].values()) / 2)
    assert (report["step"], report["split"]) == (loaded.step, "val") and "test_evaluations" not in report


def test_evaluations_of_the_test_split_are_counted_once_each(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for count in (2, 3):  # training made the first evaluation
        assert main(["evaluate", str(run), "--split", "test", "--task", "shapes"]) == 0
        out = capsys.readouterr().out
        assert f"test evaluation {count} of this run" in out and "fractals" not in out


def test_an_unknown_task_is_refused_and_nothing_counted(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert main(["evaluate", str(run), "--task", "shape", "--split", "test"]) == 2
    assert "did you mean shapes" in capsys.readouterr().err
    assert len((run / "test_evaluations.log").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_control_characters_in_class_names_are_escaped(name):
    confusion = {"true": name, "predicted": "b", "count": 2, "share": 0.5}
    numbers = dict.fromkeys(("top1", "top1_low", "top1_high", "top5", "mean_class_accuracy", "ece", "chance"), 1.0)
    result = numbers | {"n": 4, "images_per_second": 1.0, "tokens_kept": 1.0, "expert_share": {}, "experts_used": {}}
    *_, last = table({"shapes": result | {"confusions": [confusion]}}).splitlines()
    assert last == f"  shapes: {printable(name)} -> b 2x (50 %)"


def test_characters_that_the_terminal_cannot_show_are_escaped(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "été 日本")
    command = "evaluate", run, "--split", "test", "--task", "shapes"
    done = run_fresh(COMMAND, *command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\xe9t\xe9 \u65e5\u672c, step" in done.stdout and "shapes" in done.stdout
