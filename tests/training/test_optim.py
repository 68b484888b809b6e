"""Parameter groups, the learning-rate schedule, the moving average and clipping, each against its definition."""

import math

import pytest
import tiny_models
import torch
from timm.models.vision_transformer import VisionTransformer

from moe_bsr.config import Config, MoEConfig, PlanConfig, TrainConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.training.optim import (
    MovingAverage,
    clip_gradients,
    learning_rate,
    make_optimizer,
    parameter_groups,
)

DEPTH = 12


def make_model(trainable="all", experts=(3, 7, 11), router="per_task") -> MultitaskViT:
    vit = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=8,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
        reg_tokens=1,
        init_values=0.1,
        pre_norm=True,
    )
    config = Config(
        plan=PlanConfig(train_blocks=trainable, drop_blocks=[], moe_blocks=list(experts)),
        moe=MoEConfig(num_experts=4, top_k=2, router=router),
    )
    return MultitaskViT(vit, config, {"one": 3, "two": 2})


def by_name(model: MultitaskViT, key: str, **settings) -> dict[str, float]:
    groups = parameter_groups(model, TrainConfig(**settings))
    return {name: group[key] for group in groups for name in group["names"]}


# --- groups ---


@pytest.mark.parametrize(
    "name, scale",
    [
        ("vit.patch_embed.proj.weight", 0.75**13),
        ("vit.pos_embed", 0.75**13),
        ("vit.cls_token", 0.75**13),
        ("vit.reg_token", 0.75**13),
        ("vit.norm_pre.weight", 0.75**13),
        ("vit.blocks.0.attn.qkv.weight", 0.75**12),
        ("vit.blocks.3.attn.qkv.weight", 0.0751),
        ("vit.blocks.3.mlp.experts.fc1_weight", 0.0751),
        ("vit.blocks.7.mlp.experts.fc2_bias", 0.2373),
        ("vit.blocks.7.norm2.bias", 0.2373),
        ("vit.blocks.10.ls1.gamma", 0.75**2),
        ("vit.blocks.11.norm1.weight", 0.75),
        ("vit.blocks.11.mlp.experts.fc1_weight", 0.75),
        ("vit.blocks.3.mlp.router.weight.one", 1),
        ("vit.norm.weight", 1),
        ("heads.one.weight", 1),
        ("heads.two.bias", 1),
    ],
)
def test_layer_decay_scales_rates_by_the_distance_from_the_top(name, scale):
    assert by_name(make_model(), "lr_scale", layer_decay=0.75)[name] == pytest.approx(scale, abs=5e-5)


def test_routers_of_both_kinds_learn_at_full_rate():
    scales = by_name(make_model(router="task_conditioned"), "lr_scale", layer_decay=0.5)
    assert {scale for name, scale in scales.items() if ".router." in name} == {1.0}


def test_layer_decay_counts_embeddings_as_the_lowest_layer():
    scales = by_name(make_model(), "lr_scale", layer_decay=0.5)
    blocks = [scales[f"vit.blocks.{i}.attn.proj.weight"] for i in range(DEPTH)]
    assert blocks == [0.5 ** (DEPTH - i) for i in range(DEPTH)]
    assert scales["vit.pos_embed"] == 0.5 ** (DEPTH + 1) and scales["heads.one.weight"] == 1


def test_depth_and_role_do_not_depend_on_names():
    """Names do not matter: this "router" is no router, and this "heads_bias" is neither a head nor a bias."""
    model = make_model()
    model.vit.blocks[2].add_module("router", torch.nn.Linear(8, 8))
    model.vit.blocks[2].add_module("heads_bias", torch.nn.Linear(8, 8))
    settings = {"layer_decay": 0.5, "head_lr_scale": 10.0, "weight_decay": 0.3}
    scales, decays = (by_name(model, key, **settings) for key in ("lr_scale", "weight_decay"))
    for name in ("vit.blocks.2.router.weight", "vit.blocks.2.heads_bias.weight"):
        assert scales[name] == scales["vit.blocks.2.attn.proj.weight"] and decays[name] == 0.3


def test_without_layer_decay_all_rates_are_equal():
    assert set(by_name(make_model(), "lr_scale").values()) == {1.0}


@pytest.mark.parametrize("router", ["per_task", "task_conditioned"])
def test_weight_decay_applies_only_to_weight_matrices(router):
    model = make_model(router=router)
    decay = by_name(model, "weight_decay", weight_decay=0.3)
    matrices = (
        "qkv.weight",
        "proj.weight",
        "fc1.weight",
        "fc2.weight",
        "fc1_weight",
        "fc2_weight",
        "heads.one.weight",
        "heads.two.weight",
        "router.weight",
        "router.weight.one",
        "router.weight.two",
        "router.embed.0.weight",
        "router.embed.2.weight",
    )
    assert {name for name, value in decay.items() if value} == {n for n in decay if n.endswith(matrices)}
    assert set(decay.values()) == {0.0, 0.3}
    stacked = model.vit.blocks[3].mlp.experts.fc1_bias
    assert stacked.ndim == 2 and decay["vit.blocks.3.mlp.experts.fc1_bias"] == 0


def test_weight_decay_does_not_depend_on_the_names_of_tasks():
    model = tiny_models.make_model(classes={"mybias": 3, "two": 4}, moe_blocks=(3,))
    decay = by_name(model, "weight_decay", weight_decay=0.3)
    assert decay["vit.blocks.3.mlp.router.weight.mybias"] == decay["vit.blocks.3.mlp.router.weight.two"] == 0.3


