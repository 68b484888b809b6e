"""Sixty tasks with one image folder each: training, resuming, adding a task, and the views of the results."""

import json
import re
from statistics import fmean

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tiny_data import save
from tiny_runs import Crash, act_at, crash

import moe_bsr
from moe_bsr.callbacks.many_tasks import RUNS, worst_list
from moe_bsr.callbacks.tensorboard import ALL, SELECTED, TRAINING, VALIDATION
from moe_bsr.config import Config, ConfigError, from_dict, replace
from moe_bsr.data import load_spec
from moe_bsr.evaluation import probe
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.evaluation.tables import table
from moe_bsr.runs.comparison import comparison, most_changed
from moe_bsr.runs.folder import config_diff
from moe_bsr.runs.report import markdown
from moe_bsr.runtime.top_list import BEST, MANY, WORST, are_many, condensed, shown, worst_and_best
from moe_bsr.training.added_task import added_task_config
from moe_bsr.visualize import accuracy, many_tasks

pytestmark = pytest.mark.usefixtures("bare")

TASKS, STEPS = 60, 6
probed: list[str] = []
NAMES = [f"t{number:03d}" for number in range(TASKS)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate([*NAMES, "novel one"]):
        for image in range(6):
            save(folder / name / "ab"[image % 2] / f"{image}.png", 10 * number + image, compress_level=0)
    (folder / "notes.txt").write_text("no task")
    return folder


@pytest.fixture(scope="module")
def config(photos) -> Config:
    return from_dict(
        {
            "tasks": f"{photos}/t*",
            "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
            "plan": {"train_blocks": [3, 5], "drop_blocks": [3], "moe_blocks": [5]},
            "moe": {"num_experts": 4, "top_k": 2, "mlp_ratio": 1},
            "data": {"val_fraction": 0.4},
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "evaluate_test": False,
                "eval_every": None,
                "checkpoint_every": 4,
            },
            "runtime": {"device": "cpu", "precision": "fp32", "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory, bare):
    """Return the folder of a run that crashed in the fifth of six updates and was resumed."""
    folder, run_probe = tmp_path_factory.mktemp("many") / "run", probe.run_probe
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, 5, crash)
        with pytest.raises(Crash):
            moe_bsr.train(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            probe, "run_probe", lambda model, data, *rest: probed.append(data.name) or run_probe(model, data, *rest)
        )
        moe_bsr.train(config, folder, resume=True)
    return folder


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def events(run):
    return EventMultiplexer().AddRunsFromDirectory(str(run / "tensorboard")).Reload()


def lines(run, split=None):
    each = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in each if line.get("split") == split]


def curve(events, subrun, tag):
    return {point.step: point.value for point in events.Scalars(subrun, tag)}


def test_a_pattern_expands_to_all_matching_folders_and_task_files(photos, config):
    assert config.task_names() == NAMES and config.tasks[0] == f"{photos}/t000/"
    assert load_spec(config.tasks[3]).path == str(photos / "t003")
    (photos / "one.yaml").write_text("title: One\nsource: folder\npath: nowhere\n")
    both = from_dict({"tasks": [f"{photos}/*ne*", "pets"]})
    assert both.task_names() == ["novel_one", "one", "pets"]  # notes.txt is not a task
    with pytest.raises(ConfigError, match=r"tasks: '.*nothing\*' matches no folder and no .yaml file"):
        from_dict({"tasks": f"{photos}/nothing*"})
    with pytest.raises(FileNotFoundError, match="task folder .*/absent does not exist"):
        load_spec(f"{photos}/absent/")


def test_the_config_diff_names_only_added_and_removed_tasks(config, photos):
    found = config_diff(config, replace(config, tasks=[*config.tasks[1:], f"{photos}/new/"]))
    assert found == [f"tasks: {photos}/new/ added, {photos}/t000/ gone since (add-task adds one)"]


def test_all_tasks_are_in_the_files(run, report):
    assert list(report["tasks"]) == NAMES and report["step"] == STEPS and report["status"] == "finished"
    whole = (run / "report.md").read_text()
    assert all(f"| {name} |" in whole for name in NAMES)
    assert {line["task"] for line in lines(run, "val")} == set(NAMES)


def test_tensorboard_has_curves_over_all_tasks_instead_of_one_per_task(run, events):
    assert set(events.Runs()) == {".", *RUNS, SELECTED, TRAINING, VALIDATION, "block 5"}
    for name, large_is_bad in (("top1", False), ("loss", True)):
        values = sorted((line[name] for line in lines(run, "val")), reverse=large_is_bad)
        expected = [fmean(values), fmean(values[:WORST]), *np.percentile(values, (25, 50, 75))]
        found = [curve(events, subrun, f"val/{name}")[STEPS] for subrun in RUNS]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_has_one_training_point_per_interval(run, events):
    losses = {line["step"]: line["loss"] for line in lines(run)}
    assert curve(events, ".", "train/loss") == pytest.approx(losses, rel=1e-5)  # a short run has a point per update


def test_points_are_means_over_the_updates_since_the_last(run, tmp_path, monkeypatch, config):
    from moe_bsr.callbacks import many_tasks as curves

    monkeypatch.setattr(curves, "POINTS", 2)

    class Kept:
        points: dict = {}

        def scalar(self, tag, value, step, run=""):
            self.points.setdefault(tag, {})[step] = value

    of = curves.Curves(Kept(), {})
    for step, loss in enumerate((1.0, 2.0, 6.0, 4.0, 5.0), 1):
        event = type("Event", (), {"step": step, "metrics": {"loss": loss}, "images_per_second": 1.0})
        of = curves.Curves(of.writer, json.loads(json.dumps(of.state())))  # as if saved to a checkpoint
        of.on_step(event, 6)
    assert Kept.points["train/loss"] == {3: 3.0}
    of._point(5)
    assert Kept.points["train/loss"] == {3: 3.0, 5: 4.5}


def test_each_task_has_one_chart_that_the_page_filters_by_name(events):
    tags = events.Runs()[VALIDATION]["scalars"]
    assert {tag for tag in tags if tag.startswith("accuracy/")} == {f"accuracy/{name}" for name in [*NAMES, ALL]}
    assert [tag for tag in tags if tag.startswith("loss/")] == [f"loss/{ALL}"]


def test_tasks_that_fell_most_are_listed():
    before = dict.fromkeys(NAMES, 50.0)
    found = worst_list(before | {"t001": 40.0, "t002": 45.0, "t003": 60.0}, before)
    fell = found.partition("What fell most")[2]
    assert re.findall(r"\| (t\d+) \| ([\d.]+) \| (\S+) ", fell) == [("t001", "40.0", "-10.0"), ("t002", "45.0", "-5.0")]


def test_the_worst_tasks_are_listed_and_tasks_have_no_hparams_columns(run, events):
    (point,) = events.Tensors(".", "tasks/text_summary")
    words = point.tensor_proto.string_val[0].decode()
    top1 = {line["task"]: line["top1"] for line in lines(run, "val")}
    assert re.findall(r"\| (t\d+) ", words)[:WORST] == sorted(top1, key=lambda name: top1[name])[:WORST]
    assert not [tag for tag in events.Runs()["."]["scalars"] if re.search(r"result/t\d", tag)]


def test_probes_are_run_on_a_few_tasks(run, report):
    assert probed == NAMES[:8]
    assert report["expert_use"]["5"].keys() == set(NAMES[:STEPS])  # expert use is counted for all trained tasks


def test_a_task_can_be_added(photos, run, tmp_path, report):
    config = added_task_config(run, f"{photos}/novel one/")
    done = moe_bsr.train(replace(config, train__penalty=1e-2), tmp_path / "more")
    assert list(done["tasks"]) == [*NAMES, "novel_one"]
    assert done["tasks"]["t007"]["val_top1" if "val_top1" in report["tasks"]["t007"] else "top1"] is not None


def test_the_short_report_lists_the_worst_and_best_tasks(report):
    found, names = markdown(report, whole=False), {f"t{n:03d}" for n in range(TASKS)}
    rows = [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("| ")]
    listed = [row for row in rows if row in names]
    assert len(listed) == WORST + BEST and f"({TASKS - WORST - BEST} more tasks in report.md)" in rows
    assert {"lower quartile", "mean of the worst 10", "mean"} <= set(rows)


def scores(top1: dict[str, float]) -> dict[str, dict]:
    one = dict.fromkeys(("top1_low", "top1_high", "top5", "mean_class_accuracy", "ece", "chance"), 1.0)
    one |= {"n": 4, "images_per_second": 9.0, "tokens_kept": 1.0, "expert_share": {}, "experts_used": {}}
    return {
        name: one | {"top1": value, "confusions": [{"true": f"a of {name}", "predicted": "b", "count": 1, "share": 1}]}
        for name, value in top1.items()
    }


def test_the_evaluation_table_lists_the_worst_and_best_tasks():
    found = table(scores({name: float(number) for number, name in enumerate(NAMES)}))
    listed = re.findall(r"^(t\d+)", found, re.M)
    assert listed == [*NAMES[:WORST], *NAMES[: -BEST - 1 : -1]]
    assert re.findall(r"a of (t\d+)", found) == NAMES[:WORST] and f"({TASKS - WORST - BEST} between)" in found
    assert "median" not in table(scores(dict.fromkeys(NAMES[:MANY], 1.0)))


def test_runs_are_compared_by_spread_and_by_the_tasks_that_changed_most(report):
    later = json.loads(json.dumps(report))
    for name, points in (("t003", -7.0), ("t030", 9.0), ("t050", 2.0)):
        later["tasks"][name]["top1"] += points
    rows = comparison({"one": report, "two": later}, intervals=False)
    assert rows[0][:4] == ["top-1 %", "tasks", "mean of tasks", "mean of the worst 10"] and rows[2][1] == str(TASKS)
    changed = most_changed({"one": report, "two": later})
    assert [(row[0], row[-1]) for row in changed[1:]] == [("t003", "-7.0"), ("t050", "+2.0"), ("t030", "+9.0")]
    assert most_changed({"one": report}) == []


def test_the_page_lists_the_extremes_and_folds_the_whole_table():
    section = accuracy.section({name: (number, TASKS) for number, name in enumerate(NAMES)})
    assert [len(each.rows) - 1 for each in section.tables] == [5, WORST, BEST, TASKS]
    assert [each.folded for each in section.tables] == [False, False, False, True]
    assert len(accuracy.section(dict.fromkeys(NAMES[:MANY], (1, 2))).tables) == 1


# --- the heatmap, and which tasks are shown ---


def routing(tasks: int, experts: int = 4) -> RoutingStatistics:
    statistics = RoutingStatistics([f"t{number}" for number in range(tasks)], experts)
    counts = np.random.default_rng(0).multinomial(500, np.random.default_rng(1).dirichlet([1.0] * experts), tasks)
    counts[3] = 0
    counts[5] = [0, 0, 0, 500]
    statistics._sums["counts"] = torch.tensor(counts)
    statistics._sums["tokens"] = torch.tensor(counts.sum(1) // 2)
    return statistics


def test_rows_are_sorted_by_the_most_used_expert_and_rows_without_data_come_last():
    shares = routing(30).shares("count")
    order = many_tasks.sorted_rows(shares).tolist()
    slow = sorted((row for row in range(30) if row != 3), key=lambda row: (shares[row].argmax(), -shares[row].max()))
    assert order == [*slow, 3]
    found = many_tasks.groups(shares[order])
    assert [stop for _, _, stop in found] == [start for _, start, _ in found][1:] + [30] and found[-1] == (-1, 29, 30)
    assert all((shares[order[i]].argmax() == label) for label, i, j in found[:-1] for i in range(i, j))


def test_tasks_with_the_most_unusual_routing_are_named():
    statistics = routing(30)
    rows = many_tasks.outstanding(statistics.shares("count"))
    assert rows[0] == 5 and len(rows) == WORST and 3 not in rows
    figure = many_tasks.heatmap(statistics, 7, "validation", 4)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {f"t{row}" for row in rows} <= texts and "Block 7: experts used by 30 tasks" in texts
    assert max(figure.get_size_inches()) * 72 < 1400  # pixels


def test_up_to_twelve_tasks_are_all_shown():
    few = {f"t{n}": float(n) for n in range(MANY)}
    assert not are_many(few) and shown(few) == list(few) and MANY == 12
    figure = many_tasks.heatmap(routing(MANY), 7, "validation")
    assert {f"t{n}" for n in range(MANY)} <= {text.get_text() for text in figure.axes[0].texts}
    notes = [f"t{n}: {n} images" for n in range(MANY)]
    assert condensed(notes, list(few)) == notes


def test_no_task_is_among_both_the_worst_and_the_best():
    for count in (1, 11, 14, 40):
        values = {f"t{n}": -float(n) for n in range(count)}
        worst, best = worst_and_best(values)
        assert worst == list(values)[::-1][:WORST] and not set(worst) & set(best)
        assert best == list(values)[: max(0, min(BEST, count - WORST))]


def test_notes_that_differ_only_in_task_and_numbers_are_merged():
    notes = [f"t{n:03d}: {n + 2} of 10.5 % images" for n in range(3)] + ["t009: broken link at a.jpg"]
    assert condensed(notes, NAMES) == [f"{notes[0]} (and 2 more tasks likewise)", notes[3]]
