"""Backbones: weights from files of every format, resized position embeddings, and clear errors."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tiny_models import Unsafe

from moe_bsr.config import BackboneConfig, Config, PlanConfig
from moe_bsr.model import multitask
from moe_bsr.model.backbones import pretrained
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.backbones.vit import create_on_meta, image_settings, load

NAME = "test_vit"  # timm's own test model: 6 blocks of width 64, patches of 16 px, images of 160 px
CLASSES = {"one": 3}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights with a classifier, like a published checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        vit = timm.create_model(NAME, num_classes=7)
        return {name: torch.randn_like(value) for name, value in vit.state_dict().items()}


def without_head(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def saved(state: dict, path: Path, **metadata: str) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata or None)
    else:
        torch.save(state, path)
    return path


# --- weights from files ---


@pytest.mark.parametrize(
    "file, wrap",
    [("w.safetensors", None), ("w.pth", None), ("w.pth", "model"), ("w.pth", "state_dict"), ("w.pt", None)],
)
def test_weights_of_a_local_file_are_loaded_without_its_head(tmp_path, state, file, wrap):
    path = saved({wrap: state} if wrap else state, tmp_path / file)
    vit = load(BackboneConfig(name=NAME, weights=str(path)))
    assert vit.num_classes == 0 and not list(vit.head.parameters())
    assert digest(vit.state_dict()) == digest(without_head(state))


def test_a_float16_file_loads_in_float32(tmp_path, state):
    half = {name: value.half() for name, value in state.items()}
    vit = load(BackboneConfig(name=NAME, weights=str(saved(half, tmp_path / "w.safetensors"))))
    loaded = vit.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert digest(loaded) == digest({k: v.float() for k, v in without_head(half).items()})


@pytest.mark.parametrize("size", [64, 96, 224])
def test_position_embeddings_are_resized_to_the_image_size(tmp_path, state, size):
    path = saved(state, tmp_path / "w.safetensors")
    vit = load(BackboneConfig(name=NAME, weights=str(path), image_size=size))
    grid = size // 16
    expected = resample_abs_pos_embed(state["pos_embed"], (grid, grid))
    torch.testing.assert_close(vit.pos_embed.data, expected)
    assert vit.forward_features(torch.randn(1, 3, size, size)).shape == (1, grid * grid + 1, 64)
    others = [
        {k: v for k, v in weights.items() if k != "pos_embed"} for weights in (vit.state_dict(), without_head(state))
    ]
    assert digest(others[0]) == digest(others[1])


def flax_layout(vit: VisionTransformer) -> dict[str, np.ndarray]:
    """Return the weights with the names and axes of Google's .npz checkpoints."""

    def numbers(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().numpy()

    layout = {
        "embedding/kernel": numbers(vit.patch_embed.proj.weight.permute(2, 3, 1, 0)),
        "embedding/bias": numbers(vit.patch_embed.proj.bias),
        "cls": numbers(vit.cls_token),
        "Transformer/posembed_input/pos_embedding": numbers(vit.pos_embed),
        "Transformer/encoder_norm/scale": numbers(vit.norm.weight),
        "Transformer/encoder_norm/bias": numbers(vit.norm.bias),
    }
    for i, block in enumerate(vit.blocks):
        at, heads = f"Transformer/encoderblock_{i}/", block.attn.num_heads
        width = block.attn.qkv.in_features
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            layout[f"{at}{name}/scale"] = numbers(norm.weight)
            layout[f"{at}{name}/bias"] = numbers(norm.bias)
        attention = f"{at}MultiHeadDotProductAttention_1/"
        parts = zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        )
        for name, weight, bias in parts:
            layout[f"{attention}{name}/kernel"] = numbers(weight.T.reshape(width, heads, -1))
            layout[f"{attention}{name}/bias"] = numbers(bias.reshape(heads, -1))
        out = block.attn.proj.weight.T.reshape(heads, -1, width)
        layout[f"{attention}out/kernel"] = numbers(out)
        layout[f"{attention}out/bias"] = numbers(block.attn.proj.bias)
        for j, linear in enumerate((block.mlp.fc1, block.mlp.fc2)):
            layout[f"{at}MlpBlock_3/Dense_{j}/kernel"] = numbers(linear.weight.T)
            layout[f"{at}MlpBlock_3/Dense_{j}/bias"] = numbers(linear.bias)
    return layout


