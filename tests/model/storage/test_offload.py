"""Offloaded activations: bitwise equal gradients, unnamed files that disappear, and the error of a full disk."""

import os
import re
import resource
from pathlib import Path

import pytest
import torch
from tiny_models import gradients, make_model, normal
from tiny_runs import make_config, make_trainer
from tiny_storages import MODELS, forward, kept_by, kept_by_block, predicted_and_step

from moe_bsr.config import ConfigError
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.model.storage.offload import InFile
from moe_bsr.runtime import memory
from moe_bsr.training.doubts import doubts
from moe_bsr.training.trainer import TrainingFailed

IMAGES = 6


def open_files(folder: Path) -> list[int]:
    """Return the size in bytes of each file in a folder that this process has open, named or not."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and str(link.readlink()).startswith(str(folder)):
            found.append(os.stat(link).st_size)
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_equal_and_no_file_is_left(name, bf16, tmp_path):
    exact, model = (
        make_model(**MODELS[name]),
        make_model(storage={"kind": "offload", "folder": str(tmp_path)}, **MODELS[name]),
    )
    forward(exact, IMAGES, bf16)[0].backward()
    loss, _ = forward(model, IMAGES, bf16)
    assert len(open_files(tmp_path)) == len(model.plan) - model.path_start
    assert not list(tmp_path.iterdir())  # the files have no name
    loss.backward()
    expected = gradients(exact)
    assert [n for n, g in gradients(model).items() if not torch.equal(g, expected[n])] == []
    assert open_files(tmp_path) == []


def test_files_are_freed_with_the_graph(tmp_path):
    loss, logits = forward(make_model(storage={"kind": "offload", "folder": str(tmp_path)}), IMAGES)
    assert sum(open_files(tmp_path)) > 0
    del loss, logits
    assert open_files(tmp_path) == []


def test_tensors_of_any_layout_are_restored(tmp_path):
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        whole = normal(4, 6, 20)
        parts = [whole, whole.transpose(0, 1), whole[:, ::2], whole.bfloat16(), whole[:0]]
        kept = [InFile(part, file, "here") for part in parts]
        for part, each in zip(parts, kept, strict=True):
            assert torch.equal(each.restore(), part) and each.restore().dtype == part.dtype
        file.truncate(100)
        with pytest.raises(OSError, match="the file has become shorter"):
            kept[1].restore()


def test_bytes_on_disk_are_predicted_and_little_stays_in_memory(tmp_path):
    cost, step = predicted_and_step({"kind": "offload", "folder": str(tmp_path)}, IMAGES)
    exact, _ = predicted_and_step("exact", IMAGES)
    assert cost.kept == pytest.approx(kept_by(step), abs=64)
    step.forward()
    assert cost.written == sum(open_files(tmp_path))
    block = kept_by_block(cost)["block 1"]
    rows = IMAGES * 17
    assert block == 4 * (2 * 2 * rows + 2 * rows)  # statistics of two norms, log-sum-exps of two heads
    ten = 4 * 10 * rows * 16  # activations of a token's width; the last block has only the class token's
    assert 3 * ten < cost.written < 4 * ten
    assert exact.written == 0 and cost.kept + cost.written == exact.kept
    assert re.search(r"\d MB more on disk\)", cost.summary(IMAGES)) and "disk" not in exact.summary(IMAGES)


@pytest.mark.usefixtures("bare")
def test_a_full_disk_ends_training_with_a_one_line_error(tmp_path, monkeypatch):
    config = make_config(tmp_path, storage={"kind": "offload", "folder": str(tmp_path)}, train__steps=1)
    trainer = make_trainer(config, tmp_path / "run")
    monkeypatch.setattr(trainer, "_check_room", lambda: None)  # the check of space for checkpoints would fail first
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        with pytest.raises(TrainingFailed) as error:
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(error.value)
    assert f"storage.folder {tmp_path}: File too large; raise the limit of a file's size" in text and "\n" not in text


def test_a_missing_folder_is_refused_before_training(tmp_path):
    nowhere = tmp_path / "nowhere"
    config = make_config(tmp_path, storage={"kind": "offload", "folder": str(nowhere)})
    with pytest.raises(ConfigError, match=f"storage.folder = '{nowhere}': must be an existing folder"):
        predict(build_on_meta(config, {"shapes": 10, "fractals": 12}), config, batch=4, precision="fp32")


def test_a_gpu_is_refused(tmp_path):
    config = make_config(tmp_path, storage="offload", runtime__device="cuda")
    with pytest.raises(ConfigError, match="storage = 'offload': works only on a CPU, not on cuda"):
        predict(build_on_meta(config, {"shapes": 10, "fractals": 12}), config, batch=4, precision="fp32")


def test_a_folder_in_memory_gives_a_warning(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"disk / ext4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw 0 0\ndisk {tmp_path}/fast/deep ext4 rw 0 0\n"
    )
    monkeypatch.setattr(memory, "MOUNTS", mounts)
    folders = [f"{tmp_path}/{name}" for name in ("fast", "fast/a", "fast/deep/a", "faster", "")]
    assert [memory.holds(folder) for folder in folders] == [True, True, False, False, False]
    storage = [{"kind": "offload", "folder": folder, "blocks": [i]} for i, folder in enumerate(folders)]
    warnings = [line for line in doubts(make_config(tmp_path, storage=storage), {"shapes": 23}) if "offload" in line]
    assert len(warnings) == 2 and f"writes to {folders[0]}, which is in memory (tmpfs)" in warnings[0]
