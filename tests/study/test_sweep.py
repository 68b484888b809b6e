"""Sweeps: the runs they start, the runs they reuse, and the statistics of paired differences."""

import dataclasses
import json
import math
import statistics

import pytest
import yaml
from tiny_runs import LATE, TASKS, make_config

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError, packaged
from moe_bsr.study import plan, sweep
from moe_bsr.training.failures import NonFiniteLoss

ARMS = {"shared": {"set": ["plan.moe_blocks=[]"]}, "apart": {"set": ["plan.moe_blocks=[]", "mode=single_task"]}}


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a sweep file of two arms on two tiny tasks."""
    (tmp_path / "tiny.yaml").write_text(configuration.dump(make_config(tmp_path, **LATE)))

    def write(**changes):
        path = tmp_path / "pair.yaml"
        tree = {"config": str(tmp_path / "tiny.yaml"), "updates": 2, "seeds": [0], "arms": ARMS}
        path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("name", packaged.names("configs/sweeps"))
def test_packaged_sweeps_load_and_each_arm_is_a_valid_run(name):
    asked = plan.read(name)
    asked = dataclasses.replace(asked, config=asked.config or "conflict_scene")
    for arm in asked.arms:
        config = plan.config_of(asked, arm, 7, ["data.root=D"])
        assert config.seed == 7 and config.data.root == "D"
        each = config.train.steps // (1 if config.mode == "single_task" else len(config.task_names()))
        assert each == asked.updates


@pytest.mark.usefixtures("bare")
def test_arms_are_trained_seed_by_seed_and_finished_runs_are_reused(file, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["sweep", str(file()), "--run", str(out), "train.lr=1e-3"]
    assert main(call) == 0
    row = capsys.readouterr().out.splitlines()
    assert row[0].split()[0] == "top-1" and any(line.lstrip().startswith("apart") for line in row)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main([*call, "--seeds", "0", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == json.loads((out / "sweep.json").read_text()).keys()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert all(list(seeds) == ["0", "1"] for seeds in result["runs"].values())
    report = json.loads((out / "apart" / "1" / "report.json").read_text())
    assert report["split"] == "val" and report["config"]["train"]["lr"] == 1e-3
    assert report["steps"] == dict.fromkeys(TASKS, 2)
    assert result["runs"]["apart"]["1"]["top1"] == {task: about["top1"] for task, about in report["tasks"].items()}
    assert main(["sweep", str(file(split="test")), "--run", str(out), "train.lr=1e-3", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)["runs"]["apart"]["0"]["top1"]
    assert tested == {task: about["top1"] for task, about in api.evaluate(out / "apart" / "0", "test")["tasks"].items()}


@pytest.mark.usefixtures("bare")
def test_tuning_takes_the_value_with_the_best_validation_and_only_final_runs_are_tested(file, tmp_path, monkeypatch):
    started = []

    def train(config, folder, **options):
        started.append((folder.relative_to(tmp_path).as_posix(), config))
        score = 50 - abs(math.log10(config.train.lr / 1e-3)) + config.seed
        tasks = {task: {"top1": score} for task in TASKS}
        numbers = dict.fromkeys(("train_seconds", "predicted_peak_mb", "gflops_per_image"), 1.0)
        split = "test" if config.train.evaluate_test else "val"
        return {"status": "finished", "split": split, "tasks": tasks, **numbers}

    monkeypatch.setattr(sweep.api, "train", train)
    tune = {"key": "train.lr", "values": [1e-4, 1e-3], "updates": 1}
    result = sweep.run(plan.read(file(tune=tune, split="test", seeds=[3])), tmp_path, [])
    assert [name for name, _ in started] == [
        *(f"tune/{arm}_{rate}" for arm in ARMS for rate in ("0.0001", "0.001")),
        "shared/3",
        "apart/3",
    ]
    assert [config.train.evaluate_test for _, config in started] == [False] * 4 + [True] * 2
    assert {config.seed for _, config in started[:4]} == {100} and started[4][1].train.lr == 1e-3
    assert [config.train.steps for _, config in started] == [2, 2, 1, 1, 4, 2]
    assert result["tuned"]["apart"]["set"] == "train.lr=0.001"


def test_differences_have_students_interval_over_pairs_of_equal_seeds():
    def runs(*values):
        return {str(seed): {"top1": {"a": value}, "mean_top1": value} for seed, value in enumerate(values)}

    found = sweep.differences({"base": runs(10, 20, 30), "arm": runs(11, 24, 32), "alone": runs(9)}, "base")
    gains = [1, 4, 2]
    half = 4.303 * statistics.stdev(gains) / math.sqrt(3)
    mean = statistics.fmean(gains)
    assert found["arm"]["a"] == found["arm"]["mean"]
    assert found["arm"]["mean"]["each"] == gains
    assert (found["arm"]["mean"]["low"], found["arm"]["mean"]["high"]) == pytest.approx((mean - half, mean + half))
    assert found["alone"]["mean"] == {"mean": -1, "low": None, "high": None, "each": [-1]}
    assert sweep.in_words(found["alone"]["mean"]) == "-1.0" and "base" not in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [1, 1]}, "seeds"),
        ({"baseline": "none"}, "one of shared, apart"),
        ({"updates": 0}, "updates"),
        ({"arms": {}}, "arms"),
        ({"arm": {}}, "arm"),
        ({"tune": {"key": "train.lr", "values": [1.0], "updates": 1, "seed": 0}}, "tune.seed"),
        ({"config": None}, "no configuration"),
        ({"tune": {"key": "train.lr", "values": [], "updates": 1}}, "tune.values"),
        (
            {
                "tune": {"key": "train.lr", "values": [1.0], "updates": 1},
                "arms": {"shared": {}, "b": {"set": ["train.lr=1"]}},
            },
            "arms.b.set .* without train.lr",
        ),
    ],
)
def test_an_invalid_sweep_is_refused(file, change, said):
    with pytest.raises(ConfigError, match=said):
        plan.config_of(plan.read(file(**change)), "shared", 0, [])


def test_arms_with_different_tasks_are_refused_before_any_run(file, tmp_path):
    arms = {"one": {"set": [f"tasks=[{tmp_path}/shapes.yaml]"]}, "both": {}}
    with pytest.raises(ConfigError, match="arms.both: tasks = .* those of one: shapes"):
        sweep.run(plan.read(file(arms=arms)), tmp_path / "out", [])


def test_tuning_ignores_a_value_that_diverges(file, tmp_path, monkeypatch):
    def train(config, folder, **options):
        if config.train.lr == 1:
            raise NonFiniteLoss("diverged")
        return {"status": "finished", "tasks": {"a": {"top1": 5.0}}}

    monkeypatch.setattr(sweep.api, "train", train)
    asked = plan.read(file(tune={"key": "train.lr", "values": [1, 0.1], "updates": 1}))
    assert sweep._tuned(asked, "shared", tmp_path, [], print)["set"] == "train.lr=0.1"


def test_the_table_needs_no_baseline_and_shows_only_the_mean_of_many_tasks():
    numbers = {"train_seconds": 5.0, "predicted_peak_mb": 1.0, "gflops_per_image": 0.5, "mean_top1": 3.0}
    for count, columns in ((2, ["t0", "t1", "mean"]), (13, ["mean"])):
        run = numbers | {"top1": {f"t{i}": 3.0 for i in range(count)}}
        table = sweep.rows({"runs": {"arm": {"0": run}}, "baseline": "base", "differences": {}})
        assert table[0][1 : len(columns) + 1] == columns and {len(row) for row in table} == {len(columns) + 5}


def test_a_saved_result_is_shown_as_markdown(tmp_path, capsys):
    seeds = {
        str(seed): {"top1": {"a": 10.0 + seed}, "mean_top1": 10.0 + seed, "train_seconds": 5.0}
        | {"predicted_peak_mb": 100.0, "gflops_per_image": 0.5}
        for seed in range(2)
    }
    runs = {"base": seeds, "arm": {seed: numbers | {"mean_top1": 12.0} for seed, numbers in seeds.items()}}
    result = {"runs": runs, "baseline": "base", "differences": sweep.differences(runs, "base")}
    (tmp_path / "kept.json").write_text(json.dumps(result))
    assert main(["sweep", str(tmp_path / "kept.json"), "--show", "--markdown"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| arm | 10.5 | 12.0 | +1.5 [-4.9, +7.9] | 5 | 100 | 0.50 |"
    assert main(["sweep", str(tmp_path / "none.json"), "--show"]) == 2
    assert "none.json" in capsys.readouterr().err


def test_an_unknown_arm_is_named_in_the_error(file, capsys):
    assert main(["sweep", str(file()), "--arms", "shard"]) == 2
    assert "shard" in capsys.readouterr().err


def test_a_signal_ends_the_sweep_with_its_status(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.api, "train", lambda *a, **k: {"status": "interrupted", "signal": 15})
    assert main(["sweep", str(file()), "--run", str(tmp_path / "out")]) == 128 + 15
    assert "repeat the command to continue" in capsys.readouterr().err
