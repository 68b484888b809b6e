"""The predicted cost, a sum over sections, equals the cost of the step traced in one piece, to the byte."""

import pytest
import torch
from tiny_models import CLASSES, KINDS, make_vit
from whole_step import trace_whole

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import trace
from moe_bsr.config import Config
from moe_bsr.cost import step as sections_of_a_step
from moe_bsr.cost.expert_rows import unequal_rows
from moe_bsr.cost.predict import evaluation_peak, predict
from moe_bsr.evaluation.evaluate import BATCH
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES

PLANS = {
    "full": {"train_blocks": "all"},
    "last": {"train_blocks": []},
    "bsr": {"train_blocks": [1, 3], "drop_blocks": [0, 1, 2]},
    "mixed": {"train_blocks": [0, 2, 3], "drop_blocks": [1, 2], "moe_blocks": [3]},
    "moe-bsr": {"train_blocks": [1, 3], "drop_blocks": [1, 2], "moe_blocks": [1, 3]},
}


def make_config(plan: str, **changes) -> Config:
    keys = {"train_blocks": [], "drop_blocks": [], "moe_blocks": []} | PLANS[plan]
    settings = {"moe__num_experts": 4, "moe__top_k": 2, "runtime__device": "cpu"}
    settings |= {f"plan__{key}": value for key, value in keys.items()}
    return configuration.replace(Config(), runtime__threads=torch.get_num_threads(), **settings | changes)


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


# Kinds of backbones, combined where possible.
COMBINED = [
    ["class-token"],
    ["class-token-average-pool"],
    ["registers-without-class-token"],
    ["attention-pool"],
    ["registers", "layer-scale", "pre-norm", "no-bias"],
    ["average-pool", "qk-norm", "scaled-attention-norm", "dynamic-size"],
]


