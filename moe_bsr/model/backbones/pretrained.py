"""Create a backbone by its name and give it weights: from the hub, a file, this package, or at random.

All families share this. A family adds which architectures it accepts and how it reads the tensors of a file.
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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_bsr.config import BackboneConfig, ConfigError, require
from moe_bsr.config.errors import show
from moe_bsr.model.backbones.weights import NotWeights

BUNDLED = Path(__file__).parents[2] / "weights"
NOT_BACKBONE = ("head.", "pre_logits.", "mask_token", "decoder", "fc.")  # beginnings of tensor names to leave out


class Unfilled(TorchFunctionMode):
    """Context that skips the initialization of meta tensors.

    Meta tensors have no values, and torch clamps them in slow Python code.
    """

    FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in self.FILLS and args[0].is_meta else function(*args, **(kwargs or {}))


def load_network(
    config: BackboneConfig,
    seed: int,
    create: Callable[..., nn.Module],
    load_file: Callable[[nn.Module, Path], tuple[list[str], list[str]]],
) -> Any:
    """Return a network of any family in float32 on the CPU, with the weights that `config.weights` names.

    If the weights come from a file, `network.weights_notes` says which part of the file was used.

    Args:
        seed: for random weights.
        create: (config, pretrained=False) -> the network.
        load_file: loads (network, file) and returns notes on the part of the file that was used, and what does not fit.
            It raises NotWeights for a file that holds no usable weights.
    Raises:
        ConfigError: the name is unknown, or the weights are absent, unreadable or of another architecture.
    """
    if config.weights == "hub":
        with torch.device("meta"), Unfilled():
            create(config)  # so that an error in the name is not reported as an error of the hub
        require(
            bundled_metadata(config.name) is None,
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
    if config.weights == "random":
        return network
    file = _weights_file(config)
    try:
        network.weights_notes, problems = load_file(network, file)
    except NotWeights as error:
        raise ConfigError(f"backbone.weights = {show(str(file))}: {error}") from None
    if problems:
        raise ConfigError(f"backbone.weights = {show(str(file))}: does not fit {config.name}: {'; '.join(problems)}")
    return network


def named_network(name: str, size: int | None, pretrained: bool = False) -> nn.Module:
    """Create the bundled or timm network of that name, without a classifier.

    Args:
        size: image side in pixels; None for the network's own.
    Raises:
        ConfigError: the name is malformed or unknown.
        TypeError, ValueError, AssertionError, RuntimeError: the network cannot have that image size.
    """
    _check_name(name)
    size_argument = {} if size is None else {"img_size": size}
    if (metadata := bundled_metadata(name)) is not None:
        return VisionTransformer(**(json.loads(metadata["architecture"]) | size_argument), num_classes=0)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **size_argument)
    except RuntimeError as error:
        if not re.match("Unknown model|Invalid pretrained tag", str(error)):
            raise
        raise ConfigError(f"backbone.name = {show(name)}: {error}; {_suggestions(name)}") from None


def in_timm(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments by which timm itself creates this network, without a classifier."""
    size = {} if config.image_size is None else {"img_size": config.image_size}
    if (metadata := bundled_metadata(config.name)) is not None:  # one timm name covers ViTs of every width and depth
        return "vit_tiny_patch16_224", json.loads(metadata["architecture"]) | size
    return config.name.partition(".")[0], size


def bundled_metadata(name: str) -> dict[str, str] | None:
    """Return "architecture", "mean" and "std" of a bundled backbone, each as JSON; None if it is not bundled."""
    file = _bundled_file(name)
    if not file.is_file():
        return None
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def digest(state: dict[str, Tensor]) -> str:
    """Return the sha256 of tensors by name, shape, dtype and bytes. It identifies weights, wherever they are stored."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def misfits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Describe which names and shapes differ: up to three of each kind, and how many more there are."""
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


def _check_name(name: str) -> None:
    """Refuse paths and hub addresses."""
    if re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII) is None:
        allowed = "a network's name in timm, without hub or folder (its file goes into backbone.weights)"
        raise ConfigError(f"backbone.name = {show(name)}: {allowed}; {_suggestions(name)}")


def _suggestions(name: str) -> str:
    """List the bundled networks, and timm's names that contain all words of this name or are similar to it."""
    tags = "." in name
    names = timm.list_models(["vit_*", "deit*", "resnet*"], pretrained=tags)
    plain = re.split(r"[/:]", name)[-1].replace("-", "_")
    words = [word for word in plain.split("_") if word]
    near = [each for each in names if words and all(word in each for word in words)][:2]
    near += difflib.get_close_matches(plain[:100], names, 3)
    return f"bundled here: {_bundled_names()}; nearest in timm: {', '.join(dict.fromkeys(near)) or 'none'}"


def _bundled_file(name: str) -> Path:
    return BUNDLED / f"{name}.safetensors"


def _bundled_names() -> str:
    return ", ".join(sorted(file.stem for file in BUNDLED.glob("*.safetensors")))


def _weights_file(config: BackboneConfig) -> Path:
    if config.weights == "bundled":
        file = _bundled_file(config.name)
        if not file.is_file():
            raise ConfigError(
                f"backbone.weights = 'bundled': bundled are {_bundled_names()}, not {config.name}; use "
                "hub, random, or the path of a .safetensors, .pth or .npz file"
            )
        return file
    file = Path(config.weights).expanduser()
    require(
        os.path.isfile(file),  # Path.is_file raises for a name that no file can have
        "backbone.weights",
        config.weights,
        "no such file; give hub, bundled, random, or the path of a .safetensors, .pth or .npz file",
    )
    return file
