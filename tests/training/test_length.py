"""The length of a run: its units, a longer length on resume, and early stopping. Resumed runs are bitwise equal."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import LATE, SIZES, act_at, make_config, make_trainer, script_scores

from moe_bsr.api import train
from moe_bsr.config import Config, ConfigError, SamplerConfig, TrainConfig, from_dict, load, replace
from moe_bsr.data.sampler import MultitaskSampler
from moe_bsr.runs import report
from moe_bsr.runtime.distributed import Alone
from moe_bsr.selftest import kills
from moe_bsr.training import pace
from moe_bsr.training.length import Length, described, in_updates, updates_of
from moe_bsr.training.optim import learning_rate

pytestmark = pytest.mark.usefixtures("bare")

QUIET = LATE | {"train__evaluate_test": False, "train__warmup_steps": 1}


def stop_at(monkeypatch, step: int, config: Config, folder: Path, resume: bool = False) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, folder, resume, callbacks=[])["status"] == "interrupted"


def rows(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "lr" in line]


# --- units ---


@pytest.mark.parametrize(
    "changes, updates",
    [
        ({"train__steps": 7}, 7),
        ({"train__epochs": 2}, 19),  # 74 images in batches of eight
        ({"train__epochs": 0.001}, 1),
        ({"train__epochs": 2, "sampler__kind": "joint"}, 10),
        ({"train__epochs": 2, "mode": "single_task"}, 13),  # the longer of the two runs
        ({"train__minutes": 2}, None),
    ],
)
def test_epochs_count_the_images_of_all_tasks(tmp_path, changes, updates):
    config = make_config(tmp_path, **changes)
    assert updates_of(config, SIZES) == updates
    assert str(updates or "2 minutes") in described(config, SIZES)


def test_one_unit_of_length_replaces_another(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 5, lr: 0.5}")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ntrain: {epochs: 3}")
    lengths = [(c.train.steps, c.train.epochs, c.train.minutes, c.train.lr) for c in (
        load(tmp_path / "b.yaml"), load(tmp_path / "b.yaml", ["train.minutes=2"]), load(tmp_path / "a.yaml"),
        replace(load(tmp_path / "b.yaml"), train__steps=8), load(tmp_path / "a.yaml", ["train.epochs=null"]),
    )]  # fmt: skip
    assert lengths == [(None, 3, None, 0.5), (None, None, 2, 0.5), (5, None, None, 0.5), (8, None, None, 0.5)] + [
        (5, None, None, 0.5)
    ]
    assert TrainConfig().steps == 1000
    for both in ({"steps": 5, "minutes": 1}, {"epochs": 1, "minutes": 1}):
        with pytest.raises(ConfigError, match=r"train\.minutes = 1.0: null with train\.(steps|epochs)"):
            from_dict({"train": both})


@pytest.mark.parametrize(
    "train, words",
    [
        ({"epochs": 0}, "train.epochs = 0.0: above 0"),
        ({"minutes": -1}, "train.minutes = -1.0: above 0"),
        ({"patience": 2}, "train.patience = 2: needs train.eval_every"),
        ({"patience": 2, "eval_every": 3, "checkpoint_selection": "last"}, "train.patience = 2: needs"),
        ({"patience": 0, "eval_every": 3}, "train.patience = 0: at least 1"),
    ],
)
def test_invalid_lengths_are_refused_with_their_key(train, words):
    with pytest.raises(ConfigError) as refusal:
        from_dict({"train": train})
    assert words in str(refusal.value)


# --- the schedule ---


def test_the_constant_rate_decays_over_the_last_fifth():
    config = TrainConfig(steps=20, lr=1.0, min_lr=0.2, warmup_steps=2, schedule="constant_then_decay")
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates == pytest.approx([0.5, 1.0] + [1.0] * 15 + [0.8, 0.6, 0.4])
    short = TrainConfig(steps=1, lr=1.0, warmup_steps=0, schedule="constant_then_decay")
    assert learning_rate(short, 0) == 1.0


@pytest.mark.parametrize("kind", ["round_robin", "proportional", "temperature", "joint", "exhaust"])
def test_a_sampler_of_a_longer_run_keeps_the_earlier_order_and_skips_nothing(kind):
    sizes, config = {"a": 30, "b": 90, "c": 300}, SamplerConfig(kind=kind)
    short, middle = (MultitaskSampler(sizes, 4, steps, config, 0) for steps in (130, 250))
    grown = MultitaskSampler(sizes, 4, 400, config, 0, earlier=[(130, 130), (150, 250)])
    assert [grown.tasks(step) for step in range(130)] == [short.tasks(step) for step in range(130)]
    assert [grown.tasks(step) for step in range(130, 150)] == [middle.tasks(step) for step in range(130, 150)]
    visits = dict.fromkeys(sizes, 0)
    for task, positions, _ in grown.batches():
        assert positions.tolist() == grown.batch(task, visits[task])[0].tolist()
        visits[task] += 1
    assert {task: done["updates"] for task, done in grown.progress(400).items()} == visits


# --- a length that grows ---


def test_a_run_extended_before_its_decay_equals_the_longer_run(tmp_path, monkeypatch):
    config = make_config(tmp_path, **QUIET, train__schedule="constant_then_decay", train__ema_decay=0.5)
    longer = replace(config, train__steps=12)
    train(longer, tmp_path / "whole", callbacks=[])
    stop_at(monkeypatch, 4, config, tmp_path / "grown")
    train(longer, tmp_path / "grown", resume=True, callbacks=[])
    assert not kills.differing(tmp_path / "grown", kills.outcome(tmp_path / "whole"))


def test_a_finished_run_continues_at_the_rate_of_the_longer_schedule(tmp_path, monkeypatch):
    config = make_config(tmp_path, **QUIET, train__steps=3, sampler__kind="temperature")
    longer = replace(config, train__steps=7)
    for folder in ("once", "twice"):
        train(config, tmp_path / folder, callbacks=[])
    grown = train(longer, tmp_path / "once", resume=True, callbacks=[])
    assert grown["status"] == "finished" and grown["step"] == 7 and train(longer, tmp_path / "once", True) == grown
    rates = [row["lr"] for row in rows(tmp_path / "once")]
    assert rates[:3] == pytest.approx([learning_rate(config.train, step) for step in range(3)])
    assert rates[3:] == pytest.approx([learning_rate(longer.train, step) for step in range(3, 7)])
    counts = [row["task"] for row in rows(tmp_path / "once")]
    assert {task: about["updates"] for task, about in grown["tasks"].items()} == {t: counts.count(t) for t in SIZES}
    stop_at(monkeypatch, 5, longer, tmp_path / "twice", resume=True)
    train(longer, tmp_path / "twice", resume=True, callbacks=[])
    assert not kills.differing(tmp_path / "twice", kills.outcome(tmp_path / "once"))


def test_each_run_of_a_series_is_extended(tmp_path):
    config = make_config(tmp_path, **QUIET, mode="single_task", train__steps=1)
    train(config, tmp_path / "run", callbacks=[])
    grown = train(replace(config, train__steps=2), tmp_path / "run", resume=True, callbacks=[])
    assert grown["steps"] == dict.fromkeys(SIZES, 2) and grown["status"] == "finished"


@pytest.fixture(scope="module")
def two_update_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    config = make_config(folder, **QUIET, train__steps=2)
    train(config, folder / "run", callbacks=[])
    return config, folder / "run"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__steps": 1}, "train.steps was 2, now 1"),
        ({"train__steps": 4, "train__lr": 0.5}, "changed: train.lr was 0.01, now 0.5;"),
        ({"train__epochs": 9}, "train.epochs was None, now 9.0; train.steps was 2, now None"),
        ({"train__schedule": "constant_then_decay"}, "train.schedule"),
        ({"train__patience": 2, "train__eval_every": 1}, "train.patience"),
    ],
)
def test_other_keys_may_not_change_and_the_length_may_not_shrink(two_update_run, changes, words):
    config, folder = two_update_run
    with pytest.raises(ConfigError, match="its length may grow") as refusal:
        train(replace(config, **changes), folder, resume=True, callbacks=[])
    assert words in str(refusal.value)


# --- minutes ---


def test_a_run_of_minutes_equals_the_run_of_as_many_steps(tmp_path, monkeypatch):
    config = make_config(
        tmp_path, **QUIET, train__ema_decay=0.5, moe__balance_loss="across_tasks", moe__gate_noise=1.0, train__steps=4
    )
    train(config, tmp_path / "steps", callbacks=[])
    minutes = replace(config, train__minutes=3)
    with monkeypatch.context() as patch:
        patch.setattr(pace, "MEASURED", 3)
        patch.setattr(pace, "_within", lambda *arguments: 4)
        stop_at(monkeypatch, 2, minutes, tmp_path / "minutes")
        patch.setattr(pace, "updates_within", None)  # the recorded number of updates is used
        done = train(minutes, tmp_path / "minutes", resume=True, callbacks=[])
    assert done["planned_steps"] == 4 and done["config"]["train"]["minutes"] == 3
    assert not kills.differing(tmp_path / "minutes", kills.outcome(tmp_path / "steps"))


def test_more_minutes_give_more_updates_at_the_measured_speed(tmp_path):
    trainer = make_trainer(make_config(tmp_path, train__minutes=1), tmp_path / "run")
    trainer.state.step, trainer.state.seconds, trainer.state.length = 10, 5.0, Length(60, 0.5)
    assert any("120 updates" in note for note in trainer._decide_length())
    assert trainer.state.length == Length(120, 1.0, [(10, 60)]) and trainer.planned.train.steps == 120


@pytest.mark.parametrize("seconds, updates", [(1, 5), (2, 10), (4, 30), (0, 1), (1e12, 10**7)])
def test_the_estimate_uses_the_faster_speed_after_the_first_epoch(seconds, updates):
    assert pace._within(seconds, new=10, first=0.2, later=0.1) == updates


def test_the_mean_time_leaves_out_the_first_and_the_slowest_update():
    first_has_more_to_do = [9.0, 1.0, 50.0, 1.2]
    assert pace._mean(first_has_more_to_do) == pytest.approx(1.1)


def test_a_run_that_would_exceed_its_minutes_has_fewer_updates_and_their_schedule(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, **QUIET, train__minutes=3, sampler__kind="temperature")
    monkeypatch.setattr(pace, "updates_within", lambda *arguments: 12)

    def steps(deadline: pace.Deadline, seconds: float) -> int:
        return 7 if deadline.trainer.state.step >= 4 else 12

    monkeypatch.setattr(pace.Deadline, "steps_after", steps)
    done = train(config, tmp_path / "whole")
    assert "7 updates instead of 12" in capsys.readouterr().out
    assert (done["status"], done["step"], done["planned_steps"]) == ("finished", 7, 7)
    planned = [in_updates(config, number).train for number in (12, 7)]
    rates = [row["lr"] for row in rows(tmp_path / "whole")]
    assert rates == pytest.approx([learning_rate(planned[step >= 4], step) for step in range(7)])
    stop_at(monkeypatch, 5, config, tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True, callbacks=[])
    assert not kills.differing(tmp_path / "stopped", kills.outcome(tmp_path / "whole"))


def deadline(minutes: float | None, spent: float, new: int = 0, warmup: int | None = None) -> pace.Deadline:
    """Return the deadline of a run of 40 updates after 19 of them, which took `spent` seconds."""
    train = SimpleNamespace(steps=40, warmup_steps=warmup, minutes=minutes)
    made = object.__new__(pace.Deadline)
    made.trainer = SimpleNamespace(
        state=SimpleNamespace(step=20, seconds=spent),
        planned=SimpleNamespace(train=train),
        config=SimpleNamespace(train=train),
        ranks=Alone(),
    )
    made.times, made.every, made.new = [3.0, 3.0, 3.0], 2, new
    return made


@pytest.mark.parametrize(
    "case, updates",
    [
        ({"minutes": 2, "spent": 57.0}, 40),  # at 3 s each, 120 s in all
        ({"minutes": 2, "spent": 67.0}, 40),  # 130 s: less than a tenth too long
        ({"minutes": 2, "spent": 87.0}, 30),  # 150 s. 10 updates fit into the remaining 30 s
        ({"minutes": 2, "spent": 400.0}, 21),
        ({"minutes": 2, "spent": 400.0, "warmup": 25}, 25),  # a shorter run could not have this warm-up
        ({"minutes": 2, "spent": 87.0, "new": 30}, 40),  # later updates may be fast enough
        ({"minutes": 2, "spent": 120.0, "new": 30}, 21),  # the updates with new images alone take too long
        ({"minutes": None, "spent": 400.0}, 40),
    ],
)
def test_the_number_of_updates_is_lowered_to_what_fits_at_the_present_speed(case, updates):
    assert deadline(**case).steps_after(3.0) == updates


def test_one_stall_does_not_shorten_a_run_and_checks_are_rare():
    stalled = deadline(2, 57.0)
    assert stalled.steps_after(8.0) == 40 and stalled.times == []
    stalled.trainer.state.step = 21
    assert stalled.steps_after(500.0) == 40  # between two checks


# --- patience ---


def test_patience_counts_evaluations_across_a_resume(tmp_path, monkeypatch):
    config = make_config(tmp_path, **QUIET, train__eval_every=1, train__patience=2)
    script_scores(monkeypatch, [10.0, 20.0, 15.0, 20.0, 25.0, 1.0, 1.0])
    stop_at(monkeypatch, 4, config, tmp_path / "run")  # in update 4, before or after its evaluation is counted
    done = train(config, tmp_path / "run", resume=True, callbacks=[])
    assert (done["status"], done["step"], done["selected_step"], done["planned_steps"]) == ("finished", 4, 2, 8)
    assert "ended early (train.patience): 8 updates" in report.markdown(done)
    assert train(config, tmp_path / "run", resume=True, callbacks=[]) == done
    longer = train(replace(config, train__steps=9), tmp_path / "run", resume=True, callbacks=[])
    assert (longer["step"], longer["selected_step"]) == (7, 5)
