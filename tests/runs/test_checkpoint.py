"""Test checkpoints: exact round trips, crashes at any point of a write, full disks and which checkpoints are kept."""

import errno
import itertools
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_checkpoints import save_steps, tensors
from tiny_runs import Crash, crash

from moe_bsr.config import ConfigError
from moe_bsr.runs import checkpoint
from moe_bsr.runs.checkpoint import check_room, damage, latest, read, recover, save, save_state, steps
from moe_bsr.runtime import files as disk

# --- round trip ---


def test_a_checkpoint_round_trip_is_exact(tmp_path):
    state = {"step": 7, "best_step": None, "seconds": 0.1 + 0.2, "callbacks": {"Jsonl": {"bytes": 12}}}
    folder = save(tmp_path, 7, tensors(), state)
    assert folder == tmp_path / "checkpoint" / "7" and steps(tmp_path) == [7]
    loaded, loaded_state = read(folder)
    assert loaded_state == state and loaded.keys() == tensors().keys()
    for name, group in tensors().items():
        assert loaded[name].keys() == group.keys()
        for key, value in group.items():
            assert loaded[name][key].dtype == value.dtype and torch.equal(loaded[name][key], value)


def test_tensors_of_any_layout_and_dtype_can_be_saved(tmp_path):
    odd = {
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "not a number": torch.tensor([float("nan"), float("inf")]),
        "mask": torch.tensor([True, False]),
    }
    loaded = read(save(tmp_path, 1, {"weights": odd, "optimizer": {}}, {}))[0]
    assert loaded["optimizer"] == {}
    for name, value in odd.items():
        torch.testing.assert_close(loaded["weights"][name], value.detach(), rtol=0, atol=0, equal_nan=True)


def test_a_second_save_of_a_step_replaces_it(tmp_path):
    save(tmp_path, 3, tensors(1), {"best_step": 3, "turn": 1})
    save(tmp_path, 3, {"weights": {"a": torch.ones(1)}}, {"best_step": 3, "turn": 2})
    loaded, state = read(tmp_path / "checkpoint" / "3")
    assert state["turn"] == 2 and loaded.keys() == {"weights"}


def test_recovery_after_a_crash_between_the_two_renames_of_a_second_save(tmp_path, monkeypatch):
    save(tmp_path, 3, tensors(1), {"best_step": 3, "turn": 1})
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if to.name.endswith(".tmp") else crash())
    with pytest.raises(Crash):
        save(tmp_path, 3, tensors(2), {"best_step": 3, "turn": 2})
    monkeypatch.undo()
    assert steps(tmp_path) == []
    recover(tmp_path)
    assert read(tmp_path / "checkpoint" / "3")[1]["turn"] == 2
    save(tmp_path, 4, tensors(1), {"best_step": None})
    assert steps(tmp_path) == [3, 4] and not list((tmp_path / "checkpoint").glob("*.tmp"))


def test_a_half_written_checkpoint_is_not_recovered(tmp_path):
    save(tmp_path, 3, tensors(1), {"best_step": None})
    half = (tmp_path / "checkpoint" / "3").rename(tmp_path / "checkpoint" / "3.tmp")
    (half / "state.json").unlink()
    recover(tmp_path)
    assert steps(tmp_path) == []


def test_the_manifest_lists_every_file_and_no_file_is_a_pickle(tmp_path):
    folder = save(tmp_path, 1, tensors(), {})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["sha256"].keys() | {"manifest.json"} == {f.name for f in folder.iterdir()}
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}


# --- interrupted writes ---


def test_unfinished_checkpoints_are_ignored_and_deleted_by_the_next_save(tmp_path):
    save_steps(tmp_path, None)
    unfinished = tmp_path / "checkpoint" / "2.tmp"
    shutil.copytree(tmp_path / "checkpoint" / "1", unfinished)
    assert steps(tmp_path) == [1] and latest(tmp_path).name == "1"
    save(tmp_path, 3, tensors(), {"best_step": None})
    assert not unfinished.exists() and steps(tmp_path) == [1, 3]


def test_an_unfinished_write_of_the_same_step_is_overwritten(tmp_path):
    unfinished = tmp_path / "checkpoint" / "1.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "weights.safetensors").write_bytes(b"half of it")
    save_steps(tmp_path, None)
    assert damage(tmp_path / "checkpoint" / "1") is None and not unfinished.exists()


def crash_at_sync(monkeypatch, number: int, write) -> bool:
    """Call `write` and crash it at its sync with this number. Returns whether it has that many syncs.

    Each sync ends one stage of a write.
    """
    sync, count = disk.sync, 0

    def crashing(path):
        nonlocal count
        if count == number:
            raise Crash
        count += 1
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", crashing)
        try:
            write()
        except Crash:
            return True
    return False


def test_a_crash_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path, monkeypatch):
    for number in itertools.count():
        run = tmp_path / str(number)
        save_steps(run, None, None)
        arguments = run, 3, tensors(3), {"step": 3, "best_step": None}
        if not crash_at_sync(monkeypatch, number, lambda arguments=arguments: save(*arguments)):
            break
        assert latest(run, warn=pytest.fail).name in ("2", "3")
        save(*arguments)
        assert read(latest(run))[1]["step"] == 3 and not list(run.rglob("*.tmp"))
    assert number == 6  # two tensor files, the state, the manifest, both folders