@pytest.mark.parametrize(
    ("plan", "precision", "storage", "kinds"),
    [
        *(("mixed", "fp32", storage, COMBINED[i % len(COMBINED)]) for i, storage in enumerate(STORAGES)),
        ("full", "fp32", "segments", COMBINED[4]),
        ("full", "bf16", "exact", COMBINED[0]),
        ("bsr", "fp32", "exact", COMBINED[5]),
        ("last", "fp32", "exact", COMBINED[0]),  # saves no activations with any storage
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_sections_add_up_to_the_step(plan, precision, storage, kinds, monkeypatch):
    """Cover every storage, and every kind of backbone with one or two storages."""
    monkeypatch.setitem(KINDS, "these", {key: value for kind in kinds for key, value in KINDS[kind].items()})
    assert_equal(*both(make_config(plan, storage=storage, moe__num_experts=3), "these", precision))


def test_every_kind_of_backbone_is_covered():
    assert {kind for kinds in COMBINED for kind in kinds} == KINDS.keys() and len(COMBINED) <= len(list(STORAGES))


IN_BACKWARD = {"train__step_in_backward": True, "train__grad_clip_norm": None}


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        (
            "fp32",
            {
                "adapter": {"kind": "lora", "rank": 2},
                "train__optimizer": "adamw8",
                "train__ema_decay": 0.9,
                "moe__router": "task_conditioned",
                "tokens__protect_fused": True,
                "tokens__fuse": "normalized",
            },
        ),
        (
            "fp32",
            {
                "adapter": [{"kind": "lora", "layers": ["attn.proj", "mlp.fc2"], "freeze_a": True, "blocks": [0, 2]}],
                "train__optimizer": "sgd",
                "train__ema_decay": 0.9,
                "tokens__fuse": "none",
            },
        ),
        ("bf16", {"adapter": {"kind": "adaptformer", "width": 4}, "moe__balance_loss": "none", "storage": "int8"}),
        ("fp32", {"adapter": "repnet", "storage": "recompute", "moe__gate_noise": 1.0}),
        ("fp32", {"adapter": [{"kind": "factored", "rank": 0.5, "blocks": [0, 2]}], "storage": "segments"}),
        ("bf16", {"adapter": {"kind": "repnet", "published": True}, "tokens__reduce": "merge"}),
        ("fp32", IN_BACKWARD | {"train__optimizer": "sgd", "storage": "recompute"}),
        ("fp32", IN_BACKWARD | {"train__optimizer": "adamw8", "storage": "int8"}),
        *(("fp32", {"train__step_in_backward": True, "train__grad_clip_per": per}) for per in ("block", "parameter")),
        ("bf16", {"tokens__reduce": "merge", "storage": "recompute"}),
        ("fp32", {"tokens__reduce": "merge", "plan__head_blocks": [1]}),
        ("bf16", {"plan__head_blocks": [0, 1, 2, 3]}),
        ("fp32", {"plan__head_blocks": [0, 2], "plan__train_blocks": [2, 3], "plan__moe_blocks": [3]}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_sections_add_up_for_other_settings(precision, changes):
    assert_equal(*both(make_config("moe-bsr", **changes, moe__num_experts=3), precision=precision))


def kept(adapter, weights: str | None = None) -> int:
    """Return the bytes that blocks 1 and 2 keep if adapters or some of their weights train. Block 1 drops tokens."""
    only = {"train_blocks": [] if weights is None else [0, 1, 2, 3], "drop_blocks": [1], "moe_blocks": []}
    changes = {f"plan__{key}": value for key, value in only.items()} | {"plan__train_weights": weights or "all"}
    config = configuration.replace(Config(), runtime__device="cpu", adapter=adapter, **changes)
    cost = predict(MultitaskViT(make_vit(), config, CLASSES), config, batch=5, precision="fp32", task="two")
    return sum(sum(makers.values()) for name, makers in cost.kept_by_block.items() if name in ("block 1", "block 2"))


def test_adapters_and_selected_weights_keep_little_beyond_the_gradient_path():
    """They keep tokens x rank values in addition to what blocks on the gradient path keep anyway."""
    n, m, rank = 17 + 10, 10 + 10, 3

    def lora(*layers: str, freeze_a: bool = False) -> int:
        options = {"kind": "lora", "rank": rank, "layers": list(layers), "freeze_a": freeze_a}
        return kept([options | {"blocks": [0, 1, 2, 3]}])

    path = kept(None, "norm")
    values = {
        "bias": kept(None, "bias"),
        "proj": kept(None, "proj"),
        "projections": lora("attn.proj", "mlp.fc2"),
        "queries": lora("attn.qkv"),
        "queries, random": lora("attn.qkv", freeze_a=True),
        "beside": kept([{"kind": "adaptformer", "width": rank, "blocks": [0, 1, 2, 3]}]),
    }
    assert {name: (value - path) / 20 for name, value in values.items()} == {
        "bias": 0,
        "proj": 0,
        "projections": rank * (n + m),
        "queries": n * rank,
        "queries, random": n * rank,
        "beside": m * rank,
    }


def test_a_repnet_block_keeps_nine_values_of_its_width_per_token():
    """A Rep-Net block keeps ten values like any trained block, plus norm statistics and log-sums, and shares its input
    with the block beside it. The block beside the first Rep-Net block is off the gradient path. Only its input and
    output are kept, which count among the ten values and for the next block."""
    width, heads, tokens = 16, 2, 5 * 10
    alone, second = ([{"kind": "repnet", "blocks": blocks}] for blocks in ([2], [1, 2]))
    assert kept(alone) == 4 * tokens * (11 * width + heads + 4)
    assert kept(second) - kept([{"kind": "repnet", "blocks": [1]}]) == 4 * tokens * (9 * width + heads + 4)


@pytest.mark.parametrize(
    ("changes", "kind", "precision"),
    [
        ({"plan__drop_blocks": [0, 2], "tokens__protect_fused": True}, "class-token", "fp32"),
        ({"plan__drop_blocks": [1], "storage": "int8"}, "average-pool", "fp32"),
        ({"plan__drop_blocks": [0, 2], "storage": "recompute"}, "class-token", "bf16"),
    ],
)
def test_a_side_network_is_predicted_to_the_byte(changes, kind, precision):
    """Its whole cost counts for the head, where it runs. The one-piece trace counts its inputs for their blocks."""
    adapter = [{"kind": "ladder", "reduction": 2, "blocks": [1, 2, 3]}]
    config = configuration.replace(make_config("last"), adapter=adapter, **changes)
    cost, whole = both(config, kind, precision)
    whole.kept_by_block = {k: v for k, v in cost.kept_by_block.items() if v}
    assert whole.kept_by_block.keys() == {"head"}
    assert_equal(cost, whole)


def test_a_side_block_keeps_twelve_values_of_its_width_per_token():
    """It keeps ten values like any trained block, its gate's two inputs, norm statistics, log-sums and mu."""
    config, kept = make_config("last"), []
    for blocks in ([1, 3], [1, 2, 3]):
        changed = configuration.replace(config, adapter=[{"kind": "ladder", "reduction": 2, "blocks": blocks}])
        model = MultitaskViT(make_vit("average-pool"), changed, CLASSES)
        kept.append(predict(model, changed, batch=5, precision="fp32", task="two").kept)
    width, heads, tokens = 8, 1, 5 * 16
    assert kept[1] - kept[0] == 4 * tokens * (12 * width + heads + 4) + 4


def test_a_prediction_leaves_the_model_as_it_was():
    config = make_config("moe-bsr", storage="int8")
    model = MultitaskViT(make_vit(), config, CLASSES).eval()
    model.heads["one"].weight.grad = torch.ones_like(model.heads["one"].weight)
    before = {name: (p, p.data_ptr(), p.dtype, p.grad) for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    predict(model, config, batch=3, precision="bf16", all_tasks=True)
    after = {name: (p, p.data_ptr(), p.dtype, p.grad) for name, p in model.named_parameters()}
    assert all(all(a is b or a == b for a, b in zip(before[n], after[n], strict=True)) for n in before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(m.training for m in model.modules())
    assert torch.equal(random, torch.random.get_rng_state())


def test_predictions_do_not_depend_on_earlier_ones():
    """Equal sections are traced once. Their cache keys contain everything that makes sections differ."""
    cases = [
        ("bsr", "exact", "adamw", "fp32"),
        ("moe-bsr", "exact", "adamw", "fp32"),
        ("moe-bsr", "recompute", "sgd", "fp32"),
        ("moe-bsr", "recompute", "sgd", "bf16"),
    ]

    def cost(plan, storage, optimizer, precision):
        config = make_config(plan, storage=storage, train__optimizer=optimizer)
        model = MultitaskViT(make_vit(), config, CLASSES)
        return predict(model, config, batch=4, precision=precision, all_tasks=True)

    shared = [cost(*case) for case in cases]
    for case, expected in zip(cases, shared, strict=True):
        sections_of_a_step._sections.clear()
        assert cost(*case) == expected


def test_equal_blocks_are_traced_once():
    """All blocks are equal except the last one, which computes only the class token."""
    config = make_config("full")
    sections_of_a_step._sections.clear()
    predict(MultitaskViT(make_vit(), config, CLASSES), config, batch=2, precision="fp32")
    assert sorted(key[0] for key in sections_of_a_step._sections) == ["block", "block", "embedding", "head", "update"]


def test_every_task_and_micro_batch_of_an_update_counts():
    """Joint sampling needs gradients and states of all heads. Each micro-batch adds the memory of its output."""
    model = MultitaskViT(make_vit(), make_config("moe-bsr"), CLASSES)
    heads = [4 * sum(p.numel() for p in head.parameters()) for head in model.heads.values()]
    routers = 4 * 2 * 4 * 16  # per task: two layers, four experts, width 16

    def cost(**changes):
        return predict(model, make_config("moe-bsr", **changes), batch=4, precision="fp32", all_tasks=True)

    one, joint, twice = cost(), cost(sampler__kind="joint"), cost(train__grad_accumulation_steps=2)
    assert joint.gradients - one.gradients == sum(heads) - max(heads) + 2 * routers
    assert joint.optimizer == one.optimizer
    assert one.gradients == twice.gradients and one.kept == twice.kept
    assert joint.peak > one.peak < twice.peak


@pytest.mark.parametrize(("assignments", "experts", "multiple"), [(800, 16, 1), (896, 16, 16), (7, 4, 16), (9, 1, 64)])
@pytest.mark.parametrize("share", [1.0, 1.7])
def test_rows_of_experts_hold_all_assignments(assignments, experts, multiple, share):
    rows = unequal_rows(share)(assignments, experts, multiple)
    assert len(rows) == experts and all(n % multiple == 0 for n in rows)
    assert assignments <= sum(rows) < assignments + multiple * experts
    assert (sum(rows) == assignments) or multiple > 1
    if multiple == 1:
        assert max(rows) == rows[0] == round(share * assignments / experts)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 0.01),
        ({"plan__moe_blocks": [1, 3]}, 0.1),  # the largest expert's share of the tokens is an estimate
        ({"plan__moe_blocks": [1, 3], "moe__experts": "low_rank", "moe__rank": 8}, 0.03),
        ({"adapter": "repnet"}, 0.01),
        ({"adapter": {"kind": "ladder", "reduction": 4}, "plan__train_blocks": []}, 0.01),
    ],
    ids=["dense", "experts", "low-rank experts", "repnet", "ladder"],
)
def test_the_peak_of_an_evaluation_is_that_of_a_forward_pass_that_saves_nothing(changes, tolerance):
    config = make_config("bsr", plan__drop_blocks=[], **{"moe__mlp_ratio": 4, **changes})
    model = MultitaskViT(make_vit("class-token"), config, CLASSES)
    before = predict(model, config, batch=5, precision="fp32")
    found = evaluation_peak(model, config, "fp32")
    images = torch.randn(BATCH, 3, 16, 16)
    model.eval()
    with torch.inference_mode():
        model(images, "two")  # the first pass also loads kernels
        measured = trace({"forward": lambda: model(images, "two")}, images.device).peak()
    assert measured == pytest.approx(found, rel=tolerance)
    assert predict(model.train(), config, batch=5, precision="fp32") == before
