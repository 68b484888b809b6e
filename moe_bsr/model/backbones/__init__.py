"""Backbones: families of pretrained networks that a plan can be applied to; one file each.

A family says which names of `backbone.name` are its own, creates such a network with or without its weights, tells how
images must be prepared for it, and runs its blocks. The rest of the product asks a network for `blocks`, `norm`,
`fc_norm`, `head`, `attn_pool`, `num_features`, `embed_dim`, `has_class_token`, `num_prefix_tokens` and `global_pool`,
as timm's VisionTransformer has them. To add a family, write a file here that registers it and name it in `_KINDS`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_bsr.config import BackboneConfig, Config, require
from moe_bsr.config.registry import Registry


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How images must be prepared for a backbone: side in pixels, normalization, evaluation resize and crop."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A family of backbones.

    Attributes:
        accepts: whether a name is one of the family's.
        create_on_meta: config -> the network without values, instant.
        load: (config, seed) -> the network with its weights, without a classifier, in float32 on the CPU.
        image_settings: (config, network) -> how its images must be prepared.
        embed: (network, (B, 3, S, S) normalized images) -> Tokens of (B, N, D) or (B, C, H, W), in the compute dtype.
        pool: (network, what the last block leaves) -> (B, D) features for the heads.
        image_side: network -> pixels of an image's side.
        forward: of a block: (block, Tokens, context, task, replay, noise_key, needs_output) -> Tokens and its Record.
        check: (config, plan) raises ConfigError where the family cannot do what is asked of it.
        of_tokens: whether it is a Vision Transformer, see `require_tokens`.
    """

    accepts: Callable[[str], bool]
    create_on_meta: Callable[[BackboneConfig], nn.Module]
    load: Callable[[BackboneConfig, int], nn.Module]
    image_settings: Callable[[BackboneConfig, nn.Module], ImageSettings]
    embed: Callable[[nn.Module, Tensor], Any]
    pool: Callable[[nn.Module, Tensor], Tensor]
    image_side: Callable[[nn.Module], int]
    forward: Callable[..., tuple[Any, Any]]
    check: Callable[[Config, list[Any]], None] = lambda config, plan: None
    of_tokens: bool = True


BACKBONES: Registry[Backbone] = Registry("backbone.name")


def family_of(config: BackboneConfig) -> Backbone:
    """The family that accepts the name; "vit" is asked last, and refuses names that nobody knows."""
    asked = sorted(BACKBONES, key=lambda kind: kind == "vit")
    return next(BACKBONES[kind] for kind in asked if BACKBONES[kind].accepts(config.name))


def require_tokens(config: BackboneConfig, what: str) -> None:
    """Refuse a backbone without tokens for what is made for Vision Transformers alone.

    Raises:
        ConfigError: names the backbone, and what was asked.
    """
    of_tokens = family_of(config).of_tokens
    require(of_tokens, "backbone.name", config.name, f"no Vision Transformer, and {what} is made for these alone")


_KINDS = ("resnet", "vit")  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