def test_a_crash_at_any_point_of_save_state_leaves_a_valid_checkpoint_of_the_step(tmp_path, monkeypatch):
    for number in itertools.count():
        run = tmp_path / str(number)
        save(run, 2, tensors(2), {"step": 2, "best_step": None, "turn": 1})
        arguments = run, 2, {"step": 2, "best_step": 2, "turn": 2}
        if not crash_at_sync(monkeypatch, number, lambda arguments=arguments: save_state(*arguments)):
            break
        recover(run)
        loaded, state = read(latest(run, warn=pytest.fail))
        assert state["turn"] in (1, 2) and torch.equal(loaded["weights"]["a.weight"], tensors(2)["weights"]["a.weight"])
    assert read(latest(run))[1]["turn"] == 2 and number == 6 and not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_save_state_leaves_the_tensor_files_unchanged(tmp_path, monkeypatch, links):
    folder = save(tmp_path, 2, tensors(2), {"step": 2, "best_step": None})
    before = (folder / "weights.safetensors").stat()
    if not links:
        monkeypatch.setattr(checkpoint.os, "link", lambda *a, **k: (_ for _ in ()).throw(PermissionError(1, "no")))
    assert save_state(tmp_path, 2, {"step": 2, "best_step": 2}) == folder
    assert damage(folder) is None and read(folder)[1]["best_step"] == 2
    after = (folder / "weights.safetensors").stat()
    assert (after.st_ino == before.st_ino) == links and after.st_mode == before.st_mode


# --- full disks ---


@pytest.mark.parametrize(
    "failing",
    [
        lambda patch: patch.setattr(checkpoint, "save_file", full_as_safetensors_says_it),
        lambda patch: patch.setattr(disk, "sync", full),
        lambda patch: patch.setattr(Path, "mkdir", full),
    ],
    ids=["tensors", "sync", "folder"],
)
def test_a_full_disk_raises_oserror_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    save_steps(tmp_path, None)
    before = content(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError) as failure:
        failing(patch)
        save(tmp_path, 2, {"weights": {"a": torch.ones(2**18)}}, {"best_step": None})
    line = str(failure.value)
    assert str(tmp_path / "checkpoint") in line and "needs 1.0 MB" in line
    assert "No space left on device; make room" in line and "\n" not in line
    assert content(tmp_path) == before and latest(tmp_path, warn=pytest.fail).name == "1"


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_as_safetensors_says_it(tensors, file):
    file.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_error_of_safetensors_for_a_failed_write_is_recognized(tmp_path):
    """Uses the real library, with a file size limit that applies on any disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large; raise the limit of a file's size"):
            save(tmp_path, 1, {"weights": {"a": torch.ones(2**18)}}, {"best_step": None})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "checkpoint").iterdir())


@pytest.mark.parametrize("free", [0, 2 * 2**20])
def test_too_little_disk_space_is_refused_with_required_and_free_size(tmp_path, monkeypatch, free):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda run: shutil._ntuple_diskusage(0, 0, free))
    with pytest.raises(ConfigError, match=f"3 of 1.0 MB each need 3.0 MB, {free / 2**20:.1f} MB are free; make room"):
        check_room(tmp_path, {"weights": 2**19, "optimizer": 2**19}, 3)


def test_a_file_size_limit_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.resource, "getrlimit", lambda which: (2**20, 2**20))
    check_room(tmp_path, {"weights": 2**20, "optimizer": 2**19}, 3)
    with pytest.raises(ConfigError, match="optimizer.safetensors needs 2.0 MB, and a file may have at most 1.0 MB"):
        check_room(tmp_path, {"weights": 2**20, "optimizer": 2**21}, 3)


# --- retention ---


@pytest.mark.parametrize(
    "bests, kept",
    [
        ([None], [1]),
        ([None] * 5, [4, 5]),
        ([1] * 5, [1, 4, 5]),
        ([None, 2, 2, 2, 2, 2], [2, 5, 6]),
        ([1, 1, 1, 4], [1, 3, 4]),  # a resume from 3 must still find 1
        ([1, 1, 1, 4, 4], [4, 5]),
        ([1, 1, 3, 3, 5, 5], [5, 6]),
    ],
)
def test_the_newest_two_checkpoints_and_their_best_ones_are_kept(tmp_path, bests, kept):
    save_steps(tmp_path, *bests)
    assert steps(tmp_path) == kept
    assert all(damage(tmp_path / "checkpoint" / str(step)) is None for step in kept)


def test_an_older_checkpoint_with_an_unreadable_state_does_not_stop_a_save(tmp_path):
    save_steps(tmp_path, 1, 1)
    (tmp_path / "checkpoint" / "2" / "state.json").write_text("{")
    save(tmp_path, 3, tensors(), {"best_step": 1})
    assert steps(tmp_path) == [1, 2, 3]