def test_an_npz_of_the_original_release_loads(tmp_path, state):
    vit = timm.create_model(NAME, num_classes=0)
    vit.load_state_dict(without_head(state))
    layout = flax_layout(vit)
    np.savez(tmp_path / "w.npz", **layout)
    loaded = load(BackboneConfig(name=NAME, weights=str(tmp_path / "w.npz")))
    assert digest(loaded.state_dict()) == digest(without_head(state))

    del layout["Transformer/encoderblock_3/LayerNorm_2/scale"]
    np.savez(tmp_path / "short.npz", **layout)
    message = refusal(load, BackboneConfig(name=NAME, weights=str(tmp_path / "short.npz")))
    assert "does not fit test_vit" in message and "encoderblock_3/LayerNorm_2/scale" in message


@pytest.mark.skipif(
    "MOE_BSR_WEIGHTS" not in os.environ, reason="MOE_BSR_WEIGHTS names no safetensors file of deit_tiny_patch16_224"
)
def test_published_deit_tiny_weights_give_the_features_of_timm():
    path = os.environ["MOE_BSR_WEIGHTS"]
    vit = load(BackboneConfig(name="deit_tiny_patch16_224", weights=path)).eval()
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=0).eval()
    published = {k: v.float() for k, v in load_file(path).items() if not k.startswith("head.")}
    theirs.load_state_dict(published)
    assert digest(vit.state_dict()) == digest(published)
    model = multitask.MultitaskViT(vit, Config(plan=PlanConfig(keep_rate=1.0)), CLASSES).eval()
    assert max(model.upcycling_errors.values()) < 1e-5
    images = torch.randn(1, 3, 224, 224)
    dense = model.heads["one"](theirs(images))
    torch.testing.assert_close(model(images, "one").logits, dense, rtol=1e-4, atol=1e-4)


# --- without a file ---


def test_random_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    config = BackboneConfig(name=NAME, weights="random")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (digest(load(config, seed).state_dict()) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(1), expected)


def test_a_network_on_meta_has_no_values():
    vit = create_on_meta(BackboneConfig(name="vit_giant_patch14_dinov2", weights="random"))
    assert all(p.device.type == "meta" for p in vit.parameters()) and len(vit.blocks) == 40


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "vit_base_patch16_224.augreg_in21k",
        "vit_large_patch16_224",
        "vit_base_patch16_224.mae",
        "vit_small_patch16_224.dino",
        "vit_small_patch14_reg4_dinov2.lvd142m",
    ],
)
def test_the_named_families_are_accepted(name):
    assert len(create_on_meta(BackboneConfig(name=name)).blocks) in (12, 24)


def test_image_settings_are_those_of_timm(state):
    config = BackboneConfig(name=NAME, weights="random", image_size=96)
    settings = image_settings(config, load(config))
    theirs = timm.data.resolve_model_data_config(timm.create_model(NAME))
    assert settings.size == 96
    assert (settings.mean, settings.std) == (tuple(theirs["mean"]), tuple(theirs["std"]))
    assert settings.interpolation == theirs["interpolation"]
    assert settings.crop_pct == theirs["crop_pct"]


# --- bundled weights ---


@pytest.fixture
def bundled(tmp_path, monkeypatch) -> VisionTransformer:
    architecture = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    vit = VisionTransformer(**architecture, num_classes=0)
    saved(
        vit.state_dict(),
        tmp_path / "our_vit.safetensors",
        architecture=json.dumps(architecture),
        mean="[0.1, 0.2, 0.3]",
        std="[0.5, 0.5, 0.5]",
    )
    monkeypatch.setattr(pretrained, "BUNDLED", tmp_path)
    return vit


def test_a_bundled_file_holds_its_architecture_and_settings(bundled):
    config = BackboneConfig(name="our_vit", weights="bundled")
    assert digest(load(config).state_dict()) == digest(bundled.state_dict())
    settings = image_settings(config, load(config))
    assert (settings.size, settings.mean) == (16, (0.1, 0.2, 0.3))
    larger = load(BackboneConfig(name="our_vit", weights="bundled", image_size=24))
    assert larger.pos_embed.shape == (1, 37, 16)


