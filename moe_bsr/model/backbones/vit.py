"""Backbones: any plain timm VisionTransformer, from the hub, a local file or bundled with this package.

timm's parameter names are kept, so every published checkpoint of such a model loads as it is. Position embeddings are
resized to the configured image size.
"""

import json
from pathlib import Path

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from moe_bsr.config import BackboneConfig, ConfigError, require
from moe_bsr.config.errors import show
from moe_bsr.model import block
from moe_bsr.model.backbones import BACKBONES, Backbone, ImageSettings
from moe_bsr.model.backbones.pretrained import (
    NOT_BACKBONE,
    Unfilled,
    bundled_metadata,
    load_network,
    misfits,
    named_network,
)
from moe_bsr.model.backbones.weights import NotWeights, check_usable, foreign, npz_misfit, read
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.linear import compute_dtype
from moe_bsr.ops.patches import embed_patches


def create_on_meta(config: BackboneConfig) -> VisionTransformer:
    """Create the network on the meta device, which is instant: for checks, plans and costs.

    Raises:
        ConfigError: unknown name, impossible image size, or blocks whose forward differs from a plain ViT's.
    """
    with torch.device("meta"), Unfilled():
        return _create(config)


def load(config: BackboneConfig, seed: int = 0) -> VisionTransformer:
    """Load the backbone with its weights, without a classifier, in float32 on the CPU.

    Raises:
        ConfigError: as in `create_on_meta`; or the weights are absent, or differ in names and shapes.
    """
    return load_network(config, seed, _create, _load_file)


def image_settings(config: BackboneConfig, vit: VisionTransformer) -> ImageSettings:
    """Return the image size, and the normalization, interpolation and crop that the backbone was trained with."""
    size = vit.patch_embed.img_size[0]
    if (meta := bundled_metadata(config.name)) is not None:
        return ImageSettings(size, tuple(json.loads(meta["mean"])), tuple(json.loads(meta["std"])), "bicubic", 1.0)
    cfg = timm.data.resolve_model_data_config(vit)
    return ImageSettings(
        size, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], cfg["crop_pct"], cfg["crop_mode"]
    )


def embed(vit: VisionTransformer, images: Tensor) -> Tokens:
    """Embed (B, 3, S, S) normalized images as (B, N, D) tokens, prefix tokens first, in the compute dtype."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(embed_patches(vit.patch_embed, images))))
    origin = torch.arange(x.shape[1] - vit.num_prefix_tokens, device=x.device)
    return Tokens(x.to(compute_dtype(x)), origin.expand(x.shape[0], -1))


def pool(vit: VisionTransformer, x: Tensor) -> Tensor:
    """Normalize and pool the last block's tokens as the backbone does: (B, N, D) -> (B, D)."""
    x = x[:, :1] if vit.global_pool == "token" else x  # the other tokens need not be normalized
    return vit.forward_head(vit.norm(x), pre_logits=True)


def _create(config: BackboneConfig, pretrained: bool = False) -> VisionTransformer:
    try:
        vit = named_network(config.name, config.image_size, pretrained)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if pretrained or config.image_size is None:
            raise
        with torch.device("meta"), Unfilled():
            plain = named_network(config.name, None)  # raises if the name is at fault
        plain = f"; {config.name} is no timm VisionTransformer" if type(plain) is not VisionTransformer else ""
        key, value = ("backbone.name", config.name) if plain else ("backbone.image_size", config.image_size)
        raise ConfigError(f"{key} = {show(value)}: {error}{plain}") from None
    require(
        type(vit) is VisionTransformer,
        "backbone.name",
        config.name,
        f"is a timm {type(vit).__name__}; only plain VisionTransformers and ResNets work here (distilled, "
        "hybrid, Swin, EVA and other convolutional models have another forward)",
    )
    require(
        type(vit.patch_embed) is PatchEmbed,
        "backbone.name",
        config.name,
        "is a hybrid: a convolutional network makes its tokens; only plain patch embeddings work",
    )
    odd = sorted({why for block in vit.blocks if (why := _unsupported(block)) is not None})
    require(
        not odd,
        "backbone.name",
        config.name,
        f"its blocks are {', '.join(odd)}; only timm's plain Block with Attention and no dropout works",
    )
    height, width = vit.patch_embed.img_size
    require(height == width, "backbone.name", config.name, f"takes {height} x {width} images; only square ones work")
    patch = vit.patch_embed.patch_size[0]
    require(
        height >= patch and height % patch == 0, "backbone.image_size", height, f"a multiple of the patch size {patch}"
    )
    return vit


def _unsupported(block: nn.Module) -> str | None:
    """Name what a block is if `model.block.forward` does not compute the same as its own forward; None if it does."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return type(block).__name__
    dropout = [name for name, module in block.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    return f"{type(block).__name__} with dropout in {', '.join(dropout)}" if dropout else None


def _load_file(vit: VisionTransformer, file: Path) -> tuple[list[str], list[str]]:
    """Load a weights file into `vit`. Return notes on the part of the file that was used, and what does not fit."""
    notes, problems = ([], _load_npz(vit, file)) if file.suffix == ".npz" else _load_tensors(vit, file)
    check_usable(vit.state_dict())
    return notes, problems


def _load_npz(vit: VisionTransformer, file: Path) -> list[str]:
    """Load a file of Google's original release; return what does not fit."""
    with file.open("rb") as stream:
        if (other := foreign(stream.read(4096))) is not None:
            raise NotWeights(other)
    try:
        problem = npz_misfit(file, len(vit.blocks))
        if problem is None:
            vit.load_pretrained(str(file))
    except NotWeights:
        raise
    except Exception as error:  # damaged archives and arrays of other shapes raise many kinds
        if "allow_pickle" in str(error):
            raise NotWeights("holds Python objects; only arrays are read") from None
        problem = f"unreadable, or other arrays than Google's release has: {error}"
    return [] if problem is None else [problem]


def _load_tensors(vit: VisionTransformer, file: Path) -> tuple[list[str], list[str]]:
    """Load named tensors; return notes on the part of the file that was used, and what does not fit."""
    tensors, notes = read(file)
    expected = vit.state_dict()
    check_usable({name: value for name, value in tensors.items() if name in expected})
    try:
        state = checkpoint_filter_fn(tensors, vit)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:  # it resizes tensors before it compares shapes
        return notes, [*misfits(tensors, expected), *str(error).splitlines()[:1]]
    state = {name: value.float() for name, value in state.items() if not name.startswith(NOT_BACKBONE)}
    problems = misfits(state, expected)
    if not problems:
        vit.load_state_dict(state)
    return notes, problems


FAMILY = Backbone(
    lambda name: True,
    create_on_meta,
    load,
    image_settings,
    embed,
    pool,
    lambda vit: vit.patch_embed.img_size[0],
    block.forward,
)
BACKBONES.register("vit")(FAMILY)
