"""Test moe-bsr compare on made-up reports. test_train.py compares trained runs."""

import json
import zipfile

from moe_bsr.cli.main import main


def test_json_has_the_reports_under_the_names_of_the_table(tmp_path, capsys):
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps({"tasks": {}, "from": name}))
    paths = [str(tmp_path / name) for name in ("a/run", "b/run", "c")]
    assert main(["compare", *paths, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert list(reports) == [*paths[:2], "c"] and reports["c"]["from"] == "c"


def test_a_shared_zip_file_is_compared(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/config.json", "{}")
        archive.writestr("a/report.json", json.dumps({"tasks": {}, "from": "a"}))
    assert main(["compare", str(tmp_path / "a.zip"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a.zip": {"tasks": {}, "from": "a"}}


def test_a_folder_without_a_report_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "has no report.json: not a finished run" in capsys.readouterr().err


def test_a_run_without_test_accuracies_says_so(tmp_path, capsys):
    for name, split in (("tested", "test"), ("probe", "val")):
        (tmp_path / name).mkdir()
        numbers = {"mean_top1": 50.0, "train_seconds": 1.0, "measured_peak_mb": 1.0, "gflops_per_image": None}
        report = {"split": split, "tasks": {"a": {"top1": 50.0, "images": 3}}, **numbers}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    assert main(["compare", str(tmp_path / "tested"), str(tmp_path / "probe")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("tested  ") and lines[3].startswith("probe (val split)  50.0")


def test_chance_is_that_of_the_first_run_with_the_task_and_the_same_split(tmp_path, capsys):
    runs = {
        "one": ("test", {"a": 10.0}),
        "val": ("val", {"b": 60.0, "c": 30.0}),
        "two": ("test", {"a": 11.0, "b": 20.0}),
    }
    for name, (split, chance) in runs.items():
        (tmp_path / name).mkdir()
        tasks = {task: {"top1": 50.0, "images": 3, "chance": value} for task, value in chance.items()}
        numbers = {"mean_top1": 50.0, "train_seconds": 1.0, "measured_peak_mb": 1.0, "gflops_per_image": None}
        (tmp_path / name / "report.json").write_text(json.dumps({"split": split, "tasks": tasks, **numbers}))
    assert main(["compare", *(str(tmp_path / name) for name in runs)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["chance", "10.0", "20.0", "-"]
