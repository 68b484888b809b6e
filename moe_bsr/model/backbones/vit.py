"""Backbones: any timm VisionTransformer, from the hub, a local file or bundled with this package.

timm's parameter names are kept, so every published checkpoint of such a model loads as it is; position
embeddings are resized to the image size asked for.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_bsr.config import BackboneConfig, ConfigError, require
from moe_bsr.config.errors import show
from moe_bsr.model import block
from moe_bsr.model.backbones import BACKBONES, Backbone, ImageSettings
from moe_bsr.model.backbones.weights import NotWeights, check_usable, foreign, npz_misfit, read
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.linear import compute_dtype
from moe_bsr.ops.patches import embed_patches

BUNDLED = Path(__file__).parents[2] / "weights"
NOT_BACKBONE = ("head.", "pre_logits.", "mask_token", "decoder", "fc.")


def create_on_meta(config: BackboneConfig) -> VisionTransformer:
    """The architecture alone, on the meta device: instant, for checks, plans and costs.

    Raises:
        ConfigError: unknown name, or a model whose block forward is not a plain ViT's.
    """
    with torch.device("meta"), Unfilled():
        return _create(config)


class Unfilled(TorchFunctionMode):
    """Meta tensors are not filled with first values: they have none, and torch clamps them in slow Python code."""

    FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in self.FILLS and args[0].is_meta else function(*args, **(kwargs or {}))


def load(config: BackboneConfig, seed: int = 0) -> VisionTransformer:
    """The backbone with its weights, without a classifier, in float32 on the CPU.

    Raises:
        ConfigError: as `create_on_meta`; weights absent, or not of this architecture (which keys, which shapes).
    """
    return load_network(config, seed, _create, _load_file)


def load_network(
    config: BackboneConfig,
    seed: int,
    create: Callable[..., nn.Module],
    load_file: Callable[[nn.Module, Path, BackboneConfig], None],
) -> Any:
    """A network of any family with weights from the hub, from a file or at random.

    Args:
        create: (config, pretrained=False) -> the network. load_file: puts a file's weights into it.
    """
    if config.weights == "hub":
        with torch.device("meta"), Unfilled():
            create(config)  # what is wrong with its name is not the hub's fault
        require(
            _bundled_file(config.name) is None,
            "backbone.weights",
            "hub",
            f"{config.name} is not on the hub but bundled here: use bundled",
        )
        try:
            return create(config, pretrained=True)
        except Exception as error:  # hub clients raise many kinds; all mean the same to the user
            raise ConfigError(
                f"backbone.weights = 'hub': could not fetch {config.name}: {error}; "
                "give a local .safetensors, .pth or .npz file instead"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(config)
    if config.weights != "random":
        load_file(network, _weights_file(config), config)
    return network


def image_settings(config: BackboneConfig, vit: VisionTransformer) -> ImageSettings:
    """Size, mean, std, interpolation and crop share this backbone was trained with."""
    size = vit.patch_embed.img_size[0]
    if (file := _bundled_file(config.name)) is not None:
        meta = _metadata(file)
        return ImageSettings(size, tuple(json.loads(meta["mean"])), tuple(json.loads(meta["std"])), "bicubic", 1.0)
    cfg = timm.data.resolve_model_data_config(vit)
    return ImageSettings(
        size, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], cfg["crop_pct"], cfg["crop_mode"]
    )


def embed(vit: VisionTransformer, images: Tensor) -> Tokens:
    """(B, 3, S, S) normalized images -> (B, N, D) tokens, prefix tokens first, in the compute dtype."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(embed_patches(vit.patch_embed, images))))
    origin = torch.arange(x.shape[1] - vit.num_prefix_tokens, device=x.device)
    return Tokens(x.to(compute_dtype(x)), origin.expand(x.shape[0], -1))


def pool(vit: VisionTransformer, x: Tensor) -> Tensor:
    """(B, N, D) tokens of the last block -> (B, D) features, normalized and pooled as the backbone does."""
    # Where only the class token is looked at, there is no need to normalize the others.
    x = x[:, :1] if vit.global_pool == "token" else x
    return vit.forward_head(vit.norm(x), pre_logits=True)


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 of tensors by name, shape, type and bytes: the identity of weights, wherever they lie."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _create(config: BackboneConfig, pretrained: bool = False) -> VisionTransformer:
    _check_name(config.name)
    try:
        vit = named_network(config.name, config.image_size, pretrained)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if pretrained or config.image_size is None:
            raise
        with torch.device("meta"), Unfilled():
            plain = named_network(config.name, None)  # if it exists without the size, the size is at fault
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


def named_network(name: str, size: int | None, pretrained: bool = False) -> nn.Module:
    """The bundled or timm network of that name.

    Raises:
        ConfigError: there is none. TypeError, ValueError, AssertionError, RuntimeError: not of that size.
    """
    size_argument = {} if size is None else {"img_size": size}
    if (file := _bundled_file(name)) is not None:
        arguments = json.loads(_metadata(file)["architecture"])
        return VisionTransformer(**(arguments | size_argument), num_classes=0)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **size_argument)
    except RuntimeError as error:
        if not re.match("Unknown model|Invalid pretrained tag", str(error)):
            raise
        raise ConfigError(f"backbone.name = {show(name)}: {error}; {_known(name)}") from None


