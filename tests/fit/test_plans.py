"""Plans for a memory limit: each fits as predicted, none is dominated, and its command line reproduces it."""

import contextlib
import itertools
import json
import random

import pytest
import torch
from tiny_runs import make_config

from moe_bsr import config as configuration
from moe_bsr.cli.main import main
from moe_bsr.config import replace
from moe_bsr.cost import update_section
from moe_bsr.cost.least import least_beside_gradients
from moe_bsr.cost.predict import evaluation_peak, predict
from moe_bsr.fit import plans, rates
from moe_bsr.fit.memory_limit import STORAGES
from moe_bsr.fit.plans import Catalog, Plan, candidates, front
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.model.summary import counts
from moe_bsr.runtime.device import prepare
from moe_bsr.training import adamw8

CLASSES = {"shapes": 10, "fractals": 12}
MB = 2**20


def catalog_of(config, limit: int, timed: bool = False) -> Catalog:
    catalog = Catalog(config, CLASSES, limit, prepare(config.runtime), timed)
    catalog.base = 100 * MB  # the same in every process
    return catalog


@pytest.fixture(scope="module", autouse=True)
def few():
    """Use every fifth candidate, including the first, because each candidate is traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "candidates", lambda *given: itertools.islice(candidates(*given), 0, None, 5))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("plans"), train__batch_size=64)


@pytest.fixture(scope="module")
def ample(config):
    catalog = catalog_of(config, 2**40)
    return catalog, catalog.plans()


@pytest.fixture(scope="module")
def tight(config, ample):
    """Return a limit at which the two largest plans no longer fit as they are, and its plans."""
    limit = sorted(plan.bytes for plan in ample[1])[-2] - 1
    catalog = catalog_of(config, limit)
    return limit, catalog.plans()


def changed(config, plan: Plan):
    return replace(config, **plan.changes)


def test_with_enough_memory_every_plan_has_exact_storage_and_whole_batches(config, ample):
    _, found = ample
    forms = {(p.changes["storage"], p.changes["train.grad_accumulation_steps"]) for p in found}
    assert forms == {("exact", 1)} and {p.changes["train.optimizer"] for p in found} == {"adamw"}


def test_plans_differ_in_blocks_dropping_and_experts_and_the_configured_one_is_first(config, ample):
    found = list(candidates(config, ample[0].vit))
    trained = [plan["plan.train_blocks"] for plan in found]
    assert all(blocks in trained for blocks in ([], [4, 5], [1, 3, 5], "all"))
    assert {str(plan.get("moe.experts")) for plan in found} == {"full", "low_rank", "None"}
    assert {str(plan["plan.drop_blocks"]) for plan in found} == {"[]", "[0, 2, 3]", "[1, 3]"}
    assert len(found) == len({str(plan) for plan in found})
    assert not any("plan.head_blocks" in plan for plan in found)  # all plans read what the configuration reads
    own = replace(config, plan__moe_blocks=[1, 3, 5], moe__mlp_ratio=4)  # also one of the other candidates
    looked = list(candidates(own, ample[0].vit))
    assert len(looked) == len({repr(changed(own, Plan(changes, 0, 0, None, 1, 1.0))) for changes in looked})
    first = found[0]
    assert {key: first[f"plan.{key}"] for key in ("train_blocks", "drop_blocks", "moe_blocks")} == {
        "train_blocks": [1, 3, 5],
        "drop_blocks": [1, 3],
        "moe_blocks": [3, 5],
    }


def test_the_costs_of_a_plan_equal_those_of_a_newly_built_model(config, tight):
    """The catalog's plans share models, and each plan changes them."""
    limit, found = tight
    for plan in found[::3]:
        own = changed(config, plan)
        parts = own.train.grad_accumulation_steps
        model = build_on_meta(own, CLASSES)
        cost = predict(model, own, batch=64 // parts, precision="fp32", all_tasks=True)
        evaluation = cost.parameters + cost.optimizer + evaluation_peak(model, own, "fp32")
        assert plan.bytes == 100 * MB + max(cost.peak, evaluation) <= limit
        assert plan.flops == parts * cost.step_flops == parts * sum(cost.flops_by_block.values())
        assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert own.data.image_cache_mb * 10**6 <= limit - plan.bytes


def test_less_memory_means_leaner_settings_and_never_more_plans(ample, tight):
    limit, found = tight
    names = {str(plan_of(p)) for p in ample[1]}
    assert {str(plan_of(p)) for p in found} <= names
    assert len(found) > len([p for p in ample[1] if p.bytes <= limit])
    assert any(p.changes["train.grad_accumulation_steps"] > 1 for p in found)


def test_a_plan_without_micro_batches_gets_a_leaner_storage(config):
    whole = replace(config, train__optimizer="sgd", train__step_in_backward=True, train__grad_clip_norm=None)
    catalog = catalog_of(whole, 2**40)
    own = next(candidates(whole, catalog.vit))
    catalog.limit = catalog._fastest(own).bytes - 1
    leaner = catalog._fastest(own)
    assert leaner.changes["storage"] != "exact" and leaner.changes["train.grad_accumulation_steps"] == 1


def plan_of(plan: Plan) -> dict:
    form = ("storage", "train.grad_accumulation_steps", "train.optimizer", "data.image_cache_mb")
    return {key: value for key, value in plan.changes.items() if key not in form}


def test_only_plans_that_no_other_dominates_are_listed():
    drawn = random.Random(0)
    found = [
        Plan({"seed": n}, drawn.randrange(1, 9), 1, drawn.randrange(1, 9) / 2, drawn.randrange(1, 9), drawn.random())
        for n in range(60)
    ]

    def beats(one: Plan, other: Plan, near: float = 0.0) -> bool:
        return all(a <= (1 + near) * b for a, b in zip(one.costs, other.costs, strict=True))

    listed, near = front(found, most=60)
    assert near == 0 and listed == sorted(listed, key=lambda plan: plan.costs)
    for plan in found:
        assert (plan in listed) == (not any(beats(other, plan) and not beats(plan, other) for other in found))
    few, near = front(found, most=5)
    assert len(few) <= 5 and near > 0 and len(front(found, most=len(few))[0]) == len(few)
    assert all(any(beats(one, plan, near) for one in few) for plan in found)


def test_8_bit_moments_are_traced_on_their_first_chunks(config, monkeypatch):
    monkeypatch.setattr(adamw8, "CHUNK", 2)
    own = replace(config, train__optimizer="adamw8", plan__moe_blocks=[], plan__train_blocks=[5])
    seen = []
    for chunks in (3, 10**6):
        monkeypatch.setattr(update_section, "CHUNKS", chunks)
        monkeypatch.setattr("moe_bsr.cost.step._sections", {})
        seen.append(predict(build_on_meta(own, CLASSES), own, batch=8, precision="fp32", all_tasks=True))
    assert seen[0] == seen[1]


def test_updates_of_equal_parameters_are_traced_once_and_counted_for_each(config, monkeypatch):
    """Compare with the trace of every parameter's update, with the state of all tasks and of one."""
    own = replace(config, plan__train_blocks=[4, 5], plan__moe_blocks=[], train__optimizer="adamw8")
    for all_tasks in (True, False):
        costs = []
        for once in (update_section._once_for_alike, lambda tracer: contextlib.nullcontext()):
            monkeypatch.setattr(update_section, "_once_for_alike", once)
            monkeypatch.setattr("moe_bsr.cost.step._sections", {})
            costs.append(predict(build_on_meta(own, CLASSES), own, batch=8, precision="fp32", all_tasks=all_tasks))
        assert costs[0] == costs[1] and costs[0].optimizer > 0


def test_the_lower_bound_never_exceeds_the_whole_step(config):
    changes = {"plan__moe_blocks": [3, 5], "plan__train_blocks": [3, 5], "train__grad_accumulation_steps": 8}
    for storage in STORAGES:
        own = replace(config, storage=storage, **changes)
        model = build_on_meta(own, CLASSES)
        cost = predict(model, own, batch=8, precision="fp32", all_tasks=True)
        beside = cost.peak - cost.parameters - cost.optimizer - cost.gradients
        least = least_beside_gradients(model, own, batch=8, precision="fp32")
        assert 0.5 * beside < least <= beside


def test_the_lower_bound_rules_out_only_settings_that_do_not_fit(config, monkeypatch):
    """Settings and least memory stay the same if each setting is predicted in full, until none fits."""

    def tightest(model, config, batch, precision):
        cost = predict(model, config, batch=batch, precision=precision, all_tasks=True)
        return cost.peak - cost.parameters - cost.optimizer - cost.gradients

    monkeypatch.setattr(plans, "MICRO_BATCHES", (1, 2, 4))
    dense, asked, listed = replace(config, plan__moe_blocks=[], train__optimizer="sgd"), [], []
    for bound in (lambda *given, **named: asked.append(tightest(*given, **named)) or asked[-1], lambda *_, **__: 0):
        monkeypatch.setattr(plans, "least_beside_gradients", bound)
        catalog, forms = catalog_of(dense, 2**40), []
        own = next(candidates(dense, catalog.vit))
        while (form := catalog._fastest(own)) is not None:
            forms.append((form, catalog.least))
            catalog.limit = form.bytes - 1
        listed.append((forms, catalog.least))
    assert listed[0] == listed[1] and len(listed[0][0]) > 2 and len(asked) > 2


def test_seconds_are_a_sum_over_blocks(config, ample, monkeypatch):
    """Here a block's seconds are given as a function of its gradients, experts, tokens and number of images."""

    def given(self, key, timed):
        if key[0] == "ends":
            return 1000.0 * key[2]
        if key[0] == "weight":
            return 0.25
        plan, tokens, gradients, alone, images, _ = key
        kind = {None: 1, False: 10, True: 20}[gradients] + 100 * plan.moe + 0.5 * alone
        return kind * tokens * images

    monkeypatch.setattr(rates.Rates, "_once", given)
    timed = rates.Rates(config, CLASSES, ample[0].vit, prepare(config.runtime))
    own = replace(config, plan__train_blocks=[3], plan__drop_blocks=[1], plan__keep_rate=0.5, plan__moe_blocks=[3])
    own = replace(own, train__grad_accumulation_steps=2)
    model = build_on_meta(own, CLASSES)
    tokens = [n for n, _ in counts(model)]
    kinds = [1, 1, 1, 110, 20, 20.5]
    assert tokens[0] == tokens[1] > tokens[2] == tokens[5]
    per_image = 1000 + sum(kind * count for kind, count in zip(kinds, tokens, strict=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert timed.seconds(own, model) == pytest.approx(64 * per_image + 0.25 * trained)


def test_each_kind_of_block_is_timed_once_and_the_process_is_unchanged(config, ample):
    timed = rates.Rates(config, CLASSES, ample[0].vit, prepare(config.runtime))
    threads = torch.get_num_threads()
    own = replace(config, plan__train_blocks="all", plan__drop_blocks=[], plan__moe_blocks=[])
    first = timed.seconds(own, build_on_meta(own, CLASSES))
    assert first > 0 and timed.seconds(own, build_on_meta(own, CLASSES)) == first
    assert len(timed._known) == 4  # embedding and head, five equal blocks, the last block, a weight
    merging = replace(config, tokens__reduce="merge", storage="int8")
    assert timed.seconds(merging, build_on_meta(merging, CLASSES)) > 0
    for other in ({"train__optimizer": "mezo"}, {"train__step_in_backward": True, "train__grad_clip_norm": None}):
        another = replace(own, **other)
        assert timed.seconds(another, build_on_meta(another, CLASSES)) > 0
    assert torch.get_num_threads() == threads


@pytest.fixture
def ask(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plans.memory, "resident", lambda: 100 * MB)
    (tmp_path / "tiny.yaml").write_text(configuration.dump(config))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["cost", str(tmp_path / "tiny.yaml"), "--plans", "--no-measure", *arguments])
        return status, *capsys.readouterr()

    return run


def test_the_command_line_of_a_plan_reproduces_it(ask, config, tmp_path):
    status, out, _ = ask("--budget", "1GB", "--json")
    result = json.loads(out)
    assert status == 0 and 0 < sum(plan["listed"] for plan in result["plans"]) <= 15
    for plan in result["plans"]:
        own = configuration.load(tmp_path / "tiny.yaml", plan["overrides"].split())
        keys = {key.replace(".", "__"): value for key, value in plan["changes"].items()}
        assert own == replace(config, **keys)
    text = ask("--budget", "1GB", "seed=1")[1]
    assert text.endswith(f"{tmp_path / 'tiny.yaml'} seed=1 KEY=VALUE ...\n")
    assert f"{len(result['plans'])} plans fit into 1024 MB" in text
    assert all(plan["overrides"] in text for plan in result["plans"] if plan["listed"])


def test_a_budget_that_is_too_small_or_missing_is_an_error_of_one_line(ask, capsys, monkeypatch):
    monkeypatch.setattr(plans, "candidates", lambda *given: [next(candidates(*given))])
    status, out, _ = ask("--budget", "101MB")
    assert status == 1 and "fits into 101.0 MB: the leanest plan takes" in out and out.count("\n") == 1
    assert ask()[0] == 2
    assert main(["cost"]) == 2 and "name a configuration, or give --budget" in capsys.readouterr().err
