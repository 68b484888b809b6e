"""Backbones: weights from files in every form, resized position embeddings, and clear refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tiny_models import Unsafe

from moe_bsr.config import BackboneConfig, Config, ConfigError, MoEConfig, PlanConfig
from moe_bsr.model import multitask
from moe_bsr.model.backbones import pretrained
from moe_bsr.model.backbones import vit as vit_family
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.backbones.vit import create_on_meta, image_settings, load

NAME = "test_vit"  # timm's own miniature: 6 blocks of width 64, patches of 16 px, 160 px images
CLASSES = {"one": 3}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights with a classifier, as a published checkpoint has one."""
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


def refusal(config: BackboneConfig, act=load) -> str:
    with pytest.raises(ConfigError) as error:
        act(config)
    return str(error.value)


# --- weights from files ---


@pytest.mark.parametrize(
    "file, wrap",
    [("w.safetensors", None), ("w.pth", None), ("w.pth", "model"), ("w.pth", "state_dict"), ("w.pt", None)],
)
def test_weights_of_a_local_file_arrive_and_its_head_is_ignored(tmp_path, state, file, wrap):
    path = saved({wrap: state} if wrap else state, tmp_path / file)
    vit = load(BackboneConfig(name=NAME, weights=str(path)))
    assert vit.num_classes == 0 and not list(vit.head.parameters())
    assert digest(vit.state_dict()) == digest(without_head(state))


def test_a_file_of_half_the_precision_loads_in_float32(tmp_path, state):
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
    """The names and axes of Google's .npz checkpoints."""

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
    message = refusal(BackboneConfig(name=NAME, weights=str(tmp_path / "short.npz")))
    assert "does not fit test_vit" in message and "encoderblock_3/LayerNorm_2/scale" in message


@pytest.mark.skipif(
    "MOE_BSR_WEIGHTS" not in os.environ, reason="MOE_BSR_WEIGHTS names no safetensors file of deit_tiny_patch16_224"
)
def test_published_deit_tiny_weights_load_and_run_as_timms_own():
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


def test_random_weights_follow_the_seed_and_leave_the_global_generator():
    config = BackboneConfig(name=NAME, weights="random")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (digest(load(config, seed).state_dict()) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(1), expected)


def test_a_skeleton_has_no_values():
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


def test_image_settings_are_timms(state):
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


def test_a_bundled_backbone_brings_its_architecture_and_settings(bundled):
    config = BackboneConfig(name="our_vit", weights="bundled")
    assert digest(load(config).state_dict()) == digest(bundled.state_dict())
    settings = image_settings(config, load(config))
    assert (settings.size, settings.mean) == (16, (0.1, 0.2, 0.3))
    larger = load(BackboneConfig(name="our_vit", weights="bundled", image_size=24))
    assert larger.pos_embed.shape == (1, 37, 16)


def test_bundled_is_refused_for_a_backbone_that_is_not(bundled):
    message = refusal(BackboneConfig(name=NAME, weights="bundled"))
    assert "backbone.weights = 'bundled'" in message and "our_vit" in message and NAME in message


def test_a_bundled_backbone_is_not_on_the_hub(bundled):
    assert "hub" in refusal(BackboneConfig(name="our_vit", weights="hub"))


def test_the_packaged_backbone_loads():
    config = BackboneConfig()
    vit = load(config)
    assert len(vit.blocks) == 12 and image_settings(config, vit).size == 64
    assert all(value.isfinite().all() for value in vit.state_dict().values())


# --- refusals ---


@pytest.mark.parametrize(
    "config, words",
    [
        (
            BackboneConfig(name="vit_tiny_patch16_225"),
            ["backbone.name = 'vit_tiny_patch16_225'", "Unknown model", "vit_tiny_patch16_224", "bundled here"],
        ),
        (BackboneConfig(name="swin_tiny_patch4_window7_224"), ["SwinTransformer", "VisionTransformer"]),
        (BackboneConfig(name="deit_tiny_distilled_patch16_224"), ["VisionTransformerDistilled", "distilled"]),
        (BackboneConfig(name="resnet18"), ["ResNet"]),
        (BackboneConfig(name="resnet18", image_size=64), ["backbone.name = 'resnet18'", "VisionTransformer"]),
        (BackboneConfig(name="vit_relpos_small_patch16_224"), ["VisionTransformerRelPos"]),
        (BackboneConfig(name="eva02_tiny_patch14_224"), ["backbone.name", "Eva"]),
        (BackboneConfig(name="vit_dpwee_patch16_reg1_gap_256"), ["DiffParallelScalingBlock", "plain Block"]),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
def test_a_backbone_that_cannot_work_is_refused_before_it_is_made(config, words):
    message = refusal(config, create_on_meta)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(name="vit_tiny_patch16_224.no_such_tag"),
        BackboneConfig(name="vit_tiny_patch16_224", image_size=8),
        BackboneConfig(name="vit_tiny_patch16_224", image_size=100),
        BackboneConfig(name="vit_pico_patch8_64", image_size=100),
    ],
)
def test_a_wrong_tag_or_image_size_is_refused_by_its_key(config):
    message = refusal(config, create_on_meta)
    assert message.startswith("backbone.name" if "." in config.name else "backbone.image_size")


