"""A run ended by a signal or a crash is saved, and its resume is bitwise equal or refused with the reason.

All of it happens in this process. `tests/selftest` tests SIGKILL.
"""

import gc
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from tiny_runs import LATE, Crash, act_at, crash, make_config

import moe_bsr
from moe_bsr import api
from moe_bsr.callbacks.console import Console
from moe_bsr.config import Config, ConfigError, replace
from moe_bsr.data import Loader, UnreadableImage
from moe_bsr.runs import checkpoint
from moe_bsr.training import inputs
from moe_bsr.training import trainer as trainer_module
from moe_bsr.training.optim import MovingAverage

pytestmark = pytest.mark.usefixtures("bare")


def train(config: Config, folder: Path, resume: bool = False) -> dict:
    return api.train(config, folder, resume, callbacks=[Console()])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A configuration with everything that could make a resumed run differ."""
    return make_config(
        tmp_path_factory.mktemp("tasks"),
        **LATE,
        train__ema_decay=0.7,
        train__steps=4,
        train__checkpoint_every=1,
        train__eval_every=2,
        train__grad_accumulation_steps=2,
        train__evaluate_test=False,
        moe__gate_noise=1.0,
        moe__balance_loss="across_tasks",
        sampler__kind="temperature",
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    last = checkpoint.steps(whole)[-1]
    names = ("weights", "optimizer", "average")
    files = ["metrics.jsonl", *(f"checkpoint/{last}/{name}.safetensors" for name in names)]
    for file in files:
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    ours, theirs = (json.loads((run / "report.json").read_text()) for run in (folder, whole))
    for changing in ("train_seconds", "measured_peak_mb", "config", "command"):
        del ours[changing], theirs[changing]
    for report in (ours, theirs):
        for task in report["tasks"].values():
            del task["images_per_second"]
    assert ours == theirs


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("step", [1, 4])
def test_a_crash_loses_only_the_updates_since_the_checkpoint(config, whole, tmp_path, monkeypatch, step):
    """The failed run is still in memory when it is resumed in the same process."""
    with monkeypatch.context() as patch, pytest.raises(Crash) as failed:
        act_at(patch, step, crash)
        train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == {1: [], 4: [2, 3]}[step]
    train(config, tmp_path, resume=True)
    del failed
    gc.collect()
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    "number, step",
    [(signal.SIGTERM, 1), (signal.SIGTERM, 4), (signal.SIGHUP, 2), (signal.SIGINT, 1), (signal.SIGXCPU, 1)]
    + [(signal.SIGUSR1, 1), (signal.SIGUSR2, 1)],
)
def test_a_signal_saves_and_ends_the_run(config, whole, tmp_path, monkeypatch, number, step):
    """A resumed run is the same after every signal, so each step is resumed after only one of them."""
    inherited = signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL  # nohup ignores SIGHUP
    signal.signal(number, before)
    try:
        with monkeypatch.context() as patch:
            act_at(patch, step, send(number))
            report = train(config, tmp_path)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)
    assert (report["status"], report["signal"], report["step"]) == ("interrupted", number, step)
    assert report["mean_top1"] is None and sum(task["updates"] for task in report["tasks"].values()) == step
    assert checkpoint.steps(tmp_path)[-1] == step
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step and "split" not in last  # the resumed run does the evaluation due at 2 and 4
    assert "interrupted" in (tmp_path / "report.md").read_text()
    if number not in (signal.SIGTERM, signal.SIGHUP):
        return
    assert train(config, tmp_path, resume=True)["train_seconds"] >= report["train_seconds"] > 0
    assert_same(tmp_path, whole)


def test_an_ignored_hangup_signal_stays_ignored(config, tmp_path, monkeypatch):
    """nohup starts a program like this."""
    config = replace(config, train__steps=2, train__eval_every=None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        act_at(monkeypatch, 1, send(signal.SIGHUP))
        assert train(config, tmp_path)["status"] == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_with_a_handler_of_the_calling_program_are_left_to_it(config, tmp_path, monkeypatch):
    """submitit handles some of them so that Slurm starts the job again."""
    config = replace(config, train__steps=2, train__eval_every=None)
    numbers, seen = [signal.SIGUSR1, signal.SIGUSR2], []
    before = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]
    try:
        act_at(monkeypatch, 1, lambda: [send(number)() for number in numbers])
        assert train(config, tmp_path)["status"] == "finished" and seen == numbers
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def signal_at_evaluation(monkeypatch, number: int) -> None:
    """Send SIGTERM at the start of call `number` of `evaluate`."""
    evaluate, calls = trainer_module.evaluate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            send(signal.SIGTERM)()
        assert len(calls) < number, "evaluated after the signal"
        return evaluate(*arguments)

    monkeypatch.setattr(trainer_module, "evaluate", interrupted)


@pytest.mark.parametrize("evaluation", [1, 4])
def test_a_signal_ends_an_evaluation_at_once_and_a_resume_repeats_it(config, whole, tmp_path, monkeypatch, evaluation):
    """There are four calls: two tasks at updates 2 and 4."""
    with monkeypatch.context() as patch:
        signal_at_evaluation(patch, evaluation)
        report = train(config, tmp_path)
    assert report["status"] == "interrupted" and report["signal"] == signal.SIGTERM
    assert checkpoint.steps(tmp_path)[-1] == (2 if evaluation == 1 else 4)
    train(config, tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_an_interrupted_test_evaluation_is_counted(config, tmp_path, monkeypatch):
    config = replace(config, train__steps=1, train__evaluate_test=True)
    with monkeypatch.context() as patch:
        signal_at_evaluation(patch, 4)  # validation of two tasks, then their test
        assert train(config, tmp_path)["test_evaluations"] == 1


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_weights_are_swapped_with_their_average(config, whole, tmp_path, monkeypatch, call):
    """Call 1 swaps the average in for an evaluation, call 2 swaps it out again."""
    swap, calls = MovingAverage.swap, []

    def interrupted(self, model):
        swap(self, model)
        calls.append(model)
        if len(calls) == call:
            send(signal.SIGTERM)()

    with monkeypatch.context() as patch:
        patch.setattr(MovingAverage, "swap", interrupted)
        train(config, tmp_path)
    train(config, tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(config, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 4, crash)
        train(config, tmp_path)
    file = tmp_path / "checkpoint" / "3" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    train(config, tmp_path, resume=True)
    output = capsys.readouterr().out
    assert str(file) in output and f"resumed from {tmp_path / 'checkpoint' / '2'}" in output
    assert_same(tmp_path, whole)


def test_a_finished_run_is_not_repeated(config, whole, monkeypatch):
    monkeypatch.setattr(api, "Trainer", None)
    report = train(config, whole, resume=True)
    assert report == json.loads((whole / "report.json").read_text())


def test_a_resume_in_another_environment_reports_that_it_is_not_bit_exact(config, tmp_path, monkeypatch, capsys):
    config = replace(config, train__steps=2, train__eval_every=None)
    with monkeypatch.context() as patch:
        act_at(patch, 1, send(signal.SIGTERM))
        train(config, tmp_path)
    assert "bit-exact" not in capsys.readouterr().out
    train(replace(config, runtime__precision="bf16"), tmp_path, resume=True)
    assert "not bit-exact with the run so far: precision was fp32, now bf16" in capsys.readouterr().out


# --- refusals ---


def test_a_folder_with_a_run_is_not_overwritten(config, whole):
    before = (whole / "report.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already; go on with it by resume=True"):
        train(config, whole)
    assert (whole / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__lr": 0.5}, "train.lr was 0.01, now 0.5"),
        ({"train__steps": 3}, "train.steps was 4, now 3"),
        ({"plan__keep_rate": 0.7, "seed": 1}, "plan.keep_rate was 0.5, now 0.7; seed was 0, now 1"),
        ({"train__ema_decay": None}, "train.ema_decay was 0.7, now None"),
    ],
)
def test_another_configuration_cannot_resume(config, whole, changes, words):
    with pytest.raises(ConfigError, match="the configuration changed") as error:
        train(replace(config, **changes), whole, resume=True)
    assert words in str(error.value)


def test_settings_that_do_not_affect_results_may_change_on_resume(config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        act_at(patch, 3, send(signal.SIGTERM))
        train(config, tmp_path)
    other = replace(config, train__checkpoint_every=3, data__prefetch=2, data__image_cache_mb=0, data__root="other")
    train(other, tmp_path, resume=True)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("kind", ["temperature", "joint"])
def test_an_unreadable_image_loses_no_finished_update(config, whole, tmp_path, monkeypatch, kind):
    """The fourth batch is unreadable. With joint sampling it belongs to the second task of the second update."""

    def some(*arguments):
        yield from itertools.islice(Loader(*arguments), 3)
        raise UnreadableImage("bee/3.png: not a readable image")

    if kind == "joint":
        config, whole = replace(config, sampler__kind=kind, train__steps=2), tmp_path / "whole"
        train(config, whole)
    with monkeypatch.context() as patch, pytest.raises(UnreadableImage):
        patch.setattr(inputs, "Loader", some)
        train(config, tmp_path / "cut")
    assert checkpoint.steps(tmp_path / "cut")[-1] == {"temperature": 3, "joint": 1}[kind]
    train(config, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole)


def test_unconnected_processes_and_commands_for_one_process_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2.*do not find each other.*torchrun"):
        train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="work of one process.*without torchrun"):
        moe_bsr.find_lr(config)
    assert not (tmp_path / "run").exists()
