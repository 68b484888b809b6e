"""moe-bsr compare-methods: rows, resumption, accuracy, tables and the page."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_config

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.benchmark import methods as cost
from moe_bsr.benchmark.method_page import as_markdown
from moe_bsr.benchmark.method_picture import _panels, front
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
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    (folder / "base.yaml").write_text(configuration.dump(make_config(folder, data__train_images=16)))
    (folder / "few.yaml").write_text(yaml.safe_dump(FEW, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def command(place):
    return ["compare-methods", str(place / "base.yaml"), "--file", str(place / "few.yaml"), "--rounds", "1", "--out"]


@pytest.fixture(scope="module")
def result(place, command):
    assert main([*command, str(place / "all.json")]) == 0
    return json.loads((place / "all.json").read_text())


def test_each_row_has_what_it_costs_predicted_and_measured(result):
    rows = {name: row["train_info"] for name, row in result["methods"].items()}
    assert list(rows) == list(FEW)
    for name in ("bsr", "lean"):
        about = rows[name]["cost"]
        assert about["kept_bytes"]["predicted"] == pytest.approx(about["kept_bytes"]["measured"], rel=0.02)
        # Scratch memory of kernels is most of so small a step.
        assert about["peak_bytes"]["predicted"] == pytest.approx(about["peak_bytes"]["measured"], rel=0.1)
    bsr, lean, plain = (rows[name]["cost"] for name in ("bsr", "lean", "plain"))
    assert lean["kept_bytes"]["measured"] < bsr["kept_bytes"]["measured"] < plain["kept_bytes"]["measured"]
    assert lean["optimizer_bytes"] < bsr["optimizer_bytes"] / 3
    assert lean["step_flops"] == pytest.approx(bsr["step_flops"], rel=1e-3)
    assert plain["trained_parameters"] == plain["parameters"] > bsr["trained_parameters"] > 0
    assert bsr["task_bytes"] == plain["task_bytes"] == 4 * 10 * 65
    assert rows["bsr"]["gradient"] == {"cosine": 1.0, "error": 0.0, "norm": 1.0} and rows["plain"]["gradient"] is None
    assert 0 < rows["lean"]["gradient"]["error"] < 0.1 and all(row["time"]["ratio"] > 0 for row in rows.values())
    assert result["methods"]["lean"]["meta_info"]["cost"]["torch"]


def test_a_finished_row_is_not_computed_again_and_a_new_stage_is(place, command, result, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(equal, "FACTORS", (1.0, 3.0))

    def race(base, folder, minutes, names, seeds, say, known):
        """`budgets.race` in this process: starting another takes longer than everything else here."""
        return {"runs": [budgets.run(*names, base, folder, *minutes, known) | {"seed": base.seed}]}

    monkeypatch.setattr(budgets, "race", race)
    monkeypatch.setattr(cost, "cost", lambda *_: asked.append("cost"))
    assert main([*command, str(place / "all.json")]) == 0 and not asked
    train = f"--train --updates 1 --minutes 0.02 --run {place / 'runs'} --methods bsr plain --seeds 3".split()
    capsys.readouterr()
    assert main([*command, str(place / "all.json"), *train]) == 0 and not asked
    told = json.loads((place / "all.json").read_text())["methods"]
    for name in ("bsr", "plain"):
        updates, raced = told[name]["train_info"]["equal_updates"], told[name]["train_info"]["equal_seconds"]["3"]
        assert updates["val_top1"] == max(updates["rates"].values()) and len(updates["rates"]) == 2
        assert raced["updates"] >= 1 and 0 <= raced["half_width"] < 50
    assert "equal_updates" not in told["lean"]["train_info"] and "val top-1" in capsys.readouterr().out
    assert main([*command, str(place / "all.json"), *train, "--updates", "2"]) == 2
    assert "plain has 1 updates, not 2" in capsys.readouterr().err
    del told["bsr"]["train_info"]["equal_seconds"]  # as if stopped in the timed run, whose folder is there
    kept = json.loads((place / "all.json").read_text()) | {"methods": told}
    (place / "stopped.json").write_text(json.dumps(kept))
    assert main([*command, str(place / "stopped.json"), *train, "4"]) == 0 and not asked
    resumed = json.loads((place / "stopped.json").read_text())
    for name in ("bsr", "plain"):
        runs = resumed["methods"][name]["train_info"]["equal_seconds"]
        assert [runs[seed]["seed"] for seed in ("3", "4")] == [3, 4] and len(runs) == 2
    assert runs["3"] == told["plain"]["train_info"]["equal_seconds"]["3"]
    page, panels = as_markdown({"stopped.json": resumed}), _panels(resumed)
    mean = sum(run["mean_top1"] for run in runs.values()) / 2
    assert "1\nupdates each" in page and f"| {mean:.1f} ± " in page
    assert [(y, [name for name, *_ in points]) for _, y, points, _ in panels] == [
        ("test top-1 %, 0.02 minutes", ["plain", "bsr"]),
        ("val top-1 %, 1 updates", ["plain", "bsr"]),
        ("val top-1 %, 1 updates", ["plain", "bsr"]),
    ]


def test_an_interrupted_run_is_no_result(place, command, result, monkeypatch, capsys):
    (place / "signal.json").write_text((place / "all.json").read_text().replace('"equal_', '"old_'))
    stopped = {"status": "interrupted", "signal": 15, "tasks": {"shapes": {"val_top1": 9.0}}}
    monkeypatch.setattr(api, "train", lambda *_, **__: stopped)
    assert main([*command, str(place / "signal.json"), "--train", "--methods", "bsr"]) == 128 + 15
    assert "the same command goes on" in capsys.readouterr().err
    assert "equal_updates" not in (place / "signal.json").read_text()


def test_a_file_of_another_base_is_not_added_to(place, command, result, capsys):
    assert main([*command, str(place / "all.json"), "train.batch_size=4"]) == 2
    assert "its base has another train" in capsys.readouterr().err
    assert main([*command, str(place / "new.json"), "plan.drop_blocks=[40]"]) == 2
    assert "method plain: plan.drop_blocks" in capsys.readouterr().err and not (place / "new.json").exists()


def test_a_file_that_is_older_than_a_key_is_added_to(place, command, result, monkeypatch, capsys):
    old = json.loads((place / "all.json").read_text())
    del old["base"]["tokens"]["reduce"], old["base"]["seed"]
    (place / "old.json").write_text(json.dumps(old))
    monkeypatch.setattr(cost, "cost", None)
    assert main([*command, str(place / "old.json")]) == 0
    assert main([*command, str(place / "old.json"), "tokens.reduce=merge"]) == 2
    assert "its base has another tokens" in capsys.readouterr().err


def test_page_and_picture_come_from_the_file_alone(place, result, capsys):
    picture = place / "images" / "fronts.png"
    command = ["compare-methods", "--from-json", str(place / "all.json"), "--picture", str(picture)]
    assert main([*command, "--markdown"]) == 0
    page = capsys.readouterr().out
    assert page == as_markdown({"all.json": json.loads((place / "all.json").read_text())}) + "\n"
    peak = result["methods"]["lean"]["train_info"]["cost"]["peak_bytes"]["measured"]
    assert "| lean | " in page and f"| {peak / 2**20:.0f} |" in page and "| 50 | 7 | theirs |" in page
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="installed without its results")
def test_the_page_is_up_to_date():
    files = sorted(RESULTS.glob("methods_*.json"))
    page = as_markdown({file.name: json.loads(file.read_text()) for file in files}) + "\n"
    assert (RESULTS.parent / "docs" / "methods.md").read_text() == page, "write it anew, as its head says"


def test_a_front_is_what_nothing_else_beats():
    points = [("a", 1, 5), ("b", 2, 5), ("c", 2, 7), ("d", 3, 6), ("e", 4, 8)]
    assert [name for name, *_ in front(points, True)] == ["a", "c", "e"]
    assert [name for name, *_ in front(points, False)] == ["a"]


def test_an_interval_of_a_mean_is_narrower_than_its_tasks():
    assert half_width({"a": 50.0}, {"a": 100}) == pytest.approx(9.8, abs=0.01)
    assert half_width({"a": 50.0, "b": 50.0}, {"a": 100, "b": 100}) == pytest.approx(9.8 / 2**0.5, abs=0.01)


def test_a_method_changes_keys_of_sections_and_whole_values():
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


def test_every_method_of_the_package_is_a_configuration_of_ours():
    base = configuration.load(packaged.find("configs", "deit_small_moe_bsr"))
    every = methods.read()
    assert list(every)[0] == "timm_full" and {"bsr", "moe_bsr", "full", "lora_all", "apla", "heads"} < set(every)
    assert all(method.of(base).tasks == base.tasks for method in every.values())
