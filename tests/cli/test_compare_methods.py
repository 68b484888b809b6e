"""Test moe-bsr compare-methods: costs, resumption, accuracy, the tables and the page."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_config

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.benchmark import methods as cost
from moe_bsr.benchmark.method_page import as_markdown
from moe_bsr.benchmark.method_picture import Point, _panels, front
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError, methods, packaged
from moe_bsr.config.methods import Method
from moe_bsr.evaluation.metrics import half_width
from moe_bsr.study import budgets, equal

pytestmark = pytest.mark.usefixtures("bare")
RESULTS = Path(__file__).resolve().parents[2] / "results"
FEW = {
    "plain": {"title": "timm", "code": "timm"},
    "bsr": {"title": "the plan", "changes": {"plan": {"moe_blocks": []}}},
    "lean": {
        "title": "less memory",
        "source": "a paper",
        "changes": {
            "plan": {"moe_blocks": []},
            "storage": "int8",
            "train": {"optimizer": "adamw8", "grad_accumulation_steps": 2},
        },
        "published": [{"backbone": "DeiT-S", "task": "shapes", "top1": 50, "memory_mb": 7, "rule": "theirs"}],
    },
    "solved": {
        "title": "heads",
        "code": "probe",
        "changes": {"plan": {"drop_blocks": [], "keep_rate": 1.0, "head_blocks": [2, 4]}, "train": {"batch_size": 4}},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    (folder / "base.yaml").write_text(configuration.dump(make_config(folder, data__train_images=16)))
    (folder / "few.yaml").write_text(yaml.safe_dump(FEW, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def command(root):
    return ["compare-methods", str(root / "base.yaml"), "--file", str(root / "few.yaml"), "--rounds", "1", "--out"]


@pytest.fixture(scope="module")
def result(root, command):
    assert main([*command, str(root / "all.json")]) == 0
    return json.loads((root / "all.json").read_text())


def test_each_method_has_its_predicted_and_measured_costs(result):
    rows = {name: row["train_info"] for name, row in result["methods"].items()}
    assert list(rows) == list(FEW)
    for name in ("bsr", "lean"):
        about = rows[name]["cost"]
        assert about["kept_bytes"]["predicted"] == pytest.approx(about["kept_bytes"]["measured"], rel=0.02)
        # In a step this small, most of the peak is scratch memory of kernels.
        assert about["peak_bytes"]["predicted"] == pytest.approx(about["peak_bytes"]["measured"], rel=0.1)
    bsr, lean, plain = (rows[name]["cost"] for name in ("bsr", "lean", "plain"))
    assert lean["kept_bytes"]["measured"] < bsr["kept_bytes"]["measured"] < plain["kept_bytes"]["measured"]
    assert lean["optimizer_bytes"] < bsr["optimizer_bytes"] / 3
    assert lean["step_flops"] == pytest.approx(bsr["step_flops"], rel=1e-3)
    assert plain["trained_parameters"] == plain["parameters"] > bsr["trained_parameters"] > 0
    assert bsr["task_bytes"] == plain["task_bytes"] == 4 * 10 * 65
    assert rows["bsr"]["gradient"] == {"cosine": 1.0, "error": 0.0, "norm": 1.0} and rows["plain"]["gradient"] is None
    assert 0 < rows["lean"]["gradient"]["error"] < 0.1
    assert rows.pop("solved")["time"] is None and all(row["time"]["ratio"] > 0 for row in rows.values())
    assert result["methods"]["lean"]["meta_info"]["cost"]["torch"]


def test_a_probe_needs_its_weights_one_batch_and_the_features_of_its_images(result):
    about = result["methods"]["solved"]["train_info"]
    cost, bsr = about["cost"], result["methods"]["bsr"]["train_info"]["cost"]
    width = 3 * 64  # class tokens of the output and of two blocks
    features, head = 4 * 1000 * width, 4 * 10 * (width + 1)
    assert cost["kept_bytes"] == {"predicted": None, "measured": 4.0 * width} and cost["task_bytes"] == head
    weights = 4 * cost["parameters"]
    # The features are joined while all parts still exist, and standardized features are copies.
    assert weights + 2 * features < cost["peak_bytes"]["measured"] < weights + 5 * features
    assert about["gradient"] is None and bsr["step_flops"] > 0 < cost["step_flops"]


def test_only_missing_stages_of_a_method_are_computed(root, command, result, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(equal, "FACTORS", (1.0, 3.0))

    def race(base, folder, minutes, names, seeds, say, known):
        """Run `budgets.race` in this process, because starting another one takes longer than the whole test."""
        return {"runs": [budgets.run(*names, base, folder, *minutes, known) | {"seed": base.seed}]}

    monkeypatch.setattr(budgets, "race", race)
    monkeypatch.setattr(cost, "cost", lambda *_: asked.append("cost"))
    assert main([*command, str(root / "all.json")]) == 0 and not asked
    train = f"--train --updates 1 --minutes 0.02 --run {root / 'runs'} --methods bsr plain solved --seeds 3".split()
    capsys.readouterr()
    assert main([*command, str(root / "all.json"), *train]) == 0 and not asked
    rows = json.loads((root / "all.json").read_text())["methods"]
    for name in ("bsr", "plain"):
        updates, raced = rows[name]["train_info"]["equal_updates"], rows[name]["train_info"]["equal_seconds"]["3"]
        assert updates["val_top1"] == max(updates["rates"].values()) and len(updates["rates"]) == 2
        assert raced["updates"] >= 1 and 0 <= raced["half_width"] < 50
    assert rows["solved"]["train_info"]["equal_updates"] is None
    assert rows["solved"]["train_info"]["equal_seconds"]["3"]["mean_top1"] > 0
    assert "equal_updates" not in rows["lean"]["train_info"] and "val top-1" in capsys.readouterr().out
    assert main([*command, str(root / "all.json"), *train, "--updates", "2"]) == 2
    assert "plain has 1 updates, not 2" in capsys.readouterr().err
    del rows["bsr"]["train_info"]["equal_seconds"]  # as if stopped in the timed run, whose folder exists
    kept = json.loads((root / "all.json").read_text()) | {"methods": rows}
    (root / "stopped.json").write_text(json.dumps(kept))
    assert main([*command, str(root / "stopped.json"), *train, "4"]) == 0 and not asked
    resumed = json.loads((root / "stopped.json").read_text())
    for name in ("bsr", "plain"):
        runs = resumed["methods"][name]["train_info"]["equal_seconds"]
        assert [runs[seed]["seed"] for seed in ("3", "4")] == [3, 4] and len(runs) == 2
    assert runs["3"] == rows["plain"]["train_info"]["equal_seconds"]["3"]
    page, panels = as_markdown({"stopped.json": resumed}), _panels(resumed)
    mean = sum(run["mean_top1"] for run in runs.values()) / 2
    assert "1\nupdates each" in page and f"| {mean:.1f} ± " in page
    assert [(y, [name for name, *_ in points]) for _, y, points, _ in panels] == [
        ("test top-1 %, 0.02 minutes", ["plain", "bsr", "solved"]),
        ("val top-1 %, 1 updates", ["plain", "bsr"]),
        ("val top-1 %, 1 updates", ["plain", "bsr"]),
    ]


def test_an_interrupted_run_is_not_stored_as_a_result(root, command, result, monkeypatch, capsys):
    (root / "signal.json").write_text((root / "all.json").read_text().replace('"equal_', '"old_'))
    stopped = {"status": "interrupted", "signal": 15, "tasks": {"shapes": {"val_top1": 9.0}}}
    monkeypatch.setattr(api, "train", lambda *_, **__: stopped)
    assert main([*command, str(root / "signal.json"), "--train", "--methods", "bsr"]) == 128 + 15
    assert "the same command goes on" in capsys.readouterr().err
    assert "equal_updates" not in (root / "signal.json").read_text()


def test_results_of_another_base_configuration_are_refused(root, command, result, capsys):
    assert main([*command, str(root / "all.json"), "train.batch_size=4"]) == 2
    assert "its base has another train" in capsys.readouterr().err
    assert main([*command, str(root / "new.json"), "plan.drop_blocks=[40]"]) == 2
    assert "method plain: plan.drop_blocks" in capsys.readouterr().err and not (root / "new.json").exists()


def test_results_written_before_a_key_existed_are_extended(root, command, result, monkeypatch, capsys):
    old = json.loads((root / "all.json").read_text())
    del old["base"]["tokens"]["reduce"], old["base"]["seed"]
    (root / "old.json").write_text(json.dumps(old))
    monkeypatch.setattr(cost, "cost", None)
    assert main([*command, str(root / "old.json")]) == 0
    assert main([*command, str(root / "old.json"), "tokens.reduce=merge"]) == 2
    assert "its base has another tokens" in capsys.readouterr().err


def test_page_and_picture_come_from_the_file_alone(root, result, capsys):
    picture = root / "images" / "fronts.png"
    command = ["compare-methods", "--from-json", str(root / "all.json"), "--picture", str(picture)]
    assert main([*command, "--markdown"]) == 0
    page = capsys.readouterr().out
    assert page == as_markdown({"all.json": json.loads((root / "all.json").read_text())}) + "\n"
    peak = result["methods"]["lean"]["train_info"]["cost"]["peak_bytes"]["measured"]
    assert "| lean | " in page and f"| {peak / 2**20:.0f} |" in page and "| 50 | 7 | theirs |" in page
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="installed without its results")
def test_the_page_is_up_to_date():
    files = sorted(RESULTS.glob("methods_*.json"))
    page = as_markdown({file.name: json.loads(file.read_text()) for file in files}) + "\n"
    assert (RESULTS.parent / "docs" / "methods.md").read_text() == page, "write it anew, as its head says"


def test_the_front_holds_the_points_that_no_other_point_dominates():
    points = [Point(*each) for each in [("a", 1, 5), ("b", 2, 5), ("c", 2, 7), ("d", 3, 6), ("e", 4, 8)]]
    assert [name for name, *_ in front(points, True)] == ["a", "c", "e"]
    assert [name for name, *_ in front(points, False)] == ["a"]


def test_the_confidence_interval_of_a_mean_over_tasks_is_narrower_than_that_of_a_task():
    assert half_width({"a": 50.0}, {"a": 100}) == pytest.approx(9.8, abs=0.01)
    assert half_width({"a": 50.0, "b": 50.0}, {"a": 100, "b": 100}) == pytest.approx(9.8 / 2**0.5, abs=0.01)


def test_a_method_changes_single_keys_of_sections_and_replaces_other_values():
    base = configuration.from_dict({"adapter": {"kind": "lora", "rank": 4}, "train": {"lr": 1e-3}})
    method = Method(title="x", changes={"adapter": {"kind": "adaptformer"}, "plan": {"moe_blocks": []}}, lr_scale=2)
    changed = method.of(base)
    assert changed.adapter == {"kind": "adaptformer"} and changed.plan.moe_blocks == []
    assert changed.plan.train_blocks == base.plan.train_blocks and changed.train.lr == 2e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {title: x, chanes: {}}", "unknown key a.chanes; did you mean 'a.changes'"),
        ("a: {title: x, code: timm, changes: {seed: 1}}", "none with code: timm"),
        ("[1]", "expected names of methods"),
    ],
)
def test_a_methods_file_is_read_strictly(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        methods.read(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="method 'bsrr': one of .*did you mean 'bsr'"):
        methods.read(names=["bsrr"])


def test_every_packaged_method_gives_a_valid_configuration():
    base = configuration.load(packaged.find("configs", "deit_small_moe_bsr"))
    every = methods.read()
    assert list(every)[0] == "timm_full" and {"bsr", "moe_bsr", "full", "lora_all", "apla", "heads"} < set(every)
    assert all(method.of(base).tasks == base.tasks for method in every.values())
