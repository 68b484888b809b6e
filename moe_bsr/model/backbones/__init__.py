"""Backbones: families of pretrained networks to which a plan can be applied. Each family is one file.

A family decides which values of `backbone.name` it accepts, creates such a network with or without its weights, says
how images must be prepared for it, and runs its blocks. The rest of the package uses these attributes of a network, as
timm's VisionTransformer has them: `blocks`, `norm`, `fc_norm`, `head`, `attn_pool`, `num_features`, `embed_dim`,
`has_class_token`, `num_prefix_tokens` and `global_pool`. To add a family, write a file here that registers it, and add
its name to `_KINDS`. `pretrained.py` and `weights.py` are shared by all families.
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
        accepts: name -> whether it belongs to this family.
        create_on_meta: config -> the network on the meta device, without values.
        load: (config, seed) -> the network with its weights, without a classifier, in float32 on the CPU.
        image_settings: (config, network) -> how its images must be prepared.
        embed: (network, (B, 3, S, S) normalized images) -> Tokens of (B, N, D) or (B, C, H, W), in the compute dtype.
        pool: (network, output of the last block) -> (B, D) features for the heads.
        image_side: network -> side of its images in pixels.
        forward: (block, Tokens, context, task, replay, noise_key, needs_output) -> the block's output and its Record.
        check: (config, plan) -> None; raises ConfigError if the family does not support the configuration.
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

    def __reduce__(self) -> tuple:
        # By name, so that models can be pickled although families contain lambdas.
        return _registered, (next(kind for kind in BACKBONES if BACKBONES[kind] is self),)


BACKBONES: Registry[Backbone] = Registry("backbone.name")


def _registered(kind: str) -> Backbone:
    return BACKBONES[kind]


def family_of(config: BackboneConfig) -> Backbone:
    """Return the family that accepts the name. "vit" accepts every name, so it is tried last."""
    in_order = sorted(BACKBONES, key=lambda kind: kind == "vit")
    return next(BACKBONES[kind] for kind in in_order if BACKBONES[kind].accepts(config.name))


def require_tokens(config: BackboneConfig, what: str) -> None:
    """Refuse backbones without tokens, for features that need a Vision Transformer.

    Args:
        what: name of the feature, the subject of the error message.
    Raises:
        ConfigError: the backbone has no tokens.
    """
    of_tokens = family_of(config).of_tokens
    require(of_tokens, "backbone.name", config.name, f"is not a Vision Transformer, and {what} works only with these")


_KINDS = ("resnet", "vit")  # files whose import registers what they define
for _name in _KINDS:
    importlib.import_module(f"{__name__}.{_name}")
