"""Compare traced FLOPs with the closed form, the closed form with fvcore and torch's counter (and what these two miss),
and the trace with all matrix products that the profiler records in a training step.
"""

from dataclasses import replace

import pytest
import torch
from closed_form import forward_flops, step_flops
from fvcore.nn import FlopCountAnalysis
from tiny_models import CLASSES, make_model, make_vit, normal
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moe_bsr import config as configuration
from moe_bsr.benchmark.matmuls import step_products
from moe_bsr.config import Config
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime import cpu_features as cpu
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import training_step

IMAGES, PATCHES, PREFIX, WIDTH, EXPERTS = 3, 16, 1, 16, 4
DEPTH, TOKENS = 4, PREFIX + PATCHES


def closed_form(model) -> float:
    """Return the FLOPs of the batch's forward pass."""
    return IMAGES * forward_flops(model, "one")


@pytest.fixture(autouse=True)
def by_mkl(monkeypatch):
    """Use MKL in float32, because torch's counter does not know oneDNN's products."""
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: False)


def torch_count(run) -> dict[str, int]:
    """Return the FLOPs by operator of torch's counter. Before 2.15 it did not know fused attention on CPUs."""
    known = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **options: (
            sdpa_flop_count(q, k, v)
        )
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def fvcore_count(module, images) -> tuple[float, dict[str, float]]:
    """Return the FLOPs in total and by operator. fvcore itself counts multiply-adds."""
    analysis = FlopCountAnalysis(module, images).unsupported_ops_warnings(False)
    return 2 * analysis.total(), {name: 2 * count for name, count in analysis.by_operator().items()}


@pytest.fixture
def undropped():
    """Return a dense model without dropping: timm's own network, which both counters can trace."""
    model = make_model(drop_blocks=(), classes={"one": 3}).eval()
    model.contexts[-1] = replace(model.contexts[-1], class_token_alone=False)
    return model


def test_fvcore_agrees_where_attention_is_written_out(undropped):
    vit = make_vit(num_classes=3).eval()
    for block in vit.blocks:
        block.attn.fused_attn = False
    total, by_operator = fvcore_count(vit, normal(IMAGES, 3, 16, 16))
    norms = by_operator["layer_norm"]  # they have no products, so the closed form leaves them out
    assert total - norms == pytest.approx(closed_form(undropped), rel=1e-6)


def test_fvcore_misses_fused_attention_and_nothing_else(undropped):
    total, by_operator = fvcore_count(make_vit(num_classes=3).eval(), normal(IMAGES, 3, 16, 16))
    attention = 2 * 2 * IMAGES * DEPTH * TOKENS**2 * WIDTH
    assert total - by_operator["layer_norm"] == pytest.approx(closed_form(undropped) - attention, rel=1e-6)


def test_torchs_counter_agrees_on_a_dense_model(undropped):
    counted = torch_count(lambda: undropped(normal(IMAGES, 3, 16, 16), "one"))
    assert sum(counted.values()) == pytest.approx(closed_form(undropped), rel=1e-6)
    fused = [flops for name, flops in counted.items() if "scaled_dot_product" in name]
    assert fused == [2 * 2 * IMAGES * DEPTH * TOKENS**2 * WIDTH]