def test_a_hybrid_is_refused():
    assert "hybrid" in refusal(BackboneConfig(name="vit_base_resnet26d_224"), create_on_meta)


def test_a_swiglu_backbone_works_until_experts_are_asked_of_it():
    name = "vit_giant_patch14_dinov2"
    message = refusal(BackboneConfig(name=name), lambda c: multitask.MultitaskViT(create_on_meta(c), Config(), CLASSES))
    assert "plan.moe_blocks = 'GluMlp'" in message and "leave plan.moe_blocks empty" in message
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=0, mlp_layer=SwiGLUPacked
    )
    plan = PlanConfig(train_blocks=[1], drop_blocks=[1], moe_blocks=[])
    output = multitask.MultitaskViT(vit, Config(plan=plan), CLASSES)(torch.randn(2, 3, 8, 8), "one")
    assert output.logits.shape == (2, 3) and output.records[1].dropped is not None


@pytest.mark.parametrize(
    "change, key",
    [
        ({"plan": PlanConfig(drop_blocks=[11])}, "plan.drop_blocks"),
        ({"plan": PlanConfig(train_blocks=[12], moe_blocks=[])}, "plan.train_blocks"),
        pytest.param(
            {"backbone": BackboneConfig(name="vit_giant_patch14_dinov2", weights="random")}, "plan.moe_blocks"
        ),
        pytest.param({"moe": MoEConfig(mlp_ratio=3)}, "moe.mlp_ratio"),
    ],
    ids=["drop", "trainable", "swiglu", "ratio"],
)
def test_an_impossible_model_is_refused_before_weights_are_read(monkeypatch, change, key):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(vit_family, "load_network", read)
    with pytest.raises(AssertionError):
        multitask.build(Config(), CLASSES)
    with pytest.raises(ConfigError, match=key):
        multitask.build(Config(**change), CLASSES)


def test_an_absent_file_is_refused_with_what_may_be_given(tmp_path):
    message = refusal(BackboneConfig(name=NAME, weights=str(tmp_path / "no.safetensors")))
    assert "no.safetensors" in message and "hub, bundled, random" in message


def test_weights_that_do_not_fit_are_refused_with_keys_and_shapes(tmp_path, state):
    wrong = dict(state)
    del wrong["blocks.1.attn.qkv.weight"]
    wrong["blocks.9.norm1.weight"] = torch.zeros(64)
    wrong["norm.bias"] = torch.zeros(3)
    path = str(saved(wrong, tmp_path / "w.safetensors"))
    message = refusal(BackboneConfig(name=NAME, weights=path))
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
    message = refusal(BackboneConfig(name=NAME, weights=path))
    assert "pos_embed is (1, 11, 64), expected" in message


def test_what_is_beside_the_tensors_is_passed_over_and_a_wrapper_named(tmp_path, state):
    torch.save(dict(state) | {"epoch": 3}, tmp_path / "w.pth")
    load(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    torch.save({"mine": dict(state), "yours": dict(state), "epoch": 3}, tmp_path / "w.pth")
    assert "mine, yours, epoch" in refusal(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))


def test_many_misfits_are_counted(tmp_path, state):
    path = str(saved({"blocks.0.norm1.weight": torch.zeros(64)}, tmp_path / "w.safetensors"))
    message = refusal(BackboneConfig(name=NAME, weights=path))
    assert f"and {len(without_head(state)) - 1 - 3} more" in message


def test_weights_of_another_architecture_are_refused(tmp_path, state):
    path = str(saved(state, tmp_path / "w.safetensors"))
    message = refusal(BackboneConfig(name="vit_tiny_patch16_224", weights=path))
    assert "does not fit vit_tiny_patch16_224" in message
    assert "missing blocks.6." in message and "expected (" in message  # deeper, and wider


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path, state):
    torch.save(state | {"args": Unsafe(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        load(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "w.npz"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, file):
    (tmp_path / file).write_bytes(b"not weights at all")
    assert file in refusal(BackboneConfig(name=NAME, weights=str(tmp_path / file)))


# --- identity of weights ---


def test_digest_is_the_identity_of_names_shapes_types_and_bits():
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