def test_bundled_weights_are_refused_for_a_backbone_that_is_not_bundled(bundled):
    message = refusal(load, BackboneConfig(name=NAME, weights="bundled"))
    assert "backbone.weights = 'bundled'" in message and "our_vit" in message and NAME in message


def test_a_bundled_backbone_is_not_on_the_hub(bundled):
    assert "hub" in refusal(load, BackboneConfig(name="our_vit", weights="hub"))


def test_the_packaged_backbone_loads():
    config = BackboneConfig()
    vit = load(config)
    assert len(vit.blocks) == 12 and image_settings(config, vit).size == 64
    assert all(value.isfinite().all() for value in vit.state_dict().values())


# --- refusals of files ---


def test_a_missing_file_is_refused_with_the_allowed_values(tmp_path):
    message = refusal(load, BackboneConfig(name=NAME, weights=str(tmp_path / "no.safetensors")))
    assert "no.safetensors" in message and "hub, bundled, random" in message


def test_weights_that_do_not_fit_are_refused_with_keys_and_shapes(tmp_path, state):
    wrong = dict(state)
    del wrong["blocks.1.attn.qkv.weight"]
    wrong["blocks.9.norm1.weight"] = torch.zeros(64)
    wrong["norm.bias"] = torch.zeros(3)
    path = str(saved(wrong, tmp_path / "w.safetensors"))
    message = refusal(load, BackboneConfig(name=NAME, weights=path))
    for words in (
        f"backbone.weights = '{path}'",
        f"does not fit {NAME}",
        "missing blocks.1.attn.qkv.weight",
        "unexpected blocks.9.norm1.weight",
        "norm.bias is (3,), expected (64,)",
    ):
        assert words in message, message


def test_weights_whose_prefix_tokens_differ_are_refused_with_shapes(tmp_path, state):
    path = str(saved(dict(state) | {"pos_embed": torch.zeros(1, 11, 64)}, tmp_path / "w.safetensors"))
    message = refusal(load, BackboneConfig(name=NAME, weights=path))
    assert "pos_embed is (1, 11, 64), expected" in message


def test_other_entries_beside_tensors_are_ignored_and_an_unknown_wrapper_is_reported(tmp_path, state):
    torch.save(dict(state) | {"epoch": 3}, tmp_path / "w.pth")
    load(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    torch.save({"mine": dict(state), "yours": dict(state), "epoch": 3}, tmp_path / "w.pth")
    assert "mine, yours, epoch" in refusal(load, BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))


def test_mismatches_beyond_the_first_three_are_counted(tmp_path, state):
    path = str(saved({"blocks.0.norm1.weight": torch.zeros(64)}, tmp_path / "w.safetensors"))
    message = refusal(load, BackboneConfig(name=NAME, weights=path))
    assert f"and {len(without_head(state)) - 1 - 3} more" in message


def test_weights_of_another_architecture_are_refused(tmp_path, state):
    path = str(saved(state, tmp_path / "w.safetensors"))
    message = refusal(load, BackboneConfig(name="vit_tiny_patch16_224", weights=path))
    assert "does not fit vit_tiny_patch16_224" in message
    assert "missing blocks.6." in message and "expected (" in message  # deeper and wider


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path, state):
    torch.save(state | {"args": Unsafe(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        load(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "w.npz"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, file):
    (tmp_path / file).write_bytes(b"not weights at all")
    assert file in refusal(load, BackboneConfig(name=NAME, weights=str(tmp_path / file)))


# --- identity of weights ---


def test_digest_depends_on_names_shapes_types_and_bits_only():
    state = {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    first = digest(state)
    assert first == digest(dict(reversed(state.items()))) and len(first) == 64
    strided = torch.stack([torch.arange(6.0), torch.zeros(6)], 1)[:, 0]
    assert digest(state | {"a": strided}) == first, "bytes, not memory layout"
    bits = state["a"].clone()
    bits.view(torch.int32)[3] ^= 1
    others = [
        state | {"a": bits},
        state | {"a": torch.arange(6.0).view(2, 3)},
        state | {"a": torch.arange(6)},
        state | {"b": torch.tensor(4)},
        {"x": state["a"], "b": state["b"], "c": state["c"]},
        state | {"a": torch.tensor([-0.0, 1, 2, 3, 4, 5])},
    ]
    assert len({first, *map(digest, others)}) == 1 + len(others)
