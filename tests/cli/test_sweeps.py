"""The research sweeps: which runs they make, and what they tell of them."""

import json
from types import SimpleNamespace

import pytest
from tiny_runs import TASKS, make_config

from moe_bsr.cli import sweep_variants
from moe_bsr.cli.main import main
from moe_bsr.config import load, packaged


@pytest.mark.usefixtures("bare")
def test_storages_are_compared_in_pairs_of_runs_that_are_kept(tmp_path, capsys):
    make_config(tmp_path)  # writes the task files
    tiny = "backbone.name=test_vit backbone.image_size=32 plan.train_blocks=[1,3,5] plan.drop_blocks=[1,3]"
    call = ["sweep-storages", "--data", str(tmp_path), "--weights", "random", "--out", str(tmp_path / "out")]
    call += ["--tasks", *(str(tmp_path / f"{task}.yaml") for task in TASKS), "--seeds", "0", "--steps", "2"]
    call += ["--set", *tiny.split(), "train.batch_size=8", "runtime.threads=1", "runtime.device=cpu"]
    assert main(call) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("| test top-1 %") :].splitlines()
    assert table[0].endswith("| int8, points |") and [row.split(" | ")[0] for row in table[2:]] == [
        f"| {task}" for task in TASKS
    ]
    result = json.loads((tmp_path / "out" / "storages.json").read_text())
    assert result["top1"].keys() == {"exact", "int8"} and result["top1"]["int8"].keys() == TASKS.keys()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert main(call) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert "\n".join(table) in capsys.readouterr().out


def test_variants_are_trained_at_the_rate_that_validates_best(tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, **options):
        values = dict(item.split("=", 1) for item in map(str, command) if "=" in item)
        config = load(packaged.find_config(command[4]), [f"{key}={value}" for key, value in values.items()])
        folder = command[command.index("--run") + 1]
        folder.mkdir(parents=True)
        score = {"tasks": {}, "selected_mean_val_top1": 50 - abs(config.train.lr - 1e-3)}
        (folder / "report.json").write_text(json.dumps(score))
        calls.append(SimpleNamespace(folder=folder.relative_to(tmp_path), config=config))

    monkeypatch.setattr(sweep_variants.subprocess, "run", run)
    call = ["sweep-variants", "--data", "D", "--weights", "W", "--out", str(tmp_path), "--variants", "last", "stl_bsr"]
    assert main([*call, "--grid", "1e-4", "1e-3", "--set", "train.batch_size=16"]) == 0
    chosen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["variant"], line["chosen"]) for line in chosen] == [("last", 1e-3), ("stl_bsr", 1e-3)]
    assert [str(call.folder) for call in calls[:3]] == ["grid/last_0.0001", "grid/last_0.001", "last"]
    grid, full, single = calls[1].config, calls[2].config, calls[5].config
    assert (grid.train.steps, full.train.steps, single.train.steps) == (75, 300, 60)  # single tasks: a fifth each
    assert (grid.train.evaluate_test, full.train.evaluate_test) == (False, True)
    assert single.mode == "single_task" and full.train.batch_size == 16 and full.data.root == "D"
