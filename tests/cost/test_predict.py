"""A step put together from its sections equals the step traced in one piece, to the byte."""

import pytest
import torch
from tiny_models import CLASSES, KINDS, make_vit
from whole_step import trace_whole

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES

PLANS = {
    "full": {"train_blocks": "all"},
    "last": {"train_blocks": []},
    "bsr": {"train_blocks": [1, 3], "drop_blocks": [0, 1, 2]},
    "moe-bsr": {"train_blocks": [1, 3], "drop_blocks": [1, 2], "moe_blocks": [1, 3]},
}


def make_config(plan: str, **changes) -> Config:
    keys = {"train_blocks": [], "drop_blocks": [], "moe_blocks": []} | PLANS[plan]
    return configuration.replace(
        Config(),
        moe__num_experts=4,
        moe__top_k=2,
        runtime__device="cpu",
        runtime__threads=torch.get_num_threads(),
        **{f"plan__{key}": value for key, value in keys.items()},
        **changes,
    )


def both(config: Config, kind: str = "class-token", precision: str = "fp32", batch: int = 5):
    model = MultitaskViT(make_vit(kind), config, CLASSES)
    shares = dict.fromkeys(config.plan.moe_blocks, 1.5)
    cost = predict(model, config, batch=batch, precision=precision, task="two", shares=shares)
    return cost, trace_whole(model, config, batch=batch, precision=precision, task="two", share=1.5)


def assert_equal(cost, whole) -> None:
    for name in ("parameters", "gradients", "optimizer", "average", "kept", "forward_flops", "step_flops"):
        assert getattr(cost, name) == getattr(whole, name), name
    assert cost.transients == whole.transients
    standing = cost.parameters + cost.optimizer + cost.average
    assert cost.peak == standing + max(whole.peaks.values())
    assert {k: v for k, v in cost.kept_by_block.items() if v} == whole.kept_by_block


@pytest.mark.parametrize("storage", list(STORAGES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", list(PLANS))
def test_sections_add_up_to_the_step(plan, precision, storage):
    assert_equal(*both(make_config(plan, storage=storage), precision=precision))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("plan", ["full", "bsr"])
def test_sections_of_every_kind_of_backbone_add_up(plan, kind):
    assert_equal(*both(make_config(plan), kind))