def test_torchs_counter_agrees_on_dropping_but_for_two_small_sums():
    """The counter misses the class token's row of scores, which is not a matrix product. The closed form leaves out
    the fused token, a weighted sum of the dropped tokens.
    """
    model = make_model(drop_blocks=(1, 2)).eval()
    counted = torch_count(lambda: model(normal(IMAGES, 3, 16, 16), "one"))
    dropped = PATCHES // 2 + 4  # drops 8 of 16 patches, then 4 of 9 (with the fused token)
    scored = TOKENS + (PREFIX + PATCHES // 2 + 1)
    fused, class_rows = (2 * IMAGES * tokens * WIDTH for tokens in (dropped, scored))
    assert sum(counted.values()) - fused == pytest.approx(closed_form(model) - class_rows, rel=1e-6)


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_torchs_counter_agrees_on_the_expert_loop_and_misses_grouped_products(engine):
    model = make_model(drop_blocks=(), moe_blocks=(1, 3), backend=engine).eval()
    counted = torch_count(lambda: model(normal(IMAGES, 3, 16, 16), "one"))
    rows = IMAGES * TOKENS * 2  # two experts per token
    seen = sum(counted.values())
    if engine == "grouped":  # the weighted sum by the gates is also a product there, not in the closed form
        experts, combine = 2 * 2 * rows * 2 * WIDTH * 4 * WIDTH, 2 * 2 * rows * WIDTH
        seen += experts - combine
    assert seen == pytest.approx(closed_form(model), rel=1e-6)


@pytest.mark.parametrize(("kind", "drop"), [("average-pool", (1, 2)), ("attention-pool", ())])
def test_torchs_counter_agrees_without_a_class_token(kind, drop):
    """Such models score tokens by the whole attention map, or pool them by attention."""
    model = make_model(kind, drop_blocks=drop).eval()
    counted = torch_count(lambda: model(normal(IMAGES, 3, 16, 16), "one"))
    dropped = 8 + 4 if drop else 0  # drops 8 of 16 patches, then 4 of 9 (with the fused token)
    fused = 2 * IMAGES * dropped * WIDTH
    assert sum(counted.values()) - fused == pytest.approx(closed_form(model), abs=IMAGES)


PLANS = {
    "full": {"train_blocks": "all"},
    "last": {"train_blocks": []},
    "last-k": {"train_blocks": [2, 3]},
    "bsr": {"train_blocks": [1, 3], "drop_blocks": [1, 2]},
    "moe": {"train_blocks": "all", "moe_blocks": [1, 3]},
    "moe-bsr": {"train_blocks": [1, 3], "drop_blocks": [1, 2], "moe_blocks": [3]},
}


def planned(plan: str, precision: str, storage: str, kind: str = "class-token", **changes):
    """Return a model of one task and its configuration."""
    keys = {"train_blocks": [], "drop_blocks": [], "moe_blocks": []} | PLANS[plan]
    config = configuration.replace(
        Config(),
        storage=storage,
        moe__num_experts=EXPERTS,
        moe__top_k=2,
        runtime__device="cpu",
        runtime__precision=precision,
        runtime__threads=1,
        **{f"plan__{k}": v for k, v in keys.items()},
        **changes,
    )
    return MultitaskViT(make_vit(kind), config, {"one": CLASSES["one"]}), config


def traced(model, config) -> tuple[int, int]:
    """Return the traced FLOPs of the forward pass and of the whole step."""
    cost = predict(model, config, batch=IMAGES, precision=config.runtime.precision)
    return cost.forward_flops, cost.step_flops


def executed(model, config) -> int:
    """Return the FLOPs of all matrix products that the profiler records in a training step."""
    runtime = prepare(config.runtime)
    counted = step_products(training_step(runtime.place(model), config, runtime, batch=IMAGES))
    return sum(product.flops * n for product, n in counted.items())


@pytest.mark.parametrize("storage", ["exact", "int8", "recompute"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", ["full", "last", "last-k"])
def test_a_dense_step_is_traced_exactly_as_the_closed_form_says(plan, precision, storage):
    model, config = planned(plan, precision, storage)
    assert traced(model, config) == (closed_form(model), IMAGES * step_flops(model, "one"))


def test_dropping_is_traced_exactly_but_for_two_small_sums():
    """The class token's row is not a matrix product. The fused token is one, but the closed form leaves it out."""
    model, config = planned("bsr", "fp32", "exact")
    dropped = PATCHES // 2 + 4  # drops 8 of 16 patches, then 4 of 9 (with the fused token)
    scored = TOKENS + (PREFIX + PATCHES // 2 + 1)
    assert traced(model, config)[0] == closed_form(model) + 2 * IMAGES * WIDTH * (dropped - scored)


def test_experts_are_traced_exactly_forward():
    """In float32 expert rows are not padded, and each row passes through one expert."""
    model, config = planned("moe", "fp32", "exact")
    assert traced(model, config)[0] == closed_form(model)


@pytest.mark.parametrize("storage", ["exact", "recompute"])
@pytest.mark.parametrize("plan", ["full", "bsr", "moe", "moe-bsr"])
def test_every_executed_product_is_traced(plan, storage):
    """Except matrix-vector products in a gate's gradient, whose operator neither torch's counter nor ours knows."""
    model, config = planned(plan, "fp32", storage)
    assert traced(model, config)[1] == pytest.approx(executed(model, config), rel=1e-3)


@pytest.mark.parametrize("storage", ["exact", "recompute"])
@pytest.mark.parametrize("plan", ["bsr", "moe", "moe-bsr"])
def test_with_dropping_and_experts_only_weighted_sums_of_tokens_differ(plan, storage):
    """These are the class token's row, the fused token and the sum by the gates: below 1 % even at width 16."""
    model, config = planned(plan, "fp32", storage)
    assert IMAGES * step_flops(model, "one") == pytest.approx(traced(model, config)[1], rel=0.01)


@pytest.mark.parametrize("detach", [False, True])
def test_scores_by_the_whole_map_are_counted_with_their_gradient(detach):
    model, config = planned("bsr", "fp32", "exact", "average-pool", tokens__detach_fusion_weights=detach)
    assert IMAGES * step_flops(model, "one") == pytest.approx(traced(model, config)[1], rel=0.002)


def test_pooling_by_attention_is_counted():
    model, config = planned("full", "fp32", "exact", "attention-pool")
    assert traced(model, config)[0] == pytest.approx(closed_form(model), abs=IMAGES)


def test_a_frozen_router_has_no_flops_for_weight_gradients():
    (trained, config), (frozen, config_frozen) = (
        planned("moe", "fp32", "exact", moe__train_router=trains) for trains in (True, False)
    )
    closed = IMAGES * (step_flops(trained, "one") - step_flops(frozen, "one"))
    assert traced(trained, config)[1] - traced(frozen, config_frozen)[1] == closed > 0
