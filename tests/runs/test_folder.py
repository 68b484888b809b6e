"""The run folder: what a run writes down, and that a trained model comes back from it as it was scored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import SIZES, TASKS, Crash, act_at, crash, make_config, script_scores, state_of

import moe_bsr
from moe_bsr.runs import checkpoint
from moe_bsr.runs import folder as run
from moe_bsr.model.backbones.vit import load as load_backbone
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.config import Config, ConfigError
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.runs.report import markdown
from moe_bsr.api import train

pytestmark = pytest.mark.usefixtures("undrawn")

ACCURACIES = ("top1", "top5", "chance", "mean_class_accuracy", "ece", "loss", "n")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("tasks"), train__ema_decay=0.7, train__eval_every=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    moe_bsr.train(config, folder)
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- the report ---


def test_the_report_has_what_people_script_against(finished):
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
    assert list(use) == ["3", "5"]
    for shares in (use[block][task] for block in use for task in TASKS):
        assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-3)


def test_the_report_for_people_has_a_row_for_each_task(finished):
    text, report = (finished / "report.md").read_text(), report_of(finished)
    for name, task in report["tasks"].items():
        assert f"| {name} | {task['top1']:.1f} |" in text
        assert f"| {task['mean_class_accuracy']:.1f} | {task['ece']:.1f} | {task['chance']:.1f} |" in text
    unscored = report | {
        "tasks": {name: {k: task[k] for k in ("images", "epochs", "updates")} for name, task in report["tasks"].items()}
    }
    for table in (text, markdown(unscored)):
        assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {11}
    assert "finished" in text and "1 evaluation(s) of the test split" in text


def test_without_a_test_the_report_is_of_validation(config, tmp_path):
    untested = moe_bsr.config.replace(config, train__evaluate_test=False, train__steps=2)
    report = train(untested, tmp_path / "run")
    assert report["split"] == "val" and report["test_evaluations"] == 0
    assert {name: task["n"] for name, task in report["tasks"].items()} == {"shapes": 10, "fractals": 12}


def test_every_evaluation_on_test_data_is_counted(config, tmp_path):
    train(moe_bsr.config.replace(config, train__steps=2), tmp_path / "run")
    assert [run.count_test_evaluation(tmp_path / "run") for _ in range(2)] == [2, 3]
    assert report_of(tmp_path / "run")["test_evaluations"] == 3
    assert "3 evaluation(s) of the test split" in (tmp_path / "run" / "report.md").read_text()


def test_in_a_series_only_the_tasks_evaluated_on_test_data_are_counted(config, tmp_path):
    folder = tmp_path / "run"
    train(moe_bsr.config.replace(config, mode="single_task", train__steps=2), folder)
    assert [run.count_test_evaluation(folder, ["shapes"]) for _ in range(2)] == [2, 3]
    assert [run.test_evaluations(folder / task) for task in TASKS] == [3, 1]
    assert report_of(folder)["test_evaluations"] == report_of(folder / "shapes")["test_evaluations"] == 3
    assert run.count_test_evaluation(folder) == 4
    assert [run.test_evaluations(folder / task) for task in TASKS] == [4, 2]


def test_the_resolved_configuration_is_written_down(finished, config):
    written, resolved = run.read_config(finished)
    assert written == config
    assert resolved["precision"] == "fp32" and resolved["threads"] == 1 and resolved["device"] == "cpu"
    assert resolved["images"]["size"] == 32 and len(resolved["images"]["mean"]) == 3
    assert resolved["backbone_sha256"] == moe_bsr.load(finished).models["shapes"].backbone_sha256 != ""
    for name, (classes, count) in TASKS.items():
        about = resolved["tasks"][name]
        assert (len(about["classes"]), about["train"], about["val"], about["test"]) == (
            classes,
            SIZES[name],
            count - SIZES[name],
            classes,
        )


# --- metrics and events ---


def test_metrics_are_one_object_a_line(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["task"] for line in steps] == ["shapes", "fractals"] * 4
    numbers = {"loss", "auxiliary_loss", "accuracy", "lr", "gradient_norm", "images", "epochs"}
    assert all(numbers <= line.keys() for line in steps)
    scores = [(line["step"], line["split"], line["task"]) for line in lines if "split" in line]
    assert scores == [
        (step, split, task) for step, split in ((3, "val"), (6, "val"), (8, "val"), (8, "test")) for task in TASKS
    ]
    report = report_of(finished)
    for line, (name, task) in zip(lines[-2:], report["tasks"].items(), strict=True):
        assert line == {"step": 8, "task": name, "split": "test"} | {
            key: task[key] for key in line.keys() & set(ACCURACIES)
        }


@pytest.mark.parametrize("prefetch", [0, 3])
def test_another_run_is_the_same_to_the_byte(config, finished, tmp_path, prefetch):
    """Nothing measured by a clock is in metrics.jsonl, and preparing batches ahead changes nothing."""
    train(moe_bsr.config.replace(config, data__prefetch=prefetch), tmp_path / "again")
    places = ["metrics.jsonl", *(f"checkpoint/8/{name}.safetensors" for name in ("weights", "optimizer", "average"))]
    for place in places:
        assert (tmp_path / "again" / place).read_bytes() == (finished / place).read_bytes(), place


def test_tensorboard_has_the_numbers_of_the_metrics(finished):
    events = scalars(finished)
    for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()):
        split = line.get("split", "train")
        value = dict(events[f"{split}/{line['task']}/loss"])[line["step"]]
        assert value == pytest.approx(line["loss"], rel=1e-6)
    assert [step for step, _ in events["train/lr"]] == list(range(1, 9))
    assert not [tag for tag in events if tag.startswith("test/") and len(events[tag]) != 1]


def test_tensorboard_is_cut_back_to_the_checkpoint(config, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 5, crash)
        train(config, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Crash):  # updates 4 to 6 in a file to be forgotten
        patch.setattr(checkpoint, "save", lambda *_: crash())
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume=True)
    resumed, whole = scalars(tmp_path / "run"), scalars(finished)
    assert resumed.keys() == whole.keys()
    for measured in ("speed/images_per_second", "result/train seconds", "result/peak MB"):
        assert [step for step, _ in resumed.pop(measured)] == [step for step, _ in whole.pop(measured)]
    assert resumed == whole


# --- a model from its run ---


@pytest.mark.parametrize("ema", [None, 0.7])
def test_a_loaded_run_scores_exactly_what_its_report_says(config, tmp_path, ema):
    report = train(moe_bsr.config.replace(config, train__ema_decay=ema, train__eval_every=None), tmp_path / "run")
    loaded = moe_bsr.load(tmp_path / "run")
    assert loaded.weights == ("live" if ema is None else "average") and loaded.step == 8
    for name, model in loaded.models.items():
        assert not model.training
        scores = evaluate(model, loaded.data(name), "test", loaded.transforms, loaded.runtime)
        assert {k: v for k, v in scores.items() if k != "images_per_second"} == {
            k: report["tasks"][name][k] for k in scores if k != "images_per_second"
        }
        assert loaded.class_names[name] == loaded.data(name).class_names


def test_best_last_or_any_kept_step_can_be_loaded(config, tmp_path, monkeypatch):
    script_scores(monkeypatch, [10.0, 30.0, 20.0])  # at updates 3, 6 and 8
    folder = tmp_path / "run"
    train(moe_bsr.config.replace(config, train__ema_decay=None), folder)
    for name, step in (("best", 6), ("last", 8), (6, 6), ("8", 8)):
        loaded = moe_bsr.load(folder, name)
        assert loaded.step == step
        saved = checkpoint.read(folder / "checkpoint" / str(step))[0]["weights"]
        held = loaded.models["shapes"].state_dict()
        assert all(torch.equal(held[key], value) for key, value in saved.items())
    with pytest.raises(CheckpointError, match="no checkpoint 7 .* 6, 8"):
        moe_bsr.load(folder, 7)


def test_tasks_of_a_run_can_be_chosen(finished):
    loaded = moe_bsr.load(finished, tasks=["fractals"])
    assert list(loaded.models) == list(loaded.class_names) == ["fractals"]
    with pytest.raises(ValueError, match="did you mean shapes"):
        moe_bsr.load(finished, tasks=["shape"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        moe_bsr.load(tmp_path)


@pytest.mark.parametrize("first_lost", ["mode:", "ode:", "seed:", "weights:", "resolved:", "images:", "python:"])
def test_a_damaged_configuration_is_refused_by_name(finished, tmp_path, first_lost):
    text = (finished / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index(first_lost)])
    with pytest.raises(ConfigError, match=r"config\.yaml: cut or damaged: .* copy in its place") as refusal:
        run.read_config(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_training_changed_is_saved_or_everything(config, tmp_path):
    saved, models = {}, {}
    for save in ("trainable", "all"):
        folder = tmp_path / save
        train(moe_bsr.config.replace(config, train__save=save, train__steps=2), folder)
        saved[save] = checkpoint.read(folder / "checkpoint" / "2")[0]["weights"]
        models[save] = state_of(moe_bsr.load(folder).models["shapes"])
    assert saved["all"].keys() == models["all"].keys()
    left_out = saved["all"].keys() - saved["trainable"].keys()
    assert {"vit.patch_embed.proj.weight", "vit.pos_embed", "vit.blocks.0.attn.qkv.weight"} <= left_out
    assert not [name for name in left_out if name.startswith(("vit.blocks.1.", "vit.norm.", "heads."))]
    assert models["all"].keys() == models["trainable"].keys()
    assert all(torch.equal(value, models["trainable"][name]) for name, value in models["all"].items())


@pytest.fixture
def own_backbone(config, tmp_path) -> tuple[Config, Path]:
    """The configuration over a weights file of one's own, and that file."""
    file = tmp_path / "backbone.safetensors"
    save_file(load_backbone(config.backbone, seed=5).state_dict(), file)
    return moe_bsr.config.replace(config, backbone__weights=str(file), train__ema_decay=None), file


