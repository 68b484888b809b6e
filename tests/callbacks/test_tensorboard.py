"""TensorBoard's page: the curves in each chart, and the order of the charts."""

import json
from statistics import fmean

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME, parse_experiment_plugin_data
from tiny_runs import LATE, TASKS, make_config

from moe_bsr.api import train
from moe_bsr.callbacks import tensorboard as tensorboard_module
from moe_bsr.callbacks.tensorboard import ALL, MEAN, SELECTED, TRAINING, VALIDATION
from moe_bsr.config import replace


@pytest.fixture(scope="module")
def config(tmp_path_factory, bare):
    return make_config(tmp_path_factory.mktemp("tasks"), **LATE, train__eval_every=2)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, folder)
    return folder


def read(folder) -> EventMultiplexer:
    guidance = {"scalars": 0, "tensors": 0, "images": 0}
    return EventMultiplexer(size_guidance=guidance).AddRunsFromDirectory(str(folder / "tensorboard")).Reload()


def chart(folder, tag: str) -> dict[str, dict[int, float]]:
    """Return the curves of a chart by their names in the legend."""
    runs = read(folder)
    return {
        run: {e.step: e.value for e in runs.Scalars(run, tag)}
        for run, tags in runs.Runs().items()
        if tag in tags["scalars"]
    }


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tasks_their_mean_and_the_selected_step_share_a_chart(finished):
    shown, report = chart(finished, "val/top1"), json.loads((finished / "report.json").read_text())
    assert shown.keys() == {*TASKS, MEAN, SELECTED}
    for step, mean in shown[MEAN].items():
        scores = [m["top1"] for m in metrics(finished) if m["step"] == step and m.get("split") == "val"]
        assert len(scores) == 2 and mean == pytest.approx(fmean(scores))
    assert shown[SELECTED] == {report["selected_step"]: pytest.approx(max(shown[MEAN].values()))}
    assert chart(finished, "train/loss").keys() == set(TASKS)


@pytest.mark.parametrize(("name", "of_training", "of_validation"), [("accuracy", "accuracy", "top1"), ("loss",) * 3])
def test_training_and_validation_share_a_chart(finished, name, of_training, of_validation):
    scale = 100 if name == "accuracy" else 1
    means = {}
    for task in TASKS:
        shown = chart(finished, f"{name}/{task}")
        assert shown.keys() == {TRAINING, VALIDATION}
        for step, value in shown[TRAINING].items():
            seen = [
                scale * m[of_training]
                for m in metrics(finished)
                if m["task"] == task and "split" not in m and step - 2 < m["step"] <= step
            ]
            assert value == pytest.approx(fmean(seen), rel=1e-6)
            means.setdefault(step, []).append(value)
        for step, value in shown[VALIDATION].items():
            scores = [m for m in metrics(finished) if (m["task"], m["step"], m.get("split")) == (task, step, "val")]
            assert value == pytest.approx(scores[0][of_validation], rel=1e-6)
    assert chart(finished, f"{name}/{ALL}")[TRAINING] == pytest.approx({s: fmean(v) for s, v in means.items()})


def test_sections_about_tasks_come_before_experts_and_none_shows_the_test_split(finished):
    runs = read(finished)
    sections = sorted({tag.split("/")[0] for tags in runs.Runs().values() for tag in tags["scalars"]})
    assert sections == ["accuracy", "loss", "train", "val", "which experts work", "with what result"]


def test_a_run_of_one_task_has_no_mean(config, tmp_path):
    train(replace(config, tasks=config.tasks[:1], train__steps=2), tmp_path)
    assert chart(tmp_path, "val/top1").keys() == {"shapes", SELECTED} and not chart(tmp_path, f"loss/{ALL}")


def test_the_selected_step_is_stated_with_the_reason(finished):
    runs, report = read(finished), json.loads((finished / "report.json").read_text())
    (said,) = runs.Tensors(".", "selected step/text_summary")
    words = said.tensor_proto.string_val[0].decode()
    assert f"step {report['selected_step']} of 8" in words and "highest mean validation top-1" in words


def test_runs_are_ranked_by_validation_in_the_hparams_tab(finished):
    runs, report = read(finished), json.loads((finished / "report.json").read_text())
    content = runs.GetAccumulator(".").summary_metadata["_hparams_/experiment"].plugin_data
    assert content.plugin_name == PLUGIN_NAME
    experiment = parse_experiment_plugin_data(content.content)
    names = [metric.display_name for metric in experiment.metric_infos]
    assert names[0] == "mean val top-1 %" and {f"{task} val top-1 %" for task in TASKS} <= set(names)
    for metric in experiment.metric_infos:
        (point,) = runs.Scalars(".", metric.name.tag)
        assert point.step == report["selected_step"]
    at_best = chart(finished, "val/top1")
    for task in TASKS:
        (point,) = runs.Scalars(".", f"with what result/{task} val top-1 %")
        assert point.value == pytest.approx(at_best[task][report["selected_step"]])


def test_the_number_of_points_is_limited(config, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_module, "MAX_POINTS", 4)
    train(replace(config, plan__moe_blocks=[], plan__drop_blocks=[], train__eval_every=None), tmp_path)
    for task, curve in chart(tmp_path, "train/loss").items():  # every second visit of the task
        assert list(curve) == ([3, 7] if task == "shapes" else [4, 8])