def in_timm(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which timm itself creates this network, without a classifier."""
    size = {} if config.image_size is None else {"img_size": config.image_size}
    if (file := _bundled_file(config.name)) is not None:  # timm has ViTs of every width and depth under one name
        return "vit_tiny_patch16_224", json.loads(_metadata(file)["architecture"]) | size
    return config.name.partition(".")[0], size


def _check_name(name: str) -> None:
    """Refuse what is no name: a path, or a place on a hub."""
    if re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII) is None:
        what = "a network's name in timm, without hub or folder (its file goes into backbone.weights)"
        raise ConfigError(f"backbone.name = {show(name)}: {what}; {_known(name)}")


def _known(name: str) -> str:
    """What is bundled, and which of timm's names have all the words of this one, or are like it."""
    tags = "." in name
    names = timm.list_models(["vit_*", "deit*", "resnet*"], pretrained=tags)
    plain = re.split(r"[/:]", name)[-1].replace("-", "_")
    words = [word for word in plain.split("_") if word]
    near = [each for each in names if words and all(word in each for word in words)][:2]
    near += difflib.get_close_matches(plain[:100], names, 3)
    bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.safetensors")))
    return f"bundled here: {bundled}; nearest in timm: {', '.join(dict.fromkeys(near)) or 'none'}"


def _unsupported(block: nn.Module) -> str | None:
    """What a block is, if the one forward of `model.block` is not its own."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return type(block).__name__
    dropout = [name for name, module in block.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    return f"{type(block).__name__} with dropout in {', '.join(dropout)}" if dropout else None


def _bundled_file(name: str) -> Path | None:
    file = BUNDLED / f"{name}.safetensors"
    return file if file.is_file() else None


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def _weights_file(config: BackboneConfig) -> Path:
    if config.weights == "bundled":
        file = _bundled_file(config.name)
        if file is None:
            known = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.safetensors")))
            raise ConfigError(
                f"backbone.weights = 'bundled': bundled are {known}, not {config.name}; use "
                "hub, random, or the path of a .safetensors, .pth or .npz file"
            )
        return file
    file = Path(config.weights).expanduser()
    require(
        os.path.isfile(file),  # of a name that no file can have, Path.is_file would raise
        "backbone.weights",
        config.weights,
        "no such file; give hub, bundled, random, or the path of a .safetensors, .pth or .npz file",
    )
    return file


def _load_file(vit: VisionTransformer, file: Path, config: BackboneConfig) -> None:
    """Put a file's weights into `vit`; `vit.weights_notes` says which part of the file they were."""
    vit.weights_notes = []
    try:
        problem = _load_npz(vit, file) if file.suffix == ".npz" else _load_tensors(vit, file)
        check_usable(vit.state_dict())
    except NotWeights as error:
        raise ConfigError(f"backbone.weights = {show(str(file))}: {error}") from None
    if problem:
        raise ConfigError(f"backbone.weights = {show(str(file))}: does not fit {config.name}: {problem}")


def _load_npz(vit: VisionTransformer, file: Path) -> str | None:
    """Load Google's original release; returns why it does not fit, if it does not."""
    with file.open("rb") as stream:
        if (other := foreign(stream.read(4096))) is not None:
            raise NotWeights(other)
    try:
        problem = npz_misfit(file, len(vit.blocks))
        if problem is None:
            vit.load_pretrained(str(file))
        return problem
    except NotWeights:
        raise
    except Exception as error:  # a damaged archive and a misfit raise many kinds
        if "allow_pickle" in str(error):
            raise NotWeights("holds Python objects; only arrays are read") from None
        return f"unreadable, or other arrays than Google's release has: {error}"


def _load_tensors(vit: VisionTransformer, file: Path) -> str | None:
    """Load named tensors; returns why they do not fit, if they do not."""
    tensors, vit.weights_notes = read(file)
    expected = vit.state_dict()
    check_usable({name: value for name, value in tensors.items() if name in expected})
    try:
        state = checkpoint_filter_fn(tensors, vit)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:  # it resizes what it takes for the same model's
        problems = [*misfits(tensors, expected), *str(error).splitlines()[:1]]
    else:
        state = {k: v.float() for k, v in state.items() if not k.startswith(NOT_BACKBONE)}
        problems = misfits(state, expected)
    if problems:
        return "; ".join(problems)
    vit.load_state_dict(state)
    return None


def misfits(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Which keys and shapes differ: up to three of each kind, and how many more."""
    kinds = [
        [
            f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
            for k in expected
            if k in state and state[k].shape != expected[k].shape
        ],
        [f"missing {k}" for k in expected if k not in state],
        [f"unexpected {k}" for k in state if k not in expected and not k.startswith(NOT_BACKBONE)],
    ]
    return [
        text for kind in kinds for text in kind[:3] + ([f"and {len(kind) - 3} more like it"] if len(kind) > 3 else [])
    ]


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
