"""The benchmark: counted matrix products, the explicit baseline, and the judgment of targets."""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CLASSES, make_vit, normal
from torch import nn

from moe_bsr.benchmark import scaling, tables, targets
from moe_bsr.benchmark.cases import Case, LayerStep, make, suite
from moe_bsr.benchmark.matmuls import SHAPES, Product, step_products, time_products
from moe_bsr.benchmark.public_form import ExplicitBSR
from moe_bsr.benchmark.workers import workers
from moe_bsr.config import Config, PlanConfig, RuntimeConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import prepare

PLAN = PlanConfig(train_blocks=[1, 3], drop_blocks=[1, 2], moe_blocks=[])
SMALL = {"backbone": "deit_tiny_patch16_224", "image_size": 64, "batch": 2, "threads": 1}


def layer_step(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> LayerStep:
    runtime = prepare(RuntimeConfig(device="cpu", precision="fp32", threads=1))
    return LayerStep(layer, runtime, x, gradient, lambda: layer(x))


def test_the_explicit_form_has_the_values_and_gradients_of_bsr():
    plain = ExplicitBSR(make_vit(num_classes=3), PLAN)
    ours = MultitaskViT(make_vit(), Config(plan=PLAN), CLASSES)
    ours.vit.load_state_dict({n: v for n, v in plain.vit.state_dict().items() if not n.startswith("head.")})
    ours.heads["one"].load_state_dict(plain.vit.head.state_dict())
    images = normal(3, 3, 16, 16)
    theirs, mine = plain(images), ours(images, "one").logits
    torch.testing.assert_close(theirs, mine)
    theirs.square().sum().backward()
    mine.square().sum().backward()
    gradients = {n.removeprefix("vit."): p.grad for n, p in plain.named_parameters() if p.grad is not None}
    expected = {n.removeprefix("vit."): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {n.replace("heads.one", "head"): g for n, g in expected.items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_the_three_products_of_a_linear_layer_are_counted():
    x = normal(6, 5).requires_grad_()
    counted = step_products(layer_step(nn.Linear(5, 7), x, normal(6, 7)))
    assert counted == {
        Product(1, 6, 5, 7, "float32"): 1,  # the output
        Product(1, 6, 7, 5, "float32"): 1,  # the input's gradient
        Product(1, 7, 6, 5, "float32"): 1,
    }  # the weight's gradient
    assert sum(p.flops * n for p, n in counted.items()) == 3 * 2 * 6 * 5 * 7


def test_fused_attention_counts_the_products_it_replaces():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = normal(2, 3, 11, 8).requires_grad_()
    counted = step_products(layer_step(Attention(), x, normal(2, 3, 11, 8)))
    assert counted == {Product(6, 11, 8, 11, "float32"): 4, Product(6, 11, 11, 8, "float32"): 3}


def test_fused_attention_is_counted_on_every_device():
    """In every kernel of torch the queries are the first argument of the forward and the second of the backward."""
    names = [name.removeprefix("aten::") for name in SHAPES if "attention" in name]
    assert len(names) == 8
    for name in names:
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        backward = name.endswith("_backward")
        assert arguments[backward].name == "query", name
        assert len(SHAPES[f"aten::{name}"]([(2, 3, 11, 8)] * 3)) == (5 if backward else 2)


def test_products_are_timed():
    product = Product(2, 8, 8, 8, "bfloat16")
    times = time_products({product: 3}, torch.device("cpu"), budget=0.001)
    assert 0 < times[product] < 0.1


@pytest.mark.parametrize("subject", ["timm", "explicit", "full", "moe_bsr", "moe_ffn", "dense_ffn"])
def test_every_subject_takes_a_step_and_clears_its_gradients(subject):
    step = make(Case(subject=subject, **SMALL))
    before = [p.detach().clone() for p in step.model.parameters()]
    step.run()
    changed = [not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)]
    assert step.trained and any(changed) != subject.endswith("ffn")
    assert all(p.grad is None for p in step.model.parameters())


def test_the_dense_layer_has_the_flops_of_the_experts():
    flops = {}
    for subject in ("moe_ffn", "dense_ffn"):
        counted = step_products(make(Case(subject=subject, **SMALL)))
        flops[subject] = sum(p.flops * n for p, n in counted.items())
    router = 3 * 2 * (2 * 197) * 192 * 16
    assert 0 <= flops["moe_ffn"] - flops["dense_ffn"] - router < 0.02 * flops["dense_ffn"]


def test_only_timm_and_the_explicit_form_have_untuned_cases():
    cases = {c.name: c for group in suite(**SMALL).values() for c in group}
    stock, tuned = cases["timm fp32 stock"], cases["timm fp32 tuned"]
    assert (stock.tuned, tuned.tuned) == (False, True)
    assert not any(not c.tuned for c in cases.values() if c.subject not in ("timm", "explicit"))


def made_up(**seconds: float) -> targets.Results:
    names = {"stock": "timm fp32 stock", "fast": "bsr bf16", "lean": "bsr bf16 recompute"}
    kept = {"stock": 5000, "fast": 500, "lean": 40}
    memory = {
        name: {
            "kept_per_image": kept[name],
            "weights": 100,
            "inference_peak": 20,
            "transients": {"forward": kept[name] / 10, "backward": 0},
        }
        for name in names
    }
    return {
        "fp32": {
            names[key]: {"seconds": [[s, s], [s, s]], "memory": memory[key], "products": {"seconds": 0.1, "flops": 1e9}}
            for key, s in seconds.items()
        }
    }


def rows(results: targets.Results) -> dict[str, dict]:
    return {row["what"].split(",")[0].split(":")[0]: row for row in targets.judge(targets.TARGETS, results)}


def test_targets_are_judged_and_rows_of_absent_cases_are_left_out():
    judged = rows(made_up(stock=3.0, fast=0.19, lean=0.24))
    row = judged["BSR step bf16 against stock timm full fine-tuning fp32"]
    assert row["value"] == pytest.approx(3 / 0.19) and row["reached"]
    assert not rows(made_up(stock=2.8, fast=0.19, lean=0.24))[row["what"]]["reached"]
    assert judged["peak of a BSR training step against a no_grad forward"]["value"] == (100 + 4) / (100 + 20)
    assert not any("MoE" in row for row in judged)


def test_the_leanest_storage_counts_only_if_it_is_fast_enough():
    fast_enough = rows(made_up(stock=3.0, fast=0.19, lean=0.24))["activation bytes kept per image"]
    assert fast_enough["value"] == 125 and fast_enough["reached"]
    too_slow = rows(made_up(stock=3.0, fast=0.19, lean=0.26))["activation bytes kept per image"]
    assert too_slow["value"] == 10 and not too_slow["reached"]
    none_is = rows(made_up(stock=3.0, fast=0.28, lean=0.3))["activation bytes kept per image"]
    assert none_is["value"] == 125 and not none_is["reached"]


class InThread(threading.Thread):
    """Replaces a worker's process, which takes seconds to start. `cli/test_benchmark.py` starts a real one."""

    def __init__(self, target, args, daemon) -> None:
        pipe, *rest = args
        own = Connection(os.dup(pipe.fileno()))  # a process has its own copy, which stays open
        super().__init__(target=target, args=(own, *rest), daemon=daemon)


@pytest.fixture
def workers_are_threads(monkeypatch):
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=InThread)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def test_an_invalid_case_is_named_in_the_error(workers_are_threads):
    with pytest.raises(RuntimeError, match="^bsr fp32: ConfigError: plan.train_blocks"):
        with workers([Case(subject="bsr", **SMALL | {"backbone": "test_vit"})]):
            pass


def test_scaling_records_all_times_and_memory_grows_with_the_batch_but_not_with_tasks(
    workers_are_threads, monkeypatch, tmp_path
):
    monkeypatch.setattr(scaling, "SWEEPS", {name: ([2, 4], scaling.SWEEPS[name][1]) for name in ("batch", "tasks")})
    changes = {"plan__train_blocks": [3, 5], "plan__drop_blocks": [3], "plan__moe_blocks": [5]}
    changes |= {"moe__num_experts": 4, "moe__top_k": 2, "moe__mlp_ratio": 3}
    shared = {"backbone": "test_vit", "image_size": 64, "batch": 2, "threads": 1, "changes": changes}
    result = scaling.measure(shared, "fp32", rounds=2, steps=1, note=lambda line: None)
    small, large = result["scaling"]["batch"]
    assert [small["at"], large["at"]] == [2, 4]
    assert len(small["seconds"]) == len(large["seconds"]) == 2
    assert 1.8 * small["kept"] < large["kept"] < 2.2 * small["kept"]
    two, four = result["scaling"]["tasks"]
    assert two["kept"] == four["kept"]
    scaling.draw(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    titles, first, _ = tables.of_scaling(result["scaling"]["batch"], "batch")
    assert titles[0] == "batch" and first[0] == "2" and float(first[2]) <= float(first[1]) <= float(first[3])
