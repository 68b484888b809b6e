"""Every method within a budget has the same splits, a test and a length of its own."""

import math

import pytest
import torch
from tiny_runs import SIZES, make_config

from moe_bsr.config import ConfigError
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.study import budgets, rivals

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize("method", ["probe", "bsr", "moe_bsr", "full", "timm_full", "timm_lora"])
def test_a_method_fills_its_budget_and_is_tested(tmp_path, method):
    if method == "timm_lora":
        pytest.importorskip("peft", reason="LoRA is peft's")
    found = budgets.run(method, make_config(tmp_path), tmp_path / "run", 0.02)
    assert found["method"] == method and found["tasks"].keys() == SIZES.keys() and found["updates"] >= 1
    assert found["mean_top1"] == pytest.approx(sum(found["tasks"].values()) / len(SIZES))


def test_the_plain_network_learns_what_it_is_shown(tmp_path, monkeypatch):
    config = make_config(tmp_path, data__augment=False)
    clock = iter(range(10**6))
    monkeypatch.setattr(rivals.time, "monotonic", lambda: next(clock) / 60)  # sixty looks at the clock a second
    seen, cosine = [], math.cos
    monkeypatch.setattr(rivals.math, "cos", lambda x: seen.append(x) or cosine(x))
    runtime = budgets.prepare(config.runtime)
    tasks = {name: budgets.open_task(config, file) for name, file in config.task_files().items()}
    transforms = budgets.make_transforms(config, budgets.build(config, dict.fromkeys(tasks, 12)))
    network, heads, updates = rivals.train("timm_full", config, tasks, transforms, runtime, 1.0)
    assert len(seen) == updates and seen == sorted(seen) and seen[-1] < math.pi
    assert not network.training and isinstance(heads, torch.nn.ModuleDict) and set(heads) == set(SIZES)


def test_a_batch_has_every_image_once_an_epoch(tmp_path):
    config = make_config(tmp_path)
    data = budgets.open_task(config, config.task_files()["shapes"])
    size = config.train.batch_size
    batches = rivals._batches(data, config)
    first = [next(batches) for _ in range(len(data.train) // size)]
    assert len({int(p) for positions, _ in first for p in positions}) == size * len(first)
    assert all((epochs == 0).all() for _, epochs in first) and (next(batches)[1] == 1).all()


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="methods: magic is none of fit, probe"):
        budgets.race(make_config(tmp_path), tmp_path, [1.0], ["fit", "magic"], print)


def test_full_is_every_weight_of_every_block_whatever_else_the_plan_trains(tmp_path):
    config = make_config(tmp_path, adapter="lora", plan__moe_blocks=[], plan__train_weights="proj")
    model = build_on_meta(budgets._own("full", config), dict.fromkeys(SIZES, 2))
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.adapter_parameters