def replace_backbone(config: Config, file: Path) -> None:
    save_file(
        load_backbone(moe_bsr.config.replace(config, backbone__weights="random").backbone, seed=6).state_dict(), file
    )


def test_a_run_over_another_backbone_is_refused(own_backbone, tmp_path):
    config, file = own_backbone
    train(config, tmp_path / "run")
    replace_backbone(config, file)
    with pytest.raises(CheckpointError, match="only what training changed.*backbone.weights"):
        moe_bsr.load(tmp_path / "run")


def test_weights_that_were_moved_are_named_by_an_option(own_backbone, tmp_path):
    config, file = own_backbone
    train(moe_bsr.config.replace(config, train__steps=2), tmp_path / "run")
    before = state_of(moe_bsr.load(tmp_path / "run").models["shapes"])
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="no such file.*--weights"):
        moe_bsr.load(tmp_path / "run")
    after = moe_bsr.load(tmp_path / "run", weights=str(moved)).models["shapes"].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    replace_backbone(config, moved)
    with pytest.raises(CheckpointError, match="--weights FILE to evaluate"):
        moe_bsr.load(tmp_path / "run", weights=str(moved))


def test_a_run_of_a_device_that_is_not_here_is_computed_on_another(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("  device: cpu\n", "  device: cuda:99\n"))
    with pytest.raises(ConfigError, match="cuda:99.*--device cpu"):
        moe_bsr.load(tmp_path / "run")
    here = moe_bsr.load(tmp_path / "run", device="cpu")
    assert here.runtime.device.type == "cpu" and here.runtime.precision == "fp32"


def test_a_resume_over_another_backbone_is_refused(own_backbone, tmp_path, monkeypatch):
    config, file = own_backbone
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 5, crash)
        train(config, tmp_path / "run")
    replace_backbone(config, file)
    with pytest.raises(CheckpointError, match="only what training changed.*backbone.weights"):
        train(config, tmp_path / "run", resume=True)


def test_a_checkpoint_of_everything_stands_alone(own_backbone, tmp_path):
    config, file = own_backbone
    train(moe_bsr.config.replace(config, train__save="all", train__steps=2), tmp_path / "run")
    file.unlink()
    assert moe_bsr.load(tmp_path / "run").step == 2
