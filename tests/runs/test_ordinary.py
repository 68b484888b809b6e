"""Test that links, pipes and devices in an untrusted run folder are refused, never followed and never waited for."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from tiny_runs import LATE, make_config

import moe_bsr
from moe_bsr.config import Config, ConfigError
from moe_bsr.runs import checkpoint, report
from moe_bsr.runs import folder as run
from moe_bsr.runs.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("bare")

CANARY = "not of this run\n"
EVENTS = "tensorboard/events.out.tfevents.1.host.1.0"


@pytest.fixture(autouse=True)
def no_waiting():
    """Fail the test after 60 seconds instead of waiting forever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("tasks"), **LATE, train__steps=2, train__checkpoint_every=1)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    moe_bsr.train(config, folder, callbacks=[])
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """Return a copy of a run that was stopped before it wrote its report."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "tensorboard").mkdir()
    return tmp_path / "run"


def link(path: Path) -> None:
    target = elsewhere(path)
    target.write_text(CANARY)
    path.symlink_to(target)


def elsewhere(path: Path) -> Path:
    """Return a file beside the run folder."""
    while path.name != "run":
        path = path.parent
    return path.parent / "elsewhere"


def dangling(path: Path) -> None:
    path.symlink_to(elsewhere(path))


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a length limit
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


STRANGE = {
    "link": link,
    "dangling": dangling,
    "zero": zero,
    "pipe": os.mkfifo,
    "socket": bound,
    "folder": lambda path: (path.mkdir(), (path / "file").write_text(CANARY)),
}


def put(path: Path, strange: str) -> None:
    path.unlink(missing_ok=True)
    STRANGE[strange](path)


def untouched(folder: Path) -> bool:
    """Return whether the file beside the run folder is unchanged."""
    path = folder.parent / "elsewhere"
    return not path.is_file() or path.read_text() == CANARY


FILES = ("config.yaml", "metrics.jsonl", "report.json", "report.md", "test_evaluations.log", "lock", EVENTS)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", FILES)
def test_anything_but_a_regular_file_is_refused_by_name(config, folder, name, strange):
    put(folder / name, strange)
    for attempt in (
        lambda: moe_bsr.train(config, folder, resume=True, callbacks=[]),
        lambda: moe_bsr.load(folder),
    ):
        with pytest.raises(ConfigError, match="where a file of the run belongs") as refusal:
            attempt()
        assert str(folder / name) in str(refusal.value) and "\n" not in str(refusal.value)
    assert untouched(folder)


@pytest.mark.parametrize("strange", sorted(STRANGE.keys() - {"folder"}))
def test_existing_entries_at_temporary_names_do_not_disturb_training(config, folder, strange):
    names = ("checkpoint/2.tmp", "checkpoint/notes.tmp")
    for name in names:
        put(folder / name, strange)
    shutil.rmtree(folder / "checkpoint" / "2")
    assert moe_bsr.train(config, folder, resume=True, callbacks=[])["status"] == "finished"
    assert untouched(folder) and all(file.is_file() for file in folder.glob("report.*"))
    assert [name for name in names if os.path.lexists(folder / name)] == ["checkpoint/notes.tmp"]


@pytest.mark.parametrize("name", ["checkpoint", "tensorboard", "views"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "link"])
def test_anything_but_a_regular_folder_is_refused_by_name(config, folder, name, as_file):
    path, other = folder / name, folder.parent / "other"
    shutil.copytree(folder / "checkpoint", other)
    (other / "5.tmp").mkdir()
    if path.exists():
        shutil.rmtree(path)
    path.write_text(CANARY) if as_file else path.symlink_to(other)
    before = sorted(path.relative_to(other) for path in other.rglob("*"))
    for resume in (False, True):
        with pytest.raises(ConfigError, match="where a folder of the run belongs"):
            moe_bsr.train(config, folder, resume=resume, callbacks=[])
    with pytest.raises(ConfigError, match=str(path)):
        moe_bsr.load(folder)
    assert sorted(path.relative_to(other) for path in other.rglob("*")) == before


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_an_irregular_file_in_a_checkpoint_invalidates_only_that_checkpoint(folder, name, strange):
    newest = folder / "checkpoint" / "2"
    put(newest / name, strange)
    warnings: list[str] = []
    assert checkpoint.latest(folder, warnings.append) == folder / "checkpoint" / "1"
    assert len(warnings) == 1 and str(newest / name) in warnings[0]
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(newest)


@pytest.mark.parametrize("strange", sorted(STRANGE.keys() - {"folder"}))
def test_a_checkpoint_that_is_not_a_folder_is_named_and_never_followed(config, folder, strange):
    newest = folder / "checkpoint" / "2"
    shutil.rmtree(newest)
    put(newest, strange)
    warnings: list[str] = []
    assert checkpoint.latest(folder, warnings.append) == folder / "checkpoint" / "1" and str(newest) in warnings[0]
    assert moe_bsr.train(config, folder, resume=True, callbacks=[])["status"] == "finished"
    assert checkpoint.damage(newest) is None and untouched(folder)


def test_a_checkpoint_that_is_a_link_to_another_is_refused(folder):
    newest = folder / "checkpoint" / "2"
    newest.rename(folder.parent / "2")
    newest.symlink_to(folder.parent / "2")
    with pytest.warns(UserWarning, match="2 is a symbolic link"):
        assert checkpoint.latest(folder).name == "1"
    checkpoint.save(folder, 2, {"weights": {}}, {"best_step": 2})
    assert (folder.parent / "2" / "weights.safetensors").is_file() and not newest.is_symlink()


# --- only what the manifest lists ---


def edit_manifest(folder: Path, edit) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def add(name: str):
    return lambda manifest: manifest["sha256"].update({name: "0" * 64})


UNLISTED = {
    "one more": lambda path: shutil.copy(path / "weights.safetensors", path / "average.safetensors"),
    "one no longer": lambda path: edit_manifest(path, lambda m: m["sha256"].pop("optimizer.safetensors")),
    "no weights": lambda path: edit_manifest(path, lambda m: m["sha256"].pop("weights.safetensors")),
    "no state": lambda path: edit_manifest(path, lambda m: m["sha256"].pop("state.json")),
    **{
        name: lambda path, name=name: edit_manifest(path, add(name))
        for name in (
            "../1/weights.safetensors",
            "/etc/passwd",
            "/dev/zero",
            "..",
            "",
            "a/b.safetensors",
            "x\x00",
            "x.pt",
        )
    },
    **{
        f"step {step!r}": lambda path, step=step: edit_manifest(path, lambda m: m.update(step=step))
        for step in (1, "2", None, 2.0, True)
    },
    "a list": lambda path: (path / "manifest.json").write_text("[]"),
    "brackets": lambda path: (path / "manifest.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("change", UNLISTED.values(), ids=UNLISTED)
def test_a_manifest_that_does_not_match_its_folder_invalidates_the_checkpoint(folder, change):
    newest = folder / "checkpoint" / "2"
    change(newest)
    with pytest.warns(UserWarning, match="checkpoint refused") as refused:
        assert checkpoint.latest(folder).name == "1"
    assert str(newest) in str(refused[0].message) and "\n" not in str(refused[0].message)
    with pytest.raises(CheckpointError, match="checkpoint refused"):
        checkpoint.read(newest)


def test_unrelated_files_and_folders_among_checkpoints_are_ignored(folder):
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (folder / "checkpoint" / "2" / name).write_text(CANARY)
    (folder / "checkpoint" / "02").mkdir()
    (folder / "checkpoint" / "old").mkdir()
    assert checkpoint.latest(folder, warn=pytest.fail).name == "2" and checkpoint.steps(folder) == [1, 2]


@pytest.mark.parametrize("name", ["../../elsewhere", "..", "2/../1", "02", "", "-1", "two"])
def test_a_checkpoint_is_named_only_by_its_step(finished, name):
    with pytest.raises(CheckpointError, match="no checkpoint .* there are best, last and 1, 2"):
        moe_bsr.load(finished, name)


# --- whole runs ---


def test_the_run_folder_itself_may_be_a_link(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    moe_bsr.train(config, tmp_path / "run", callbacks=[])
    assert moe_bsr.load(tmp_path / "run").step and (tmp_path / "disk" / "report.json").is_file()


@pytest.mark.parametrize("strange", sorted(STRANGE.keys() - {"folder"}))
def test_a_run_folder_that_is_not_a_folder_is_refused(config, tmp_path, strange):
    put(tmp_path / "run", strange)
    with pytest.raises(ConfigError, match="is not a folder"):
        moe_bsr.train(config, tmp_path / "run", callbacks=[])
    with pytest.raises(ConfigError, match="(not|neither) a run folder"):
        moe_bsr.load(tmp_path / "run")


def test_a_link_to_a_run_of_a_series_is_refused(config, tmp_path):
    series = moe_bsr.config.replace(config, mode="single_task")
    moe_bsr.train(series, tmp_path / "run", callbacks=[])
    (tmp_path / "run" / "shapes").rename(tmp_path / "other")
    (tmp_path / "run" / "shapes").symlink_to(tmp_path / "other")
    (tmp_path / "run" / "report.json").unlink()
    for attempt in (
        lambda: moe_bsr.train(series, tmp_path / "run", resume=True, callbacks=[]),
        lambda: moe_bsr.load(tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match="shapes is a symbolic link"):
            attempt()


def test_files_have_usual_permissions(config, tmp_path):
    before = os.umask(0o027)
    try:
        moe_bsr.train(config, tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_reports_and_counts_are_not_read_through_links(finished, tmp_path):
    for name in ("report.json", "test_evaluations.log"):
        shutil.copy(finished / name, tmp_path / f"my {name}")
        (tmp_path / name).symlink_to(tmp_path / f"my {name}")
    with pytest.raises(ConfigError, match="symbolic link"):
        report.read(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        run.test_evaluations(tmp_path)
