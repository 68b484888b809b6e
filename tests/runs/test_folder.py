"""Test the run folder: what a run writes into it, and that changed or damaged configurations are refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tiny_runs import SIZES, TASKS, Crash, act_at, crash

import moe_bsr
from moe_bsr import api
from moe_bsr.api import train
from moe_bsr.callbacks import hparams
from moe_bsr.config import ConfigError
from moe_bsr.runs import checkpoint
from moe_bsr.runs import folder as run
from moe_bsr.runs import report as report_module
from moe_bsr.runs.report import markdown

pytestmark = pytest.mark.usefixtures("undrawn")

ACCURACIES = ("top1", "top5", "chance", "mean_class_accuracy", "ece", "loss", "n")


@pytest.fixture(scope="module", autouse=True)
def predicted_once():
    """Predict the cost of a run only once, because all runs of this file have the same cost."""
    predict, known = api._predict, []

    def once(*arguments):
        if not known:
            known.append(predict(*arguments))
        return known[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_predict", once)
        yield


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def scalars(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return the (step, value) points of each (sub-run, tag)."""
    runs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
    return {
        (run, tag): [(e.step, e.value) for e in runs.Scalars(run, tag)]
        for run, tags in runs.Runs().items()
        for tag in tags["scalars"]
    }


# --- the report ---


def test_the_fields_of_the_json_report(finished):
    report = report_of(finished)
    assert report["status"] == "finished" and report["split"] == "test" and report["weights"] == "average"
    assert list(report["tasks"]) == list(TASKS)
    for name, task in report["tasks"].items():
        classes = TASKS[name][0]
        assert task["n"] == classes and task["chance"] == pytest.approx(100 / classes)
        assert task["top1_low"] - 1e-9 <= task["top1"] <= task["top1_high"] + 1e-9
        assert task["top1"] <= task["top5"] <= 100
        assert (task["updates"], task["images"], task["epochs"]) == (4, 32, 32 / SIZES[name])
    assert report["mean_top1"] == sum(task["top1"] for task in report["tasks"].values()) / 2
    assert report["train_seconds"] > 0 and report["measured_peak_mb"] > 10
    assert report["gflops_per_image"] > 0 and "predicted_peak_mb" in report
    assert report["test_evaluations"] == 1
    assert report["selected_step"] in (3, 6, 8)


def test_the_report_says_which_experts_each_task_used(finished):
    use = report_of(finished)["expert_use"]
    assert list(use) == ["5"]
    for shares in (use[block][task] for block in use for task in TASKS):
        assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-3)


def test_the_text_report_has_a_row_for_each_task(finished):
    text, report = (finished / "report.md").read_text(), report_of(finished)
    for name, task in report["tasks"].items():
        assert f"| {name} | {task['top1']:.1f} |" in text
        assert f"| {task['mean_class_accuracy']:.1f} | {task['ece']:.1f} | {task['chance']:.1f} |" in text
    unscored = report | {
        "tasks": {name: {k: task[k] for k in ("images", "epochs", "updates")} for name, task in report["tasks"].items()}
    }
    for table in (text, markdown(unscored)):
        assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {12}
    assert "finished" in text and "1 evaluation(s) of the test split" in text


def test_without_a_test_evaluation_the_report_has_validation_scores(config, tmp_path):
    untested = moe_bsr.config.replace(config, train__evaluate_test=False, train__steps=2)
    report = train(untested, tmp_path / "run")
    assert report["split"] == "val" and report["test_evaluations"] == 0
    assert {name: task["n"] for name, task in report["tasks"].items()} == {"shapes": 7, "fractals": 9}


def count_during_another_count(folder, monkeypatch) -> None:
    """Count twice, the second time when the first one is about to write the report."""
    write = report_module.write

    def late(place: Path, content: dict) -> None:
        monkeypatch.setattr(report_module, "write", write)
        run.count_test_evaluation(folder)
        write(place, content)

    monkeypatch.setattr(report_module, "write", late)
    run.count_test_evaluation(folder)


