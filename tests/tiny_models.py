"""Models of a few thousand parameters that several test files share."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer

from moe_bsr.config import Config, MoEConfig, PlanConfig, TokensConfig
from moe_bsr.config.registry import NoOptions
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES, Storage

WIDTH = 8
CLASSES = {"one": 3, "two": 5, "three": 2}
TASKS = list(CLASSES)
KINDS = {
    "class-token": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "average-pool": {"class_token": False, "global_pool": "avg"},
    "class-token-average-pool": {"global_pool": "avg"},
    "registers-without-class-token": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "layer-scale": {"init_values": 0.3},
    "qk-norm": {"qk_norm": True},
    "pre-norm": {"pre_norm": True},
    "attention-pool": {"class_token": False, "global_pool": "map"},
    "no-bias": {"qkv_bias": False, "proj_bias": False},
    "scaled-attention-norm": {"scale_attn_norm": True},
    "dynamic-size": {"dynamic_img_size": True},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers that depend only on shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_mlp(hidden: int = 4 * WIDTH, bias: bool = True, seed: int = 0) -> Mlp:
    mlp = Mlp(WIDTH, hidden, bias=bias)
    for i, parameter in enumerate(mlp.parameters()):
        parameter.data = 0.5 * normal(*parameter.shape, seed=100 * seed + i)
    return mlp


def make_moe(bias: bool = True, distinct: bool = True, scale: float = 50.0, **options) -> MoE:
    """Return a layer whose router has clear preferences, and whose experts differ if `distinct`."""
    config = MoEConfig(**{"num_experts": 6, "top_k": 2, "init_noise": float(distinct)} | options)
    moe = MoE(make_mlp(bias=bias), config, TASKS, (0, 3))
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.mul_(scale)
    return moe


def make_vit(kind: str = "class-token", num_classes: int = 0) -> VisionTransformer:
    """Return a network of four blocks and 16 patches, without parameters of 0 or 1, which could hide mistakes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        vit = VisionTransformer(
            **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": num_classes}
            | KINDS[kind]
        )
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    return vit


def make_model(
    kind: str = "class-token",
    *,
    vit=None,
    classes=CLASSES,
    storage="exact",
    adapter=None,
    train_blocks=(1, 3),
    drop_blocks=(1, 2),
    keep_rate=0.5,
    moe_blocks=(),
    tokens=None,
    **moe,
) -> MultitaskViT:
    """Return a model for the tasks of `CLASSES`. By default blocks 1 and 3 train, and 1 and 2 drop tokens."""
    plan = PlanConfig(
        train_blocks=train_blocks if train_blocks == "all" else list(train_blocks),
        drop_blocks=list(drop_blocks),
        keep_rate=keep_rate,
        moe_blocks=list(moe_blocks),
    )
    config = Config(
        storage=storage,
        adapter=adapter,
        plan=plan,
        tokens=tokens or TokensConfig(),
        moe=MoEConfig(**{"num_experts": 4, "top_k": 2} | moe),
    )
    model = MultitaskViT(vit or make_vit(kind), config, classes)
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.mul_(30.0)
    return model


def scale_routers(model: MultitaskViT, scale: float) -> None:
    with torch.no_grad():
        for index in model.balance.blocks:
            for parameter in model.vit.blocks[index].mlp.router.parameters():
                parameter.mul_(scale)


def gradients(model: MultitaskViT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved_for_backward(run) -> list[torch.Tensor]:
    """Return the tensors that autograd saves while `run()` runs."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


@contextmanager
def plain_autograd():
    """Context in which `exact` leaves saving to autograd, so that other saved-tensor hooks see all tensors."""
    with pytest.MonkeyPatch.context() as patch:
        plain = Storage(lambda forward, tokens, parameters, options: forward(tokens))
        patch.setitem(STORAGES._entries, "exact", (plain, NoOptions))
        yield


class Unsafe:
    """Object that runs code when it is unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
