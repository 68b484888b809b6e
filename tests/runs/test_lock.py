"""Test that a run folder has one trainer at a time, and that the lock of a dead process blocks nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import LATE, Crash, act_at, make_config

import moe_bsr
from moe_bsr.config import Config, ConfigError, replace
from moe_bsr.runs.lock import locked

pytestmark = pytest.mark.usefixtures("bare")


def config_of(folder: Path) -> Config:
    return make_config(folder, **LATE, train__steps=4, train__checkpoint_every=1, train__evaluate_test=False)


@pytest.fixture
def config(tmp_path) -> Config:
    return config_of(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the run of a trainer without competitors."""
    folder = tmp_path_factory.mktemp("whole")
    moe_bsr.train(config_of(folder), folder / "run", callbacks=[])
    return folder / "run"


@pytest.mark.parametrize(("step", "resume"), [(1, False), (1, True), (3, True)])
def test_a_second_trainer_is_refused_and_does_not_disturb_the_first(config, whole, tmp_path, monkeypatch, step, resume):
    folder, errors = tmp_path / "run", []

    def second() -> None:
        before = content(folder)
        with pytest.raises(ConfigError) as refusal:
            moe_bsr.train(config, folder, resume=resume, callbacks=[])
        assert content(folder) == before
        errors.append(str(refusal.value))

    with monkeypatch.context() as patch:
        act_at(patch, step, second)
        moe_bsr.train(config, folder, callbacks=[])
    (line,) = errors
    assert f"{folder} is being trained in by process {os.getpid()} on " in line and " since 20" in line
    for name in ("metrics.jsonl", "checkpoint/4/weights.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "lock").exists()


def test_the_process_that_has_the_lock_is_named(tmp_path):
    code = (
        "import sys, pathlib\nfrom moe_bsr.runs.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"by process {first.pid} on .* since "), locked(tmp_path / "run"):
            pass
        first.kill()
        first.wait()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == first.pid  # a stale lock file blocks nobody
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\x00" * 10_000])
def test_a_lock_file_with_invalid_content_still_locks(tmp_path, text):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "lock").write_text(text)
        with pytest.raises(ConfigError, match="is being trained in; wait for its end"), locked(tmp_path / "run"):
            pass


@pytest.mark.parametrize("ends", [Crash, SystemExit])
def test_the_lock_is_released_when_training_raises(config, tmp_path, monkeypatch, ends):
    def end() -> None:
        raise ends

    with monkeypatch.context() as patch, pytest.raises(ends):
        act_at(patch, 2, end)
        moe_bsr.train(config, tmp_path / "run", callbacks=[])
    assert moe_bsr.train(config, tmp_path / "run", resume=True, callbacks=[])["status"] == "finished"


def test_a_refused_run_creates_no_folder(config, tmp_path):
    missing = replace(config, tasks=[str(tmp_path / "missing.yaml")])
    (tmp_path / "missing.yaml").write_text("title: Missing\nsource: folder\npath: nowhere\n")
    with pytest.raises((ConfigError, OSError, ValueError)):
        moe_bsr.train(missing, tmp_path / "runs" / "mine", callbacks=[])
    assert not (tmp_path / "runs").exists()


def test_a_series_locks_the_runs_of_all_its_tasks(config, tmp_path, monkeypatch):
    series = replace(config, mode="single_task", train__steps=1)
    refused = []

    def others() -> None:
        for name, changed in (("run", series), ("run/shapes", config), ("run/fractals", config)):
            with pytest.raises(ConfigError, match="is being trained in"):
                moe_bsr.train(changed, tmp_path / name, callbacks=[])
            refused.append(name)

    with monkeypatch.context() as patch:
        act_at(patch, 1, lambda: refused or others())
        moe_bsr.train(series, tmp_path / "run", callbacks=[])
    assert refused == ["run", "run/shapes", "run/fractals"] and not list((tmp_path / "run").rglob("lock"))


def test_a_series_is_refused_while_one_of_its_tasks_is_training(config, tmp_path):
    with locked(tmp_path / "run" / "fractals"):
        with pytest.raises(ConfigError, match="fractals is being trained in"):
            moe_bsr.train(replace(config, mode="single_task"), tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run").exists()
