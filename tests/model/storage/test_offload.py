"""Offloaded activations: the same gradients to the bit, unnamed files that disappear, and the error of a full disk."""

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
    """Bytes of each file within a folder that this process has open, named or not."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and str(link.readlink()).startswith(str(folder)):
            found.append(os.stat(link).st_size)
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit_and_no_file_is_left(name, bf16, tmp_path):
    exact, model = (
        make_model(**MODELS[name]),
        make_model(storage={"kind": "offload", "folder": str(tmp_path)}, **MODELS[name]),
    )
    forward(exact, IMAGES, bf16)[0].backward()
    loss, _ = forward(model, IMAGES, bf16)
    assert len(open_files(tmp_path)) == len(model.plan) - model.path_start
    assert not list(tmp_path.iterdir())  # no name
    loss.backward()
    expected = gradients(exact)
    assert [n for n, g in gradients(model).items() if not torch.equal(g, expected[n])] == []
    assert open_files(tmp_path) == []


def test_files_go_with_the_graph(tmp_path):
    loss, _ = forward(make_model(storage={"kind": "offload", "folder": str(tmp_path)}), IMAGES)
    assert sum(open_files(tmp_path)) > 0
    del loss
    assert open_files(tmp_path) == []


def test_values_come_back_in_any_layout(tmp_path):
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        whole = normal(4, 6, 20)
        parts = [whole, whole.transpose(0, 1), whole[:, ::2], whole.bfloat16(), whole[:0]]
        kept = [InFile(part, file, "here") for part in parts]
        for part, each in zip(parts, kept, strict=True):
            assert torch.equal(each.restore(), part) and each.restore().dtype == part.dtype
        file.truncate(100)
        with pytest.raises(OSError, match="the file has become shorter"):
            kept[1].restore()


def test_what_is_on_disk_is_predicted_and_hardly_anything_is_kept(tmp_path):
    cost, step = predicted_and_step({"kind": "offload", "folder": str(tmp_path)}, IMAGES)
    exact, _ = predicted_and_step("exact", IMAGES)
    assert cost.kept == pytest.approx(kept_by(step), abs=64)
    step.forward()
    assert cost.written == sum(open_files(tmp_path))
    block = kept_by_block(cost)["block 1"]
    rows = IMAGES * 17
    assert block == 4 * (2 * 2 * rows + 2 * rows)  # statistics of two norms, log-sums of two heads
    ten = 4 * 10 * rows * 16  # activations of a token's width; the last block has the class token's alone
    assert 3 * ten < cost.written < 4 * ten
    assert exact.written == 0 and cost.kept + cost.written == exact.kept
    assert re.search(r"\d MB more on disk\)", cost.summary(IMAGES)) and "disk" not in exact.summary(IMAGES)


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_ends_training_in_a_line(tmp_path, monkeypatch):
    config = make_config(tmp_path, storage={"kind": "offload", "folder": str(tmp_path)}, train__steps=1)
    trainer = make_trainer(config, tmp_path / "run")
    monkeypatch.setattr(trainer, "_check_room", lambda: None)  # for checkpoints, which would not fit either
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        with pytest.raises(TrainingFailed) as error:
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(error.value)
    assert f"storage.folder {tmp_path}: File too large; raise the limit of a file's size" in said and "\n" not in said


def test_a_folder_that_is_not_there_is_refused_before_training(tmp_path):
    nowhere = tmp_path / "nowhere"
    config = make_config(tmp_path, storage={"kind": "offload", "folder": str(nowhere)})
    with pytest.raises(ConfigError, match=f"storage.folder = '{nowhere}': must be an existing folder"):
        predict(build_on_meta(config, {"shapes": 10, "fractals": 12}), config, batch=4, precision="fp32")


def test_a_gpu_is_refused(tmp_path):
    config = make_config(tmp_path, storage="offload", runtime__device="cuda")
    with pytest.raises(ConfigError, match="storage = 'offload': works only on a CPU, not on cuda"):
        predict(build_on_meta(config, {"shapes": 10, "fractals": 12}), config, batch=4, precision="fp32")


def test_a_folder_in_memory_is_doubted(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"disk / ext4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw 0 0\ndisk {tmp_path}/fast/deep ext4 rw 0 0\n"
    )
    monkeypatch.setattr(memory, "MOUNTS", mounts)
    places = [f"{tmp_path}/{name}" for name in ("fast", "fast/a", "fast/deep/a", "faster", "")]
    assert [memory.holds(place) for place in places] == [True, True, False, False, False]
    storage = [{"kind": "offload", "folder": place, "blocks": [i]} for i, place in enumerate(places)]
    told = [line for line in doubts(make_config(tmp_path, storage=storage), {"shapes": 23}) if "offload" in line]
    assert len(told) == 2 and f"writes to {places[0]}, which is in memory itself (tmpfs)" in told[0]
