"""Backbones: timm's ResNets of basic or bottleneck blocks, with batch norm and ReLU (ResNet, ResNeXt, wide, -c to -t).

A block is a residual block, counted across the stages: `layer2.3` of a ResNet-50 is block 6. Instead of tokens, blocks
take and return feature maps (B, C, H, W). Batch norms always use their pretrained running statistics, also in training
mode, and never update them: the statistics of a few images are noisy, and updates would change frozen blocks. The
scale and shift of a norm train with their block. `ops/convolution.py` says what is saved for the backward pass.
"""

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from moe_bsr.config import BackboneConfig, Config, require
from moe_bsr.config.registry import Choice
from moe_bsr.model.backbones import BACKBONES, Backbone, ImageSettings
from moe_bsr.model.backbones.pretrained import NOT_BACKBONE, Unfilled, load_network, misfits, named_network
from moe_bsr.model.backbones.weights import check_usable, read
from moe_bsr.model.block import Record
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.convolution import normed_convolution, relu

STORAGES = ("exact", "recompute")
KNOWN = {
    ResNet, BasicBlock, Bottleneck, nn.Sequential, nn.Identity, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d,
    nn.AvgPool2d, SelectAdaptivePool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
}  # fmt: skip
ANCHOR = "layer1.0.conv1.weight"  # a tensor that every ResNet has, by timm's and torchvision's names


