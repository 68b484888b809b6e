"""Backbones and models that are refused before any weights are read."""

import pytest
import torch
from refusals import refusal
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from moe_bsr.config import BackboneConfig, Config, ConfigError, MoEConfig, PlanConfig
from moe_bsr.model import multitask
from moe_bsr.model.backbones import vit as vit_family
from moe_bsr.model.backbones.vit import create_on_meta

CLASSES = {"one": 3}


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
def test_an_unsupported_backbone_is_refused_before_it_is_built(config, words):
    message = refusal(create_on_meta, config)
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
    message = refusal(create_on_meta, config)
    assert message.startswith("backbone.name" if "." in config.name else "backbone.image_size")


def test_a_hybrid_is_refused():
    assert "hybrid" in refusal(create_on_meta, BackboneConfig(name="vit_base_resnet26d_224"))


def test_a_swiglu_backbone_works_without_experts():
    name = "vit_giant_patch14_dinov2"
    message = refusal(lambda c: multitask.MultitaskViT(create_on_meta(c), Config(), CLASSES), BackboneConfig(name=name))
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
