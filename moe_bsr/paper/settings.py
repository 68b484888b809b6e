"""The networks behind the published figures, as our own plans on backbones on the meta device."""

import copy
from dataclasses import dataclass
from functools import lru_cache

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.multitask import MultitaskViT, build_on_meta
from moe_bsr.paper import shapes
from moe_bsr.paper.shapes import Shape

BACKBONES = {"DeiT-S": "deit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
FIVE = {"cifar10": 10, "cifar100": 100, "pets": 37, "flowers": 102, "food101": 101}


@dataclass(frozen=True, slots=True)
class Setting:
    """One fine-tuning setting of the paper.

    Attributes:
        tasks: (name, number of classes) of each task.
        trainable, drop, experts: indices of the blocks that train, drop tokens, and have experts. keep: keep rate.
        beside: indices of the blocks that get a trained block beside them, as published.
        substring: select trained parameters as the released scripts do: a parameter trains if a block's index occurs
            anywhere in its name, so that "2" also trains every fc2 and norm2.
    """

    backbone: str
    tasks: tuple[tuple[str, int], ...] = (("cifar10", 10),)
    trainable: str | tuple[int, ...] = "all"
    drop: tuple[int, ...] = ()
    keep: float = 0.5
    fuse: str = "raw"
    experts: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    substring: bool = False

    def __str__(self) -> str:
        what = {"all": "all blocks", (): "head only"}.get(self.trainable, f"blocks {_text(self.trainable)}")
        what = f"blocks beside {_text(self.beside)}" if self.beside else what
        drop = f", keep {self.keep:g} at {_text(self.drop)}" if self.drop else ""
        return (
            f"{self.backbone}, {what}{drop}{', not fused' if self.fuse == 'none' else ''}"
            f"{', experts' if self.experts else ''}{', substring selection' if self.substring else ''}"
        )


def _text(blocks: tuple[int, ...]) -> str:
    return ",".join(map(str, blocks))


def config(setting: Setting) -> Config:
    """Return the setting as a configuration of ours, in float32."""
    trainable = "all" if setting.trainable == "all" else list(setting.trainable)
    beside = [{"kind": "repnet", "published": True, "blocks": list(setting.beside)}]
    return configuration.from_dict(
        {
            "tasks": [name for name, _ in setting.tasks],
            "backbone": {"name": BACKBONES[setting.backbone], "weights": "random"},
            "plan": {
                "train_blocks": trainable,
                "drop_blocks": list(setting.drop),
                "keep_rate": setting.keep,
                "moe_blocks": list(setting.experts),
            },
            "adapter": beside if setting.beside else None,
            "tokens": {"fuse": setting.fuse},
            "moe": {"renormalize_gates": False, "balance_loss": "none"},
            "train": {"optimizer": "sgd", "batch_size": 128},
            "runtime": {"device": "cpu", "precision": "fp32"},
        }
    )


@lru_cache
def network(setting: Setting) -> MultitaskViT:
    """Return the setting's model on the meta device. It is cached and must not be changed."""
    model = build_on_meta(config(setting), dict(setting.tasks))
    if setting.substring:
        select_by_substring(model, setting.trainable)
    return model


@lru_cache
def shape(setting: Setting) -> Shape:
    """Return the setting's model as the published estimators see it."""
    model = network(setting)
    if setting.beside:  # the released scripts always train the final norm
        model = copy.deepcopy(model)
        model.vit.norm.requires_grad_(True)
    return shapes.from_model(model)


@lru_cache
def ours(setting: Setting, batch: int) -> Cost | None:
    """Return the cost of a step of our own code; None for the substring selection, which it does not have."""
    if setting.substring:
        return None
    return predict(network(setting), config(setting), batch=batch, precision="fp32", scratch=False)


def select_by_substring(model: MultitaskViT, blocks: tuple[int, ...]) -> None:
    """Select the trained parameters as the released scripts do.

    The released estimator nevertheless lets the gradient path start at the first of the given blocks.
    """
    for name, parameter in model.vit.named_parameters():
        parameter.requires_grad_(any(str(i) in name for i in blocks) or name.startswith("norm."))
    model.path_start = min(blocks)
