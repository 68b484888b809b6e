"""The networks behind the published figures, as plans of our own on backbones without values."""

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
        tasks: name and number of classes of each.
        beside: blocks beside which another one trains, as published.
        substring: choose trained parameters as the released scripts did: a parameter trains if the text of
            a block's index occurs anywhere in its name, so that "2" also trains every fc2 and norm2.
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
    """The setting as a configuration of ours, in float32."""
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
    """Of the setting, without values; nobody changes it."""
    model = build_on_meta(config(setting), dict(setting.tasks))
    if setting.substring:
        select_by_substring(model, setting.trainable)
    return model


@lru_cache
def shape(setting: Setting) -> Shape:
    model = network(setting)
    if setting.beside:  # the released selection has the final norm in it whatever else trains
        model = copy.deepcopy(model)
        model.vit.norm.requires_grad_(True)
    return shapes.from_model(model)


@lru_cache
def ours(setting: Setting, batch: int) -> Cost | None:
    """The cost of a step of our own code; None for the substring selection, which it does not do."""
    if setting.substring:
        return None
    return predict(network(setting), config(setting), batch=batch, precision="fp32", scratch=False)


def select_by_substring(model: MultitaskViT, blocks: tuple[int, ...]) -> None:
    """The released selection; the estimator took its gradient path from the first index all the same."""
    for name, parameter in model.vit.named_parameters():
        parameter.requires_grad_(any(str(i) in name for i in blocks) or name.startswith("norm."))
    model.path_start = min(blocks)
