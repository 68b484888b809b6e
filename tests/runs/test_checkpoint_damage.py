"""Test that damaged checkpoints are found, refused by name and replaced by the one before."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_steps, tensors

from moe_bsr.runs import checkpoint
from moe_bsr.runs.checkpoint import CheckpointError, damage, latest, read, save, steps


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def write(text: str):
    return lambda file: file.write_text(text)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
DAMAGE = [
    *[(name, harm) for name in FILES for harm in (truncate, flip, Path.unlink, write(""))],
    ("weights.safetensors", lambda file: flip(file, 0)),
    *[("manifest.json", harm) for harm in (truncate, Path.unlink, write(""), write("null"), write("[]"), write("{}"))],
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe")),
    ("manifest.json", write('{"sha256": null}')),
    ("manifest.json", write('{"sha256": {}}')),
    ("weights.safetensors", replace_by_folder),
]


@pytest.mark.parametrize("name, harm", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_is_used(tmp_path, name, harm):
    save_steps(tmp_path, None, None)
    folder, warnings = tmp_path / "checkpoint" / "2", []
    harm(folder / name)
    assert latest(tmp_path, warn=warnings.append) == tmp_path / "checkpoint" / "1"
    assert len(warnings) == 1 and str(folder / name) in warnings[0]
    with pytest.raises(CheckpointError, match="refused") as error:
        read(folder)
    assert str(folder / name) in str(error.value)


def test_a_flipped_bit_anywhere_in_the_weights_is_found(tmp_path):
    folder = save(tmp_path, 1, {"weights": {"a": torch.ones(2)}}, {})
    file = folder / "weights.safetensors"
    for position in range(file.stat().st_size):
        flip(file, position)
        assert "weights.safetensors" in damage(folder)
        flip(file, position)
    assert damage(folder) is None


def test_latest_raises_if_every_checkpoint_is_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        latest(tmp_path)
    save_steps(tmp_path, None, None)
    for step in (1, 2):
        truncate(tmp_path / "checkpoint" / str(step) / "weights.safetensors")
    warnings = []
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        latest(tmp_path, warn=warnings.append)
    assert len(warnings) == 2


def test_every_file_is_hashed_once(tmp_path, monkeypatch):
    save_steps(tmp_path, None)
    hashed, sha256 = [], checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda file: hashed.append(file.name) or sha256(file))
    read(latest(tmp_path), verified=True)
    assert set(hashed) == {"weights.safetensors", "optimizer.safetensors", "state.json"}
    assert len(hashed) == len(set(hashed))


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10):
        save(tmp_path, step, tensors(), {"best_step": None})
    assert steps(tmp_path) == [9, 10] and latest(tmp_path).name == "10"