class ResidualNetwork(nn.Module):
    """A timm ResNet without its classifier: the stem, all residual blocks in one list, and the pooling.

    Attributes:
        blocks: timm's residual blocks of all stages, in order.
        norm, fc_norm, head, attn_pool, has_class_token, num_prefix_tokens, global_pool, embed_dim: as in timm's
            VisionTransformer. Parts that a ResNet lacks are None or nn.Identity.
        image_size: side of the images in pixels, as configured or as in pretraining.
    """

    has_class_token, num_prefix_tokens, global_pool, attn_pool = False, 0, "avg", None

    def __init__(self, resnet: ResNet, image_size: int | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, resnet.maxpool
        stages = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        self.blocks = nn.ModuleList(block for stage in stages for block in stage)
        self.norm, self.fc_norm, self.head = nn.Identity(), nn.Identity(), nn.Identity()
        self.pool = resnet.global_pool
        self.num_features = self.embed_dim = resnet.num_features
        self.pretrained_cfg = resnet.pretrained_cfg
        self.weights_notes: list[str] = getattr(resnet, "weights_notes", [])
        self.image_size = image_size or self.pretrained_cfg["input_size"][-1]

    def maps(self) -> list[tuple[int, int]]:
        """Return (channels, side in pixels) of each block's output."""
        side = self.image_size
        for layer in (*(conv for conv, _ in _pairs(self.conv1, self.bn1)), self.maxpool):
            side = _side(side, layer)
        found = []
        for block in self.blocks:
            for conv, _ in _inner(block):
                side = _side(side, conv)
            found.append((conv.out_channels, side))
        return found


def accepts(name: str) -> bool:
    return name.partition(".")[0] in timm.list_models(module="resnet")


def create_on_meta(config: BackboneConfig) -> ResidualNetwork:
    """Create the network on the meta device.

    Raises:
        ConfigError: unknown tag, or a ResNet with other parts than convolutions, batch norms and ReLUs.
    """
    with torch.device("meta"), Unfilled():
        return ResidualNetwork(_create(config), config.image_size)


def load(config: BackboneConfig, seed: int = 0) -> ResidualNetwork:
    """Load the backbone with its weights, without a classifier, in float32 on the CPU.

    Raises:
        ConfigError: as in `create_on_meta`; or the weights are absent or of another architecture.
    """
    return ResidualNetwork(load_network(config, seed, _create, _load_file), config.image_size)


def image_settings(config: BackboneConfig, network: ResidualNetwork) -> ImageSettings:
    """Return the image size, and the normalization, interpolation and crop that the backbone was trained with."""
    cfg = timm.data.resolve_model_data_config(network)
    return ImageSettings(
        network.image_size,
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cfg["interpolation"],
        cfg["crop_pct"],
        cfg["crop_mode"],
    )


def embed(network: ResidualNetwork, images: Tensor) -> Tokens:
    """Run the stem: (B, 3, S, S) normalized images -> (B, C, H, W) maps in the compute dtype."""
    x = images
    for conv, norm in _pairs(network.conv1, network.bn1):
        x = relu(normed_convolution(x, conv, norm))
    return Tokens(network.maxpool(x), None)


def forward(block: nn.Module, tokens: Tokens, *_: object) -> tuple[Tokens, Record]:
    """Run one residual block, (B, C, H, W) -> (B, C', H', W'). The record is empty."""
    x = y = tokens.x
    *inner, last = _inner(block)
    for conv, norm in inner:
        y = relu(normed_convolution(y, conv, norm))
    y = normed_convolution(y, *last)
    return Tokens(relu(y.add_(x if block.downsample is None else _shortcut(block.downsample, x))), None), Record()


def _shortcut(downsample: nn.Sequential, x: Tensor) -> Tensor:
    """Bring the block's input to the shape of its output. Some kinds of ResNet pool before the convolution."""
    *pools, conv, norm = downsample
    for pool in pools:
        x = pool(x)
    return normed_convolution(x, conv, norm)


def _inner(block: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield the convolutions and norms of a block that are not on its shortcut."""
    return _pairs(*(part for name, part in block.named_children() if name != "downsample"))


def _side(side: int, layer: nn.Conv2d | nn.MaxPool2d) -> int:
    """Return the side of the output maps of a convolution or pool."""
    values = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = (value if isinstance(value, int) else value[0] for value in values)
    return (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pairs(*parts: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield the convolutions in these modules, each with the norm that follows it."""
    layers = [layer for part in parts for layer in part.modules()]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    return zip(convolutions, [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)], strict=True)


def pool(network: ResidualNetwork, x: Tensor) -> Tensor:
    """Average the (B, C, H, W) maps of the last block to (B, C) features."""
    return network.pool(network.norm(x))


def check(config: Config, plan: list[BlockPlan]) -> None:
    """Refuse settings that need tokens.

    Raises:
        ConfigError: names the key.
    """
    for key, why in {
        "drop_blocks": "a convolutional network has no tokens to drop",
        "moe_blocks": "its blocks have no FFN that could become experts",
        "head_blocks": "it has no class token that heads could read",
    }.items():
        value = getattr(config.plan, key)
        require(not value, f"plan.{key}", value, f"must be []: {_is_resnet(config)}, and {why}")
    require(
        config.plan.train_weights != "proj",
        "plan.train_weights",
        "proj",
        f"must be all, bias or norm: {_is_resnet(config)}, which has no attention",
    )
    for block in plan:
        why = f"must be null: {_is_resnet(config)}, and adapters work only with Vision Transformers"
        require(block.adapter is None, "adapter", str(block.adapter), why)
        allowed = block.storage in map(Choice, STORAGES)
        require(allowed, "storage", str(block.storage), f"must be {' or '.join(STORAGES)}: {_is_resnet(config)}")


def _is_resnet(config: Config) -> str:
    return f"{config.backbone.name} is a ResNet"


def _create(config: BackboneConfig, pretrained: bool = False) -> ResNet:
    resnet = named_network(config.name, None, pretrained)
    odd = {type(part).__name__ for part in resnet.modules() if type(part) not in KNOWN}
    blurs = any(type(getattr(part, "aa", None)) is nn.AvgPool2d for part in resnet.modules())
    odd |= {"pools within its blocks"} if blurs else set()
    odd |= {"a convolution for a pool"} if type(resnet.maxpool) is not nn.MaxPool2d else set()
    require(
        not odd,
        "backbone.name",
        config.name,
        f"has {', '.join(sorted(odd))}; only ResNets of plain convolutions, batch norms and ReLUs work, such as "
        "resnet50, resnet26d, resnext50_32x4d and wide_resnet50_2",
    )
    return resnet


def _load_file(resnet: ResNet, file: Path) -> tuple[list[str], list[str]]:
    """Load a file with timm's or torchvision's names; return notes on the part that was used, and what does not fit."""
    expected = {name: value for name, value in resnet.state_dict().items() if value.is_floating_point()}
    tensors, notes = read(file, ANCHOR)
    check_usable({name: value for name, value in tensors.items() if name in expected})
    named = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    state = {name: value.float() for name, value in named.items() if not name.startswith(NOT_BACKBONE)}
    problems = misfits(state, expected)
    if not problems:
        resnet.load_state_dict(state, strict=False)
    return notes, problems


BACKBONES.register("resnet")(
    Backbone(
        accepts,
        create_on_meta,
        load,
        image_settings,
        embed,
        pool,
        lambda network: network.image_size,
        forward,
        check,
        of_tokens=False,
    )
)
