"""The conflict index: equal updates of each task in both forms, its arithmetic, and the command."""

import json
from statistics import fmean

import pytest
from tiny_runs import SIZES, make_config

from moe_bsr import config as configuration
from moe_bsr.cli.conflict import conclusion, table
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError
from moe_bsr.fit import conflict
from moe_bsr.fit.conflict import Index
from moe_bsr.runs import report

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, bare):
    """A configuration's file, the folder of its runs, and the index."""
    folder = tmp_path_factory.mktemp("conflict")
    config = make_config(folder, train__warmup_steps=1, sampler__kind="proportional")
    (folder / "mine.yaml").write_text(configuration.dump(config))
    return folder / "mine.yaml", folder / "runs", conflict.measure(config, folder / "runs", 2, [0])


def test_every_task_has_as_many_updates_and_images_in_both_forms(measured):
    _, folder, found = measured
    assert list(found) == [*SIZES, "mean"]
    for form in conflict.FORMS:
        told = report.read(folder / f"{form}_0")
        assert {task: about["updates"] for task, about in told["tasks"].items()} == dict.fromkeys(SIZES, 2)
        assert {about["images"] for about in told["tasks"].values()} == {16}
    assert found["mean"].mean == pytest.approx(fmean(found[task].mean for task in SIZES))


def test_the_command_goes_on_from_finished_runs_and_the_table_tells_what_the_json_does(measured, capsys, monkeypatch):
    file, folder, found = measured
    monkeypatch.setattr(conflict.api.Trainer, "fit", lambda *_: pytest.fail("trained again"))
    assert main(["conflict", str(file), "--updates", "2", "--seeds", "0", "0", "--run", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seeds"] == [0] and told["split"] == "val"
    for task in SIZES:
        assert told["tasks"][task] == found[task].as_dict()
    text = table(found, "val")
    for name, index in found.items():
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert row.split()[1:] == [f"{index.shared[0]:.1f}", f"{index.apart[0]:.1f}", f"{index.mean:+.1f}", "-"]
    assert "One seed" in conclusion(found["mean"])


def test_other_updates_in_the_same_folder_are_refused(measured):
    file, folder, _ = measured
    with pytest.raises(ConfigError):
        conflict.measure(configuration.load(file), folder, 1, [0])


def test_the_interval_is_students_of_the_differences_by_seed():
    index = Index([50.0, 60.0, 40.0, 55.0], [52.0, 63.0, 41.0, 57.0])  # 2, 3, 1, 2: deviation sqrt(2 / 3)
    half = 3.182 * (2 / 3) ** 0.5 / 2
    assert index.mean == 2.0 and index.interval == pytest.approx((2 - half, 2 + half))
    assert conclusion(index).startswith("The tasks conflict")
    assert conclusion(Index(index.apart, index.shared)).startswith("The tasks help")
    assert conclusion(Index([50.0, 50.0], [51.0, 49.0])).startswith("Neither")


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)])
def test_students_t(freedom, expected):
    assert conflict.student(freedom) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(
    ("changes", "key"), [({"plan__train_blocks": [], "plan__moe_blocks": []}, "plan.train_blocks"), ({}, "tasks")]
)
def test_what_can_be_in_no_conflict_is_refused(tmp_path, changes, key):
    config = make_config(tmp_path, **changes)
    config = configuration.replace(config, tasks=config.tasks[:1]) if key == "tasks" else config
    with pytest.raises(ConfigError, match=f"^{key} = "):
        conflict.measure(config, tmp_path / "runs", 1, [0])