@pytest.mark.parametrize("trainable, experts", [([3, 7, 11], [3, 7, 11]), ([], []), ("all", [])])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_trained_parameter_and_no_frozen_one_is_in_exactly_one_group(trainable, experts, kind):
    model = make_model(trainable, experts)
    optimizer = make_optimizer(model, TrainConfig(optimizer=kind, layer_decay=0.9))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert [id(dict(model.named_parameters())[name]) for name in names] == listed


def test_the_optimizer_follows_the_configuration():
    model = make_model([3], [3])
    sgd = make_optimizer(model, TrainConfig(optimizer="sgd", momentum=0.7, lr=0.2, layer_decay=0.5))
    assert type(sgd) is torch.optim.SGD
    assert {group["momentum"] for group in sgd.param_groups} == {0.7}
    assert all(group["lr"] == 0.2 * group["lr_scale"] for group in sgd.param_groups)
    assert type(make_optimizer(model, TrainConfig(optimizer="adamw"))) is torch.optim.AdamW


# --- schedule ---


def test_the_rate_warms_up_linearly_and_then_falls_as_a_cosine():
    config = TrainConfig(steps=100, lr=0.5, min_lr=0.1, warmup_fraction=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    cosine = [0.1 + 0.4 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert rates[10:] == pytest.approx(cosine)
    assert rates[9] == rates[10] == pytest.approx(0.5) and rates[55] == pytest.approx(0.3)
    assert 0.1 < rates[99] < 0.1002  # min_lr itself would be reached one update later


@pytest.mark.parametrize(
    "warmup, steps, rates",
    [
        (0, 2, [1, 0.5]),
        (0, 1, [1]),
        (1, 3, [1, 1, 0.5]),
        (2, 4, [0.5, 1, 1, 0.5]),
        (4, 4, [0.25, 0.5, 0.75, 1]),
        (4, 5, [0.25, 0.5, 0.75, 1, 1]),
        (0.5, 4, [0.5, 1, 1, 0.5]),
        (0.05, 4, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_warmup_is_a_fraction_of_the_steps_or_a_number_of_updates(warmup, steps, rates):
    given = {"warmup_steps": warmup} if isinstance(warmup, int) else {"warmup_fraction": warmup}
    config = TrainConfig(steps=steps, lr=1.0, **given)
    assert [learning_rate(config, step) for step in range(steps)] == pytest.approx(rates)


# --- moving average ---


def perturb(model: MultitaskViT, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def values(model: MultitaskViT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_moving_average_follows_its_recursion_for_trained_parameters():
    model, generator = make_model([3, 11], [3]), torch.Generator().manual_seed(0)
    average = MovingAverage(model, 0.8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: value.double() for name, value in values(model).items() if name in trained}
    for step in range(40):  # from the 36th on, the decay is 0.8
        perturb(model, generator)
        average.update(model)
        decay, now = min(0.8, (1 + step) / (10 + step)), values(model)
        expected = {name: decay * old + (1 - decay) * now[name] for name, old in expected.items()}
    assert average.average.keys() == trained
    for name, value in expected.items():
        torch.testing.assert_close(average.average[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9998, 0.999999])
def test_after_sixty_updates_the_average_no_longer_depends_on_the_start(decay):
    model = torch.nn.Linear(3, 2)
    average = MovingAverage(model, decay)
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(60):
        average.update(model)
    torch.testing.assert_close(average.average["weight"], model.weight.detach(), rtol=0, atol=1e-6)


def test_swapping_twice_restores_weights_and_average_bitwise():
    model, generator = make_model([3, 11], [3]), torch.Generator().manual_seed(0)
    average = MovingAverage(model, 0.8)
    perturb(model, generator)
    average.update(model)
    live, held = values(model), {name: value.clone() for name, value in average.average.items()}
    average.swap(model)
    swapped = values(model)
    for name, value in live.items():
        assert torch.equal(swapped[name], held.get(name, value))
        assert name not in held or torch.equal(average.average[name], value)
    average.swap(model)
    assert all(torch.equal(value, live[name]) for name, value in values(model).items())
    assert all(torch.equal(value, held[name]) for name, value in average.average.items())


# --- clipping ---


@pytest.mark.parametrize("limit", [None, 0.5, 100.0])
def test_gradients_are_clipped_as_in_torch_or_not_touched(limit):
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)] for _ in range(2))
    for parameter in (*ours, *theirs):
        parameter.grad = torch.linspace(-1, 2, len(parameter))
    before = [p.grad._version for p in ours]
    norm = clip_gradients(ours, limit)
    assert norm == float(torch.nn.utils.clip_grad_norm_(theirs, math.inf if limit is None else limit))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert (before == [p.grad._version for p in ours]) == (limit != 0.5)


@pytest.mark.parametrize("limit", [None, math.inf, 2.5])
def test_each_gradient_is_clipped_by_its_own_norm(limit):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    gradients = [torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0])]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    assert clip_gradients(parameters, limit, id) == pytest.approx(29**0.5)
    torch.testing.assert_close(parameters[0].grad, gradients[0])
    torch.testing.assert_close(parameters[1].grad, gradients[1] * (0.5 if limit == 2.5 else 1))
