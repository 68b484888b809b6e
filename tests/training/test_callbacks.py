"""Failing callbacks do not stop a run; a failure to write the run's own record ends it with everything saved."""

import errno
import json
import warnings
import zlib

import pytest
import torch
from tiny_runs import LATE, make_config, make_trainer

from moe_bsr.api import train
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.config import replace
from moe_bsr.runs import checkpoint
from moe_bsr.training import trainer as trainer_module
from moe_bsr.training.callback import Callback, Callbacks
from moe_bsr.training.trainer import TrainingFailed

pytestmark = pytest.mark.usefixtures("bare")

HOOKS = ("restore", "on_start", "on_step", "on_evaluate", "state", "on_end", "close")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS = [
    ZeroDivisionError("by zero"),
    ValueError("two\nlines"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    KeyError("name"),
    StopIteration(),
    SystemExit(3),
    Unspeakable(),
]


class Failing(Callback):
    """Callback that raises in one hook at each call and records all calls."""

    def __init__(self, name: str, hook: str, error: BaseException) -> None:
        self.name, self.calls = name, []
        for each in HOOKS:
            setattr(self, each, self._hook(each, error if each == hook else None))

    def _hook(self, name: str, error: BaseException | None):
        def call(*arguments):
            self.calls.append(name)
            if error is not None:
                raise error
            return {}

        return call


class Recorder(Callback):
    """Callback that records the events it gets and adds to the report."""

    name = "witness"

    def __init__(self) -> None:
        self.log: list = []

    def on_step(self, step) -> None:
        self.log.append((step.step, step.task, step.metrics))

    def on_evaluate(self, evaluation) -> None:
        self.log.append((evaluation.step, evaluation.split, {t: s["top1"] for t, s in evaluation.scores.items()}))

    def on_end(self, report) -> dict:
        return {"witness": len(self.log)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("tasks"), **LATE, train__steps=4, train__eval_every=2)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    folder, recorder = tmp_path_factory.mktemp("alone") / "run", Recorder()
    train(config, folder, callbacks=[recorder])
    return folder, recorder


def record(folder) -> dict[str, bytes]:
    names = ("metrics.jsonl", "checkpoint/4/weights.safetensors", "checkpoint/4/optimizer.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def test_failing_callbacks_are_each_reported_once_and_change_nothing(config, alone, tmp_path):
    """One failing callback for each hook and one for each kind of error, all in one run."""
    cases = [(hook, ERRORS[0]) for hook in HOOKS] + [("on_evaluate", error) for error in ERRORS[1:]]
    failing, recorder = [Failing(f"failing {n}", *case) for n, case in enumerate(cases)], Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = train(config, tmp_path / "run", callbacks=[*failing, recorder])
    lines = [str(each.message) for each in caught if "callback" in str(each.message)]
    assert len(lines) == len(cases)
    for callback, (hook, error) in zip(failing, cases, strict=True):
        (said,) = [line for line in lines if f"'{callback.name}'" in line]
        assert hook in said and type(error).__name__ in said and "\n" not in said
        assert callback.calls.count(hook) == 1, hook
        after = callback.calls[callback.calls.index(hook) + 1 :]
        assert after == (["close"] if hook != "close" else []), hook
    assert record(tmp_path / "run") == record(alone[0])
    assert recorder.log == alone[1].log and report["witness"] == len(recorder.log) and report["status"] == "finished"


def test_values_that_are_not_json_prevent_neither_checkpoint_nor_report(config, alone, tmp_path):
    """A set, a tensor, and a number instead of a mapping, from the state and from the report hook, all in one run."""
    cases = [(hook, value) for hook in ("state", "on_end") for value in ({"a": {1, 2}}, {"a": torch.ones(1)}, 5)]
    callbacks = [Callback() for _ in cases]
    for number, (callback, (hook, value)) in enumerate(zip(callbacks, cases, strict=True)):
        callback.name = f"case {number}"
        setattr(callback, hook, lambda *arguments, value=value: value)
    with pytest.warns(UserWarning, match="failed in") as said:
        report = train(config, tmp_path / "run", callbacks=callbacks)
    lines = [str(each.message) for each in said]
    for number, (hook, _) in enumerate(cases):
        assert sum(f"callback 'case {number}' failed in {hook}" in line for line in lines) == 1, number
    assert report["status"] == "finished" and record(tmp_path / "run") == record(alone[0])


def test_a_callback_without_a_hook_is_disabled(config, tmp_path):
    with pytest.warns(UserWarning, match="failed in restore: AttributeError"):
        assert train(config, tmp_path / "run", callbacks=[object()])["status"] == "finished"


def test_a_callback_cannot_change_the_report_it_gets(config, tmp_path):
    callback = Callback()
    callback.on_end = lambda report: report.clear()
    assert train(config, tmp_path / "run", callbacks=[callback])["status"] == "finished"


def test_the_last_state_of_a_failed_callback_stays_in_the_checkpoint():
    callback = Callback()
    callback.state = iter([{"n": 1}]).__next__
    callbacks = Callbacks([callback])
    assert callbacks.state() == {"Callback": {"n": 1}}
    with pytest.warns(UserWarning, match="failed in state"):
        assert callbacks.state() == {"Callback": {"n": 1}}
    assert callbacks.state() == {"Callback": {"n": 1}}


# --- evaluations ---


class CheckpointRecorder(Callback):
    """Callback that records the checkpoint present at each evaluation, and may then end the process."""

    def __init__(self, folder, end=lambda: None) -> None:
        self.folder, self.end, self.seen = folder, end, []

    def on_evaluate(self, evaluation) -> None:
        if evaluation.split == "val":
            folder = self.folder / "checkpoint" / str(evaluation.step)
            self.seen.append((evaluation.step, checkpoint.damage(folder), checkpoint.read(folder)[1]["best_step"]))
            self.end()


def test_an_evaluation_is_saved_before_callbacks_get_it(config, tmp_path):
    recorder = CheckpointRecorder(tmp_path / "run")
    report = train(config, tmp_path / "run", callbacks=[recorder])
    assert [(step, wrong) for step, wrong, _ in recorder.seen] == [(2, None), (4, None)]
    assert recorder.seen[-1][2] == report["selected_step"]


class Killed(BaseException):
    """Ends a run like a kill: unlike an exception of a callback, nothing catches it."""


def killed() -> None:
    raise Killed


@pytest.mark.parametrize("at", [2, 4])
def test_a_kill_in_a_callback_does_not_repeat_the_evaluation(config, alone, tmp_path, monkeypatch, at):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(
            config,
            folder,
            callbacks=[CheckpointRecorder(folder, lambda: killed() if checkpoint.steps(folder)[-1] == at else None)],
        )
    evaluate, evaluated = trainer_module.evaluate, []
    monkeypatch.setattr(trainer_module, "evaluate", lambda *a: evaluated.append(a[2]) or evaluate(*a))
    train(config, folder, resume=True, callbacks=[])
    assert evaluated == (["val"] * 2 if at == 2 else []) + ["test"] * 2
    assert record(folder) == record(alone[0])


def fail(*arguments):
    raise FloatingPointError("logits that are not finite")


def test_a_failed_evaluation_loses_no_update(config, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
        patch.setattr(trainer_module, "evaluate", fail)
        train(config, tmp_path / "run", callbacks=[])
    assert checkpoint.steps(tmp_path / "run")[-1] == 2
    train(config, tmp_path / "run", resume=True, callbacks=[])
    assert record(tmp_path / "run") == record(alone[0])


# --- the run's own record ---


class Full(Jsonl):
    """Writer for a disk with space for a given number of bytes of metrics."""

    space = 500

    def restore(self, state) -> None:
        super().restore(state)
        file, full = self.stream, self

        class Stream:
            def write(self, content: bytes) -> int:
                left = full.space - file.tell()
                if left <= 0:
                    raise OSError(errno.ENOSPC, "No space left on device", str(full.path))
                return file.write(content[:left])

            def __getattr__(self, name):
                return getattr(file, name)

        self.stream = Stream()


@pytest.mark.parametrize(("kind", "space"), [("round_robin", 1), ("round_robin", 500), ("joint", 500)])
def test_a_full_disk_ends_a_run_saved_and_a_resume_gives_the_same_bytes(config, alone, tmp_path, kind, space):
    whole = alone[0]
    if kind == "joint":
        config, whole = replace(config, sampler__kind=kind), tmp_path / "whole"
        make_trainer(config, whole, [Jsonl(whole)]).fit()
    full = Full(tmp_path / "cut")
    full.space = space
    with pytest.raises(TrainingFailed) as failure:
        make_trainer(config, tmp_path / "cut", [full]).fit()
    line, saved = str(failure.value), checkpoint.steps(tmp_path / "cut")
    assert "metrics.jsonl: No space left on device" in line and "make room" in line and "resume=True" in line
    assert saved and str(tmp_path / "cut" / "checkpoint" / str(saved[-1])) in line and "\n" not in line
    make_trainer(config, tmp_path / "cut", [Jsonl(tmp_path / "cut")]).fit(resume=True)
    assert record(tmp_path / "cut") == record(whole)


@pytest.mark.parametrize("left", [0, 100, 250])
def test_a_truncated_record_gives_one_warning_and_leaves_no_partial_line(config, tmp_path, left):
    jsonl, folder = Jsonl(tmp_path), tmp_path
    lines = [json.dumps({"step": step}) + "\n" for step in range(40)]
    jsonl.path.write_text("".join(lines)[:left])
    with pytest.warns(UserWarning, match=f"metrics.jsonl has {left} bytes of the 600 it had") as noted:
        jsonl.restore({"bytes": 600})
    jsonl._write([{"step": 40}])
    assert len(noted) == 1 and all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_only_a_changed_record_gives_a_warning(config, tmp_path):
    jsonl = Jsonl(tmp_path)
    jsonl.restore({})
    for step in range(5):
        jsonl._write([{"step": step}])
    state = jsonl.state()
    jsonl._write([{"step": 5}])
    jsonl.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Jsonl(tmp_path)
        again.restore(state)
        again._write([{"step": 5}])
        assert again.state()["crc32"] == zlib.crc32(jsonl.path.read_bytes())
    jsonl.path.write_text(jsonl.path.read_text().replace("2", "7"))
    with pytest.warns(UserWarning, match="metrics.jsonl was changed"):
        Jsonl(tmp_path).restore(state)


@pytest.mark.parametrize("state", [{"bytes": "x"}, {"bytes": -1}, {"bytes": True}, {"bytes": 1, "unwritten": 5}])
def test_a_forged_length_of_the_record_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        Jsonl(tmp_path).restore(state)
    assert not (tmp_path / "metrics.jsonl").exists()
