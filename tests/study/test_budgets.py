"""Methods at equal training time: all use the same splits, are tested, and fill their time."""

import contextlib
import math

import pytest
import torch
from tiny_runs import SIZES, make_config

from moe_bsr.config import ConfigError
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.study import budgets, budgets_picture, rivals
from moe_bsr.visualize.theme import figure

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize("method", ["probe", "bsr", "moe_bsr", "full", "timm_full", "timm_lora"])
def test_a_method_fills_its_budget_and_is_tested(tmp_path, method):
    if method == "timm_lora":
        pytest.importorskip("peft", reason="LoRA is peft's")
    found = budgets.run(method, make_config(tmp_path), tmp_path / "run", 0.005)
    assert found["method"] == method and found["tasks"].keys() == SIZES.keys() and found["updates"] >= 1
    assert found["mean_top1"] == pytest.approx(sum(found["tasks"].values()) / len(SIZES))


def test_a_plain_timm_network_follows_a_cosine_schedule_over_its_time(tmp_path, monkeypatch):
    config = make_config(tmp_path, data__augment=False)
    clock = iter(range(10**6))
    monkeypatch.setattr(rivals.time, "monotonic", lambda: next(clock) / 60)  # sixty reads of the clock per second
    seen, cosine = [], math.cos
    monkeypatch.setattr(rivals.math, "cos", lambda x: seen.append(x) or cosine(x))
    runtime = budgets.prepare(config.runtime)
    tasks = {name: budgets.open_task(config, file) for name, file in config.task_files().items()}
    transforms = budgets.make_transforms(config, budgets.build(config, dict.fromkeys(tasks, 12)))
    network, heads, updates = rivals.train("timm_full", config, tasks, transforms, runtime, 1.0)
    assert len(seen) == updates and seen == sorted(seen) and seen[-1] < math.pi
    assert not network.training and isinstance(heads, torch.nn.ModuleDict) and set(heads) == set(SIZES)


def test_at_least_one_update_is_taken_if_the_time_is_already_over(tmp_path):
    config = make_config(tmp_path)
    tasks = {name: budgets.open_task(config, file) for name, file in config.task_files().items()}
    transforms = budgets.make_transforms(config, budgets.build(config, dict.fromkeys(tasks, 12)))
    for seconds in (-1.0, 0.0):
        assert rivals.train("timm_full", config, tasks, transforms, budgets.prepare(config.runtime), seconds)[2] == 1


def test_no_image_repeats_within_an_epoch(tmp_path):
    config = make_config(tmp_path)
    data = budgets.open_task(config, config.task_files()["shapes"])
    size = config.train.batch_size
    batches = rivals._batches(data, config)
    first = [next(batches) for _ in range(len(data.train) // size)]
    assert len({int(p) for positions, _ in first for p in positions}) == size * len(first)
    assert all((epochs == 0).all() for _, epochs in first) and (next(batches)[1] == 1).all()


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="methods: magic is none of fit, timm_full"):
        budgets.race(make_config(tmp_path), tmp_path, [1.0], ["fit", "magic"], [0], print)


@pytest.fixture
def raced(monkeypatch):
    """Record the runs that a race asks for, in order, instead of training them."""
    asked = []

    class InThisProcess:
        def __init__(self, *_):
            self.Pool = lambda processes: contextlib.nullcontext(self)

        def apply(self, work, arguments):
            method, config, folder, minutes, _ = arguments
            asked.append((method, minutes, config.seed))
            if method == "stops":
                raise RuntimeError("stopped")
            top1 = {"shapes": 10 * minutes + config.seed, "petals": 50.0}
            about = {"seconds": 60 * minutes, "mean_top1": sum(top1.values()) / 2, "tasks": top1, "peak_mb": 7.0}
            return {"method": method, "minutes": minutes, **about} | ({} if method == "fit" else {"updates": 3})

    monkeypatch.setattr(budgets.multiprocessing, "get_context", InThisProcess)
    return asked


def test_a_race_resumes_where_it_stopped_and_accepts_more_seeds(tmp_path, raced):
    def race(seeds, methods=("fit", "bsr"), folder=tmp_path / "race"):
        known = dict.fromkeys(("bsr", "stops"))
        return budgets.race(config, folder, [1.0, 2.0], list(methods), seeds, lambda line: None, known)

    config = make_config(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        race([0], ["fit", "stops", "bsr"])
    assert raced == [("fit", 1.0, 0), ("stops", 1.0, 0)]
    raced.clear()
    race([0, 2, 2], ["fit", "bsr", "fit"])  # repeats run once, or they would count as seeds that agree
    first, second = [("fit", 1.0, 2), ("bsr", 1.0, 2)], [("fit", 2.0, 2), ("bsr", 2.0, 2)]
    assert raced == [("bsr", 1.0, 0), *first, ("fit", 2.0, 0), ("bsr", 2.0, 0), *second]
    raced.clear()
    result = race([0, 2])
    assert not raced and len(result["runs"]) == 8
    head, row, *_ = budgets.table(result)
    # Student's t interval of two values: 12.7 times half their difference.
    assert dict(zip(head, row, strict=True)) == {
        "test top-1 %": "fit", "minutes": "1", "shapes": "11.0", "petals": "50.0", "mean": "30.5 [24.1, 36.9]",
        "seeds": "2", "s": "60", "updates": "-", "MB": "7",
    }  # fmt: skip


def test_results_from_another_machine_are_refused(tmp_path, raced, monkeypatch):
    budgets.race(make_config(tmp_path), tmp_path, [1.0], ["fit"], [0], lambda line: None)
    monkeypatch.setattr(budgets, "environment", lambda runtime: {"threads": 64})
    with pytest.raises(ConfigError, match="budgets.json is from another machine"):
        budgets.race(make_config(tmp_path), tmp_path, [1.0], ["fit"], [1], lambda line: None)


def test_the_figure_labels_each_method_at_its_last_point(tmp_path, raced, monkeypatch):
    result = budgets.race(make_config(tmp_path), tmp_path, [1.0, 4.0], ["fit", "bsr"], [0, 1], lambda line: None)
    result["runs"] += [result["runs"][0] | {"method": "a_short_one", "minutes": 1.0}]
    drawn = []
    monkeypatch.setattr(budgets_picture.theme, "figure", lambda *size: drawn.append(figure(*size)) or drawn[0])
    budgets_picture.draw(result, tmp_path / "minutes.png")
    (axis,) = drawn[0].axes
    assert sorted(text.get_text() for text in axis.texts) == ["bsr  45.2", "fit  45.2"]
    assert len({text.xy[1] for text in axis.texts}) == 2 and len(axis.collections) == 2
    assert (tmp_path / "minutes.png").stat().st_size > 5000


def test_method_full_trains_every_weight_whatever_the_plan_says(tmp_path):
    config = make_config(tmp_path, adapter="lora", plan__moe_blocks=[], plan__train_weights="proj")
    model = build_on_meta(budgets._own("full", config), dict.fromkeys(SIZES, 2))
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.adapter_parameters
