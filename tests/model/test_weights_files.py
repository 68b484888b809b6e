"""Weights files of many kinds: each is loaded or refused with its kind named; code in a file never runs."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_models import Unsafe

from moe_bsr.config import BackboneConfig, ConfigError, from_dict
from moe_bsr.model.backbones import pretrained
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.backbones.vit import create_on_meta, load
from moe_bsr.model.multitask import build
from moe_bsr.model.summary import summary

NAME = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return timm.create_model(NAME, num_classes=0).state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load(BackboneConfig(name=NAME, weights=str(path)))
    message = str(error.value)
    assert message.startswith("backbone.weights = ") and path.name in message
    assert "weights_only" not in message and "\n" not in message and len(message) <= 700
    return message


def loaded(path: Path):
    return load(BackboneConfig(name=NAME, weights=str(path)))


# --- files that are not weights ---

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 22883404\n"
FOREIGN = {
    "pointer": (LFS, "Git LFS pointer"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "web page"),
    "page after blank lines": (b"\n\n  <html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "empty": (b"", "empty"),
    "zeros": (bytes(10_000), "zeros"),
    "text": (b"Too many requests", "text file, which begins with 'Too many requests'"),
    "json": (b'{"error": "gated repository"}', "text file"),
    "annex": (b"/annex/objects/SHA256E-s22--4d.pth\n", "text file"),
    "gzip": (gzip.compress(b"weights"), "gzip"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
    "noise": (bytes(range(255, 0, -1)), "damaged"),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".npz", ".bin"])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_kind_is_refused_with_its_kind(tmp_path, case, ending):
    content, words = FOREIGN[case]
    (tmp_path / f"w{ending}").write_bytes(content)
    message = refusal(tmp_path / f"w{ending}")
    assert words in message, message


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused_as_such(tmp_path, state, ending, share):
    path = tmp_path / f"w{ending}"
    (torch.save if ending == ".pth" else save_file)(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut off or damaged" in refusal(path)


def test_the_file_extension_does_not_matter(tmp_path, state):
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    assert digest(loaded(tmp_path / "w.pth").state_dict()) == digest(state)
    assert digest(loaded(tmp_path / "w.safetensors").state_dict()) == digest(state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", ["numpy", "path", "code", "model"])
def test_a_pickle_with_other_objects_is_refused_with_types_and_a_remedy(tmp_path, state, monkeypatch, case, zipped):
    beside, words = {
        "numpy": (np.float64(81.2), "numpy"),
        "path": (Path("somewhere"), "pathlib"),
        "code": (Unsafe(tmp_path / "ran"), "getattr"),
        "model": (timm.create_model(NAME, num_classes=0), "timm.layers"),
    }[case]
    path = tmp_path / "w.pth"
    torch.save({"model": state, "beside": beside}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "save only the tensors" in message and (words in message or not zipped), message
    assert not (tmp_path / "ran").exists()
    if case == "numpy":  # run the commands that the message gives
        lines = message.partition("tensors: ")[2].partition(" (use s")[0].replace("s.items()", "s['model'].items()")
        monkeypatch.chdir(tmp_path)
        exec(lines, {})
        assert digest(loaded(tmp_path / "tensors.pth").state_dict()) == digest(state)


def test_a_torchscript_file_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pth")
    assert "TorchScript" in refusal(tmp_path / "w.pth")


# --- wrappers ---


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "model.", "encoder.",
        "student.", "teacher.backbone.", "module.backbone.", "vit.", "net.0.", "visual.trunk.",
    ],
)  # fmt: skip
def test_a_wrapper_prefix_is_removed_and_reported(tmp_path, state, prefix):
    wrapped = {prefix + name: value for name, value in state.items()}
    save_file(wrapped | {"projector.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    vit = loaded(tmp_path / "w.safetensors")
    assert digest(vit.state_dict()) == digest(state)
    (note,) = vit.weights_notes
    assert repr(prefix) in note and "1 tensors without it" in note


def test_a_prefix_around_an_incomplete_backbone_is_refused(tmp_path, state):
    wrapped = {"backbone." + name: value for name, value in state.items() if "blocks.2" not in name}
    save_file(wrapped, tmp_path / "w.safetensors")
    assert "missing blocks.2.norm1.weight" in refusal(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "parts, taken",
    [
        (["model", "model_ema"], "model_ema"),
        (["state_dict", "state_dict_ema"], "state_dict_ema"),
        (["student", "teacher"], "teacher"),
        (["teacher"], "teacher"),
        (["encoder", "target_encoder", "predictor"], "target_encoder"),
        (["model"], "model"),
        (["my_network"], "my_network"),
        (["model", "optimizer"], "model"),
    ],
)
def test_one_of_several_networks_in_a_checkpoint_is_chosen_and_reported(tmp_path, state, parts, taken):
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {part: state if part == taken else other for part in parts}
    torch.save(content | {"epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    vit = loaded(tmp_path / "w.pth")
    assert digest(vit.state_dict()) == digest(state)
    (note,) = vit.weights_notes
    assert note.startswith(f"{taken} was used") and all(part in note for part in parts)


def test_nested_networks_and_prefixes_are_all_reported(tmp_path, state):
    inner = {f"module.backbone.{name}": value for name, value in state.items()}
    torch.save({"checkpoint": {"teacher": inner, "student": inner}}, tmp_path / "w.pth")
    config = from_dict({"backbone": {"name": NAME, "weights": str(tmp_path / "w.pth")}, "tasks": ["a"]} | SMALL)
    lines = "\n".join(summary(build(config, {"a": 2}), config))
    assert "checkpoint.teacher was used, not student" in lines and "'module.backbone.' was removed" in lines


SMALL = {"plan": {"train_blocks": [5], "drop_blocks": [], "moe_blocks": []}}


def test_a_file_with_two_networks_is_refused(tmp_path, state):
    both = {f"{prefix}.{name}": value for prefix in ("left", "right") for name, value in state.items()}
    save_file({name: value.clone() for name, value in both.items()}, tmp_path / "w.safetensors")
    assert "left., right." in refusal(tmp_path / "w.safetensors")


# --- values that are not weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["blocks.5.mlp.fc1.weight", "pos_embed", "norm.bias"])
def test_a_tensor_that_is_not_finite_is_refused_by_its_name(tmp_path, state, value, ending, name):
    broken = {key: tensor.clone() for key, tensor in state.items()}
    broken[name].view(-1)[-1] = value
    (torch.save if ending == ".pth" else save_file)(broken, tmp_path / f"w{ending}")
    message = refusal(tmp_path / f"w{ending}")
    assert "not finite" in message and name in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.qint8])
def test_quantized_tensors_are_refused(tmp_path, state, dtype):
    matrices = {
        name: torch.quantize_per_tensor(value, 0.01, 0, dtype) if dtype == torch.qint8 else (100 * value).to(dtype)
        for name, value in state.items()
        if name.endswith("fc1.weight")
    }
    torch.save(state | matrices, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert "quantized; export the float weights" in message and "blocks.0.mlp.fc1.weight" in message


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda t: t.to("meta")])
def test_tensors_that_are_sparse_or_without_data_are_refused_by_name(tmp_path, state, make):
    odd = {name: make(value) for name, value in state.items() if name.endswith("fc1.weight")}
    torch.save(state | odd, tmp_path / "w.pth")
    assert "dense" in (message := refusal(tmp_path / "w.pth")) and "blocks.0.mlp.fc1.weight" in message


def test_an_empty_checkpoint_is_refused_as_such(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    assert "nothing at all" in refusal(tmp_path / "w.pth")


def test_a_torch_averaged_model_is_loaded_without_its_counter(tmp_path, state):
    torch.save({f"module.{name}": v for name, v in state.items()} | {"n_averaged": torch.tensor(5)}, tmp_path / "w.pth")
    assert digest(loaded(tmp_path / "w.pth").state_dict()) == digest(state)


# --- Google's .npz ---


def flax(blocks: int, stacked: bool = False) -> dict[str, np.ndarray]:
    """Return names as in the original release, with just enough entries to give the number of blocks."""
    if stacked:
        return {"params/Transformer/encoderblock/LayerNorm_0/scale": np.ones((blocks, 64), np.float32)}
    return {f"Transformer/encoderblock_{i}/LayerNorm_0/scale": np.ones(64, np.float32) for i in range(blocks)}


@pytest.mark.parametrize("blocks", [5, 7, 12])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_npz_of_another_depth_is_refused(tmp_path, blocks, stacked):
    np.savez(tmp_path / "w.npz", **flax(blocks, stacked))
    assert f"it has {blocks} blocks, the model 6" in refusal(tmp_path / "w.npz")


def test_an_npz_of_integers_or_objects_is_refused(tmp_path):
    name = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
    np.savez(tmp_path / "w.npz", **flax(6) | {name: np.ones((64, 192), np.int8)})
    assert f"{name} is int8: quantized" in refusal(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **flax(6) | {"config": np.array([{"a": 1}], dtype=object)})
    assert "Python objects" in refusal(tmp_path / "w.npz")


# --- names of backbones ---


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("timm/deit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("facebook/dinov2-small", "vit_small_patch14_dinov2"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("hf_hub:a/b", ""),
        ("local-dir:/tmp", ""),
        ("../../x", ""),
        ("weights/vit_pico_patch8_64", ""),
        ("vit.safetensors/..", ""),
        ("", ""),
        ("vit tiny", ""),
        ("x" * 400, ""),
        ("nothing_like_it", ""),
        ("resnet18", ""),
        ("RESNET50", ""),
    ],
)
@pytest.mark.parametrize("size", [None, 64])
def test_an_invalid_backbone_name_is_refused(name, nearest, size):
    with pytest.raises(ConfigError) as error:
        create_on_meta(BackboneConfig(name=name, image_size=size))
    message = str(error.value)
    assert message.startswith("backbone.name = ") and len(message) <= 700
    assert not nearest or f" {nearest}" in message.partition("nearest in timm:")[2]


def test_no_backbone_is_read_from_outside_the_package(tmp_path, monkeypatch):
    inside = tmp_path / "weights"
    inside.mkdir()
    monkeypatch.setattr(pretrained, "BUNDLED", inside)
    metadata = {"architecture": json.dumps({"depth": 1}), "mean": "[0]", "std": "[1]"}
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors", metadata)
    for name in ("../outside", str(tmp_path / "outside")):
        with pytest.raises(ConfigError, match=r"backbone\.name = "):
            create_on_meta(BackboneConfig(name=name))
