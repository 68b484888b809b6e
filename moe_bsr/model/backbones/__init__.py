"""Backbones: families of pretrained networks that a plan can be applied to; one file each.

A family says which names of `backbone.name` are its own, creates such a network with or without its weights, and
tells how images must be prepared for it. To add one, write a file here that registers it and name it in `_KINDS`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moe_bsr.config import BackboneConfig
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
        embed: (network, (B, 3, S, S) normalized images) -> (B, N, D) tokens, prefix tokens first.
        pool: (network, (B, N, D) tokens of the last block) -> (B, D) features for the heads.
    """

    accepts: Callable[[str], bool]
    create_on_meta: Callable[[BackboneConfig], nn.Module]
    load: Callable[[BackboneConfig, int], nn.Module]
    image_settings: Callable[[BackboneConfig, nn.Module], ImageSettings]
    embed: Callable[[nn.Module, Tensor], Tensor]
    pool: Callable[[nn.Module, Tensor], Tensor]


BACKBONES: Registry[Backbone] = Registry("backbone.name")


def family_of(config: BackboneConfig) -> Backbone:
    """The first registered family that accepts the name; the last one refuses names that nobody knows."""
    families = [BACKBONES[kind] for kind in BACKBONES]
    return next((family for family in families if family.accepts(config.name)), families[-1])


_KINDS = ("vit",)  # files whose import registers what they define; the last one is asked last
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
