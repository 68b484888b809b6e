"""The plan: which blocks train, drop and route, by index, and where the gradient path starts."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from moe_bsr.config import Config, ConfigError, PlanConfig, TokensConfig
from moe_bsr.model.plan import BlockPlan, freeze, gradient_path, make_plan, stages, token_counts
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Tokens, drop

DEPTH = 12


def make_vit(**options) -> VisionTransformer:
    return VisionTransformer(
        **{"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": DEPTH, "num_heads": 2, "num_classes": 0} | options
    )


def trained(vit) -> set[str]:
    return {name for name, p in vit.named_parameters() if p.requires_grad}


def of_blocks(vit, *indices: int) -> set[str]:
    return {f"blocks.{i}.{name}" for i in indices for name, _ in vit.blocks[i].named_parameters()}


def plan_config(**options) -> PlanConfig:
    return PlanConfig(**{"drop_blocks": [], "moe_blocks": []} | options)


# --- settings of each block ---


def test_plan_of_the_paper():
    plan = make_plan(Config(), DEPTH)
    assert [i for i, b in enumerate(plan) if b.trainable] == [3, 7, 11]
    assert [i for i, b in enumerate(plan) if b.moe] == [3, 7, 11]
    assert {i: b.keep_rate for i, b in enumerate(plan) if b.keep_rate < 1} == {3: 0.5, 6: 0.5, 9: 0.5}
    assert plan[0] == BlockPlan(trainable=False)


def test_one_keep_rate_for_each_drop_in_its_order():
    plan = make_plan(
        Config(plan=plan_config(train_blocks=[1], drop_blocks=[9, 2, 10], keep_rate=[0.9, 0.2, 1.0])), DEPTH
    )
    assert {i: b.keep_rate for i, b in enumerate(plan) if b.keep_rate < 1} == {9: 0.9, 2: 0.2}


@pytest.mark.parametrize("key", ["train_blocks", "drop_blocks", "moe_blocks"])
@pytest.mark.parametrize("index", [-1, DEPTH, 100])
def test_a_block_that_does_not_exist_is_refused(key, index):
    options = {"train_blocks": "all", key: [0, index]}
    with pytest.raises(ConfigError, match=rf"plan\.{key} = \[0, {index}\].*\[{index}\].*0 to 11"):
        make_plan(Config(plan=plan_config(**options)), DEPTH)


def test_a_drop_at_the_last_block_is_refused_unless_it_drops_nothing():
    with pytest.raises(ConfigError, match=r"plan\.drop_blocks = \[3, 11\].*block 11 is the last"):
        make_plan(Config(plan=plan_config(train_blocks=[3], drop_blocks=[3, 11])), DEPTH)
    assert (
        make_plan(Config(plan=plan_config(train_blocks=[3], drop_blocks=[3, 11], keep_rate=1.0)), DEPTH)[11].keep_rate
        == 1
    )


def test_experts_in_a_frozen_block_are_refused():
    with pytest.raises(ConfigError, match=r"plan\.moe_blocks = \[3, 4\].*\[4\].*frozen"):
        plan_config(train_blocks=[3], moe_blocks=[3, 4])
    with pytest.raises(ConfigError, match="frozen"):
        plan_config(train_blocks=[], moe_blocks=[0])
    with pytest.raises(ConfigError, match="frozen"):
        plan_config(train_blocks=[10, 11], moe_blocks=[1])


# --- which parameters train ---


@pytest.mark.parametrize("indices", [[1], [2], [0], [10], [11], [1, 10], [11, 3, 7]])
def test_a_list_trains_exactly_those_blocks_and_the_final_norm(indices):
    vit = make_vit(init_values=0.1, qk_norm=True)
    freeze(vit, plan_config(train_blocks=indices))
    assert trained(vit) == of_blocks(vit, *indices) | {"norm.weight", "norm.bias"}


def test_the_final_norm_of_an_average_pooled_backbone_is_its_fc_norm():
    vit = make_vit(class_token=False, global_pool="avg")
    freeze(vit, plan_config(train_blocks=[1]))
    assert trained(vit) == of_blocks(vit, 1) | {"fc_norm.weight", "fc_norm.bias"}


def test_all_trains_everything_and_an_empty_list_nothing():
    vit = make_vit(reg_tokens=2)
    everything = {name for name, _ in vit.named_parameters()}
    freeze(vit, plan_config(train_blocks=[]))
    assert trained(vit) == set()
    freeze(vit, plan_config(train_blocks="all"))
    assert trained(vit) == everything


def test_freezing_again_replaces_the_previous_plan():
    vit = make_vit()
    freeze(vit, plan_config(train_blocks=[4]))
    freeze(vit, plan_config(train_blocks=[5]))
    assert trained(vit) == of_blocks(vit, 5) | {"norm.weight", "norm.bias"}


# --- where the gradient path starts ---


@pytest.mark.parametrize(
    "trainable, start", [("all", 0), ([], DEPTH), ([11], 11), ([10, 11], 10), ([7, 3], 3), ([0], 0)]
)
def test_gradient_path_starts_at_the_first_block_that_trains(trainable, start):
    vit = make_vit()
    freeze(vit, plan_config(train_blocks=trainable))
    assert gradient_path(stages(vit)) == (trainable == "all", start)


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight", "norm_pre.weight"])
def test_a_trainable_embedding_alone_puts_every_block_on_the_path(name):
    vit = make_vit(reg_tokens=1, pre_norm=True)
    freeze(vit, plan_config(train_blocks=[7]))
    vit.get_parameter(name).requires_grad_(True)
    assert gradient_path(stages(vit)) == (True, 0)


def test_any_trained_parameter_puts_its_block_on_the_path():
    vit = make_vit()
    freeze(vit, plan_config(train_blocks=[7]))
    vit.blocks[2].attn.adapter = torch.nn.Linear(8, 8)
    assert gradient_path(stages(vit)) == (False, 2)


def test_the_final_norm_alone_needs_no_block():
    vit = make_vit()
    freeze(vit, plan_config(train_blocks=[]))
    vit.norm.requires_grad_(True)
    assert gradient_path(stages(vit)) == (False, DEPTH)


# --- token counts of each block ---


def test_token_counts_of_the_paper():
    counts = token_counts(make_plan(Config(), DEPTH), 197, 1, fuse=True, protect=False)
    assert counts == (
        [(197, 197)] * 3 + [(197, 100)] + [(100, 100)] * 2 + [(100, 52)] + [(52, 52)] * 2 + [(52, 28)] + [(28, 28)] * 2
    )


@pytest.mark.parametrize(
    "fuse, protect, after", [(True, False, [100, 52, 28]), (False, False, [99, 50, 26]), (True, True, [100, 51, 27])]
)
def test_token_counts_after_each_drop(fuse, protect, after):
    counts = token_counts(make_plan(Config(), DEPTH), 197, 1, fuse, protect)
    assert [ffn for attention, ffn in counts if ffn < attention] == after


@pytest.mark.parametrize("options", [{}, {"fuse": "none"}, {"protect_fused": True}], ids=["fuse", "none", "protect"])
@pytest.mark.parametrize("tokens, prefix", [(197, 1), (65, 1), (50, 5), (16, 0), (4, 1), (2, 1)])
@pytest.mark.parametrize("keep", [[0.5, 0.5, 0.5], [0.9, 1.0, 0.3], [0.01, 0.01, 0.99]])
def test_token_counts_equal_those_of_dropping(tokens, prefix, keep, options):
    config = TokensConfig(**options)
    plan = make_plan(Config(plan=plan_config(train_blocks=[1], drop_blocks=[1, 2, 4], keep_rate=keep)), 6)
    stream = Tokens(torch.randn(1, tokens, 2), torch.arange(tokens - prefix).view(1, -1))
    expected = []
    for block in plan:
        entering = stream.x.shape[1]
        if block.keep_rate < 1:
            scores = torch.rand(1, entering)
            stream, _ = drop(
                stream, scores, scores, keep_rate=block.keep_rate, prefix=prefix, config=config, replay=Replay()
            )
        expected.append((entering, stream.x.shape[1]))
    assert token_counts(plan, tokens, prefix, config.fuse != "none", config.protect_fused) == expected


def test_with_the_fused_token_a_drop_may_not_shorten_the_sequence():
    plan = make_plan(Config(plan=plan_config(train_blocks=[0], drop_blocks=[0], keep_rate=0.9)), 2)
    assert token_counts(plan, 1 + 10, 1, fuse=True, protect=False)[0] == (11, 1 + math.ceil(9) + 1)


# --- which weights of a block train ---


@pytest.mark.parametrize("which", ["proj", "bias", "norm"])
@pytest.mark.parametrize("indices", [[1, 10], "all"])
def test_only_the_chosen_weights_of_a_block_train(which, indices):
    vit = make_vit(init_values=0.1, qk_norm=True, reg_tokens=2, pre_norm=True)
    freeze(vit, plan_config(train_blocks=indices, train_weights=which))
    names = {
        "proj": ["attn.proj.weight", "attn.proj.bias"],
        "bias": [f"{name}.bias" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")]
        + ["attn.q_norm.bias", "attn.k_norm.bias"],
        "norm": [
            f"{name}.{p}" for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm") for p in ("weight", "bias")
        ],
    }[which]
    blocks = range(DEPTH) if indices == "all" else indices
    final = {"norm.bias"} if which == "bias" else {"norm.weight", "norm.bias"}
    assert trained(vit) == {f"blocks.{i}.{name}" for i in blocks for name in names} | final
    assert gradient_path(stages(vit)) == (False, blocks[0])


def test_chosen_weights_of_no_block_train_nothing():
    vit = make_vit()
    freeze(vit, plan_config(train_blocks=[], train_weights="norm"))
    assert trained(vit) == set()


def test_experts_with_chosen_weights_are_refused():
    with pytest.raises(ConfigError, match=r"plan\.train_weights = 'norm': all with plan\.moe_blocks = \[1\]"):
        plan_config(train_blocks=[1], moe_blocks=[1], train_weights="norm")
