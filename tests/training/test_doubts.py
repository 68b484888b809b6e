"""Valid settings that harm a result give a warning with their numbers before the run; sound settings do not."""

from pathlib import Path

import pytest
from tiny_runs import make_config

from moe_bsr.api import train
from moe_bsr.cli.main import main
from moe_bsr.config import dump, from_dict, load
from moe_bsr.training.callback import Callback
from moe_bsr.training.doubts import doubts

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"a": 2000, "b": 3000}
CASES = [
    ({"train": {"lr": 0.5, "weight_decay": 0.0}}, ["train.lr = 0.5", "adamw"]),
    ({"train": {"lr": 0.01, "head_lr_scale": 90.0}}, ["x 90", "adamw"]),
    ({"train": {"lr": 50.0, "optimizer": "sgd", "weight_decay": 0.0}}, ["train.lr = 50", "sgd"]),
    ({"train": {"lr": 1e-9}}, ["train.lr = 1e-09", "1000 updates"]),
    ({"train": {"warmup_steps": 1000}}, ["rises in 1000 of 1000"]),
    ({"train": {"warmup_fraction": 0.9}}, ["rises in 900 of 1000"]),
    ({"train": {"weight_decay": 10.0}}, ["train.weight_decay = 10", "%"]),
    ({"train": {"optimizer": "sgd", "momentum": 0.9999}}, ["train.momentum = 0.9999", "1000"]),
    ({"train": {"grad_clip_norm": 1e-9}}, ["train.grad_clip_norm = 1e-09"]),
    ({"train": {"layer_decay": 0.01}}, ["train.layer_decay = 0.01", "1e-08"]),
    ({"train": {"ema_decay": 0.9998}}, ["train.ema_decay = 0.9998", "44,990 updates", "after 1000 it is 0.9911"]),
    ({"train": {"label_smoothing": 0.99}}, ["train.label_smoothing = 0.99"]),
    ({"train": {"class_weights": "balanced"}, "sampler": {"classes": "balanced"}}, ["both balanced"]),
    ({"backbone": {"weights": "random"}}, ["backbone.weights = random"]),
    ({"plan": {"keep_rate": 0.001}}, ["plan.keep_rate = 0.001", "0.10%"]),
    ({"moe": {"gate_noise": 1000.0}}, ["moe.gate_noise = 1000", "62.5"]),
    ({"moe": {"init_noise": 5.0}}, ["moe.init_noise = 5"]),
    ({"moe": {"balance_loss_weight": 100.0}}, ["moe.balance_loss_weight = 100"]),
    ({"data": {"crop_scale": [0.001, 0.002]}}, ["data.crop_scale", "0.2%"]),
    ({"train": {"task_weights": {"a": 1e-6}}}, ["train.task_weights: a", "2e-06"]),
]


def make(changes: dict, sizes: dict[str, int] = SIZES):
    return from_dict({"tasks": list(sizes)} | changes)


@pytest.mark.parametrize("changes, words", CASES)
def test_a_harmful_setting_gives_a_warning_with_its_numbers(changes, words):
    (line,) = doubts(make(changes), SIZES)
    assert all(word in line for word in words), line


def test_a_batch_larger_than_a_task_gives_a_warning():
    (line,) = doubts(make({"train": {"batch_size": 4096}}), {"a": 21, "b": 5000})
    assert "train.batch_size = 4096" in line and "a has 21" in line and "195 times" in line


@pytest.mark.parametrize("kind, lines", [("proportional", 1), ("temperature", 0), ("round_robin", 0), ("joint", 0)])
def test_a_task_with_few_updates_gives_a_warning_with_its_share(kind, lines):
    sizes = {"a": 50_000, "b": 60}
    found = doubts(make({"sampler": {"kind": kind}, "train": {"steps": 500}}), sizes)
    assert len(found) == lines
    assert not lines or all(word in found[0] for word in ("b gets 1 of 500 updates", "0.2%", "epochs of its 60"))


def test_a_task_without_updates_gives_a_warning():
    found = doubts(make({"train": {"steps": 1}}), SIZES)
    assert any("b gets 0 of 1 updates" in line for line in found)
    alone = make({"train": {"steps": 1}, "mode": "single_task"})
    assert not any("updates (" in line for line in doubts(alone, SIZES))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_configurations_in_the_repository_give_no_warning(name):
    config = load(CONFIGS / f"{name}.yaml")
    found = doubts(config, dict.fromkeys(config.task_names(), 5000))
    assert [line for line in found if not line.startswith("train.ema_decay")] == []


class StartRecorder(Callback):
    def on_start(self, start) -> None:
        self.lines = start.about


def test_warnings_are_shown_in_a_dry_run_and_at_the_start(tmp_path, capsys):
    config = make_config(tmp_path, train__batch_size=64, train__steps=2, train__evaluate_test=False)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert main(["train", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    train(config, tmp_path / "run", callbacks=[recorder := StartRecorder()])
    for lines in (capsys.readouterr().out.splitlines(), recorder.lines):
        assert any(line.startswith("warning: train.batch_size = 64, but shapes has 23 training") for line in lines)