def test_every_evaluation_on_test_data_is_counted(config, tmp_path, monkeypatch):
    train(moe_bsr.config.replace(config, train__steps=2), tmp_path / "run")
    assert [run.count_test_evaluation(tmp_path / "run") for _ in range(2)] == [2, 3]
    assert report_of(tmp_path / "run")["test_evaluations"] == 3
    assert "3 evaluation(s) of the test split" in (tmp_path / "run" / "report.md").read_text()
    count_during_another_count(tmp_path / "run", monkeypatch)
    assert report_of(tmp_path / "run")["test_evaluations"] == 5
    assert "5 evaluation(s) of the test split" in (tmp_path / "run" / "report.md").read_text()


def test_in_a_series_only_the_tasks_evaluated_on_test_data_are_counted(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(moe_bsr.config.replace(config, mode="single_task", train__steps=2), folder)
    assert [run.count_test_evaluation(folder, ["shapes"]) for _ in range(2)] == [2, 3]
    assert [run.test_evaluations(folder / task) for task in TASKS] == [3, 1]
    assert report_of(folder)["test_evaluations"] == report_of(folder / "shapes")["test_evaluations"] == 3
    assert run.count_test_evaluation(folder) == 4
    assert [run.test_evaluations(folder / task) for task in TASKS] == [4, 2]
    count_during_another_count(folder, monkeypatch)
    assert report_of(folder)["test_evaluations"] == report_of(folder / "shapes")["test_evaluations"] == 6


def test_the_resolved_configuration_is_saved(finished, config):
    written, resolved = run.read_config(finished)
    assert written == config
    assert resolved["precision"] == "fp32" and resolved["threads"] == 1 and resolved["device"] == "cpu"
    assert resolved["images"]["size"] == 32 and len(resolved["images"]["mean"]) == 3
    assert resolved["backbone_sha256"] == moe_bsr.load(finished).models["shapes"].backbone_sha256 != ""
    for name, (classes, count) in TASKS.items():
        about = resolved["tasks"][name]
        images = [about["splits"][split]["images"] for split in ("train", "val", "test")]
        assert len(about["classes"]) == classes and images == [SIZES[name], count - SIZES[name], classes]
        assert about["spec"]["source"] == "generated" and about["spec"]["family"] == name


def edited(run: Path, folder: Path, change) -> Path:
    """Copy a run and apply `change` to the contents of its config.yaml."""
    shutil.copytree(run, folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    change(tree)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.parametrize("section", ["train", "sampler", "runtime"])
def test_unknown_keys_in_training_sections_are_ignored_by_load(finished, config, tmp_path, section):
    folder = edited(finished, tmp_path / "run", lambda tree: tree[section].update(invented=3))
    with pytest.warns(UserWarning, match=rf"written by another version of moe_bsr .* {section}.invented"):
        moe_bsr.load(folder)
    (folder / "report.json").unlink()
    with pytest.raises(ConfigError, match=rf"another version of moe_bsr .*{section}.invented"):
        train(config, folder, resume=True)


@pytest.mark.parametrize("section", [None, "plan", "moe", "backbone", "data", "tokens"])
def test_unknown_keys_in_model_sections_are_refused(finished, tmp_path, section):
    folder = edited(finished, tmp_path / "run", lambda tree: (tree[section] if section else tree).update(invented=3))
    with pytest.raises(ConfigError, match="another version of moe_bsr .*invented"):
        moe_bsr.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["resolved"].pop("tasks"),
        lambda tree: tree["resolved"].update(tasks=[]),
        lambda tree: tree["resolved"]["tasks"].pop("shapes"),
        lambda tree: tree["resolved"]["tasks"].update(shapes="x"),
        lambda tree: tree["resolved"]["tasks"]["shapes"].pop("classes"),
        lambda tree: tree["resolved"]["tasks"]["shapes"].update(classes=[1, 2]),
        lambda tree: tree["resolved"]["tasks"]["shapes"].update(classes="many"),
        lambda tree: tree["resolved"]["tasks"]["shapes"].pop("spec"),
        lambda tree: tree["resolved"]["tasks"]["shapes"].update(spec=3),
        lambda tree: tree["resolved"]["tasks"]["shapes"].pop("splits"),
        lambda tree: tree["resolved"]["tasks"]["shapes"].update(splits={}),
        lambda tree: tree["resolved"]["tasks"]["shapes"]["splits"].update(val=3),
        lambda tree: tree.update(resolved=[1]),
        lambda tree: tree.update(tasks=3),
    ],
)
def test_a_damaged_run_configuration_is_refused(finished, tmp_path, change):
    folder = edited(finished, tmp_path / "run", change)
    with pytest.raises(ConfigError, match="config.yaml: cut or damaged"):
        moe_bsr.load(folder)


# --- metrics and events ---


def test_metrics_have_one_json_object_per_line(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["task"] for line in steps] == ["shapes", "fractals"] * 4
    numbers = {"loss", "auxiliary_loss", "accuracy", "lr", "gradient_norm", "images", "epochs"}
    assert all(numbers <= line.keys() for line in steps)
    scores = [(line["step"], line["split"], line["task"]) for line in lines if "split" in line]
    report = report_of(finished)
    selected = report["selected_step"]  # the step of the weights that were tested
    evaluations = ((3, "val"), (6, "val"), (8, "val"), (selected, "test"))
    assert scores == [(step, split, task) for step, split in evaluations for task in TASKS]
    for line, (name, task) in zip(lines[-2:], report["tasks"].items(), strict=True):
        assert line == {"step": selected, "task": name, "split": "test"} | {
            key: task[key] for key in line.keys() & set(ACCURACIES)
        }


def test_a_second_run_writes_identical_files(config, finished, tmp_path):
    """metrics.jsonl contains no measured times, and preparing batches ahead changes nothing."""
    train(moe_bsr.config.replace(config, data__prefetch=3), tmp_path / "again")
    names = ["metrics.jsonl", *(f"checkpoint/8/{name}.safetensors" for name in ("weights", "optimizer", "average"))]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_tensorboard_has_the_values_of_the_metrics_file(finished):
    """Test scores are left out, because charts are used to choose between runs."""
    events = scalars(finished)
    for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()):
        if (split := line.get("split", "train")) != "test":
            value = dict(events[line["task"], f"{split}/loss"])[line["step"]]
            assert value == pytest.approx(line["loss"], rel=1e-6)
    assert [step for step, _ in events[".", "train/lr"]] == list(range(1, 9))
    assert not [tag for _, tag in events if "test" in tag]


def test_tensorboard_is_cut_back_to_the_checkpoint(config, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 5, crash)
        train(config, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Crash):  # writes an event file of updates 4 to 6, to be removed
        patch.setattr(checkpoint, "save", lambda *_: crash())
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume=True)
    resumed, whole = scalars(tmp_path / "run"), scalars(finished)
    assert resumed.keys() == whole.keys()
    for name in ("train/images_per_second", f"{hparams.SECTION}/train seconds", f"{hparams.SECTION}/peak MB"):
        measured = (".", name)
        assert [step for step, _ in resumed.pop(measured)] == [step for step, _ in whole.pop(measured)]
    assert resumed == whole


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("probe", "late"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(ConfigError, match="it has no config.yaml; runs in it: .*/late, .*/probe$"):
        run.read_config(tmp_path)


@pytest.mark.parametrize("first_lost", ["mode:", "ode:", "seed:", "weights:", "resolved:", "images:", "python:"])
def test_a_damaged_configuration_is_refused_by_name(finished, tmp_path, first_lost):
    text = (finished / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index(first_lost)])
    with pytest.raises(ConfigError, match=r"config\.yaml: cut or damaged: .* copy in its place") as refusal:
        run.read_config(tmp_path)
    assert "\n" not in str(refusal.value)
