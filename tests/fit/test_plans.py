"""Plans for a memory: each fits as predicted, none that is told is beaten, and its command line means the plan."""

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
from moe_bsr.cost.predict import predict
from moe_bsr.fit import plans, rates
from moe_bsr.fit.plans import Catalog, Plan, candidates, front
from moe_bsr.model.multitask import build_on_meta
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
    """Each plan that is looked at is traced: some tell of all, the first among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "candidates", lambda *given: itertools.islice(candidates(*given), 0, None, 5))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("plans"), train__batch_size=64)


@pytest.fixture(scope="module")
def roomy(config):
    catalog = catalog_of(config, 2**40)
    return catalog, catalog.plans()


@pytest.fixture(scope="module")
def tight(config, roomy):
    """Where the two largest plans no longer fit as they are."""
    limit = sorted(plan.bytes for plan in roomy[1])[-2] - 1
    catalog = catalog_of(config, limit)
    return limit, catalog.plans()


def changed(config, plan: Plan):
    return replace(config, **{key.replace(".", "__"): value for key, value in plan.changes.items()})


def test_with_room_every_plan_is_saved_exactly_in_one_batch(config, roomy):
    _, found = roomy
    forms = {(p.changes["storage"], p.changes["train.grad_accumulation_steps"]) for p in found}
    assert forms == {("exact", 1)} and {p.changes["train.optimizer"] for p in found} == {"adamw"}


def test_plans_differ_in_blocks_dropping_and_experts_and_the_own_one_comes_first(config, roomy):
    found = list(candidates(config, roomy[0].vit))
    trained = [plan["plan.train_blocks"] for plan in found]
    assert all(blocks in trained for blocks in ([], [4, 5], [1, 3, 5], "all"))
    assert {str(plan.get("moe.experts")) for plan in found} == {"full", "low_rank", "None"}
    assert {str(plan["plan.drop_blocks"]) for plan in found} == {"[]", "[0, 2, 3]", "[1, 3]"}
    assert len(found) == len({str(plan) for plan in found})
    first = found[0]
    assert {key: first[f"plan.{key}"] for key in ("train_blocks", "drop_blocks", "moe_blocks")} == {
        "train_blocks": [1, 3, 5],
        "drop_blocks": [1, 3],
        "moe_blocks": [3, 5],
    }


def test_what_is_told_of_a_plan_is_what_a_model_of_its_own_costs(config, tight):
    """The catalog's models are shared among plans, and change theirs."""
    limit, found = tight
    evaluated = predict(
        build_on_meta(replace(config, plan__train_blocks=[], plan__drop_blocks=[], plan__moe_blocks=[]), CLASSES),
        replace(config, plan__train_blocks=[], plan__drop_blocks=[], plan__moe_blocks=[]),
        batch=64,
        precision="fp32",
        all_tasks=True,
    ).transients["forward"]
    for plan in found[::2]:
        own = changed(config, plan)
        parts = own.train.grad_accumulation_steps
        model = build_on_meta(own, CLASSES)
        cost = predict(model, own, batch=64 // parts, precision="fp32", all_tasks=True)
        evaluation = cost.parameters + cost.optimizer + evaluated
        assert plan.bytes == 100 * MB + max(cost.peak, evaluation) <= limit
        assert plan.flops == parts * cost.step_flops == parts * sum(cost.flops_by_block.values())
        assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert own.data.image_cache_mb * 10**6 <= limit - plan.bytes


def test_less_memory_means_leaner_forms_and_never_more_plans(roomy, tight):
    limit, found = tight
    names = {str(plan_of(p)) for p in roomy[1]}
    assert {str(plan_of(p)) for p in found} <= names
    assert len(found) > len([p for p in roomy[1] if p.bytes <= limit])
    assert any(p.changes["train.grad_accumulation_steps"] > 1 for p in found)


def test_what_cannot_be_split_into_micro_batches_is_told_in_a_leaner_storage(config):
    whole = replace(config, train__optimizer="sgd", train__step_in_backward=True, train__grad_clip_norm=None)
    catalog = catalog_of(whole, 2**40)
    own = next(candidates(whole, catalog.vit))
    catalog.limit = catalog._fastest(own).bytes - 1
    leaner = catalog._fastest(own)
    assert leaner.changes["storage"] != "exact" and leaner.changes["train.grad_accumulation_steps"] == 1


def plan_of(plan: Plan) -> dict:
    form = ("storage", "train.grad_accumulation_steps", "train.optimizer", "data.image_cache_mb")
    return {key: value for key, value in plan.changes.items() if key not in form}


def test_only_plans_that_no_other_beats_are_told():
    drawn = random.Random(0)
    found = [
        Plan({"seed": n}, drawn.randrange(1, 9), 1, drawn.randrange(1, 9) / 2, drawn.randrange(1, 9), drawn.random())
        for n in range(60)
    ]

    def beats(one: Plan, other: Plan, near: float = 0.0) -> bool:
        return all(a <= (1 + near) * b for a, b in zip(one.costs, other.costs, strict=True))

    told, near = front(found, most=60)
    assert near == 0 and told == sorted(told, key=lambda plan: plan.costs)
    for plan in found:
        assert (plan in told) == (not any(beats(other, plan) and not beats(plan, other) for other in found))
    few, near = front(found, most=5)
    assert len(few) <= 5 and near > 0 and len(front(found, most=len(few))[0]) == len(few)
    assert all(any(beats(one, plan, near) for one in few) for plan in found)


def test_moments_in_8_bits_are_traced_by_their_first_chunks(config, monkeypatch):
    monkeypatch.setattr(adamw8, "CHUNK", 2)
    own = replace(config, train__optimizer="adamw8", plan__moe_blocks=[], plan__train_blocks=[5])
    seen = []
    for chunks in (3, 10**6):
        monkeypatch.setattr(update_section, "CHUNKS", chunks)
        monkeypatch.setattr("moe_bsr.cost.predict._sections", {})
        seen.append(predict(build_on_meta(own, CLASSES), own, batch=8, precision="fp32", all_tasks=True))
    assert seen[0] == seen[1]


def test_seconds_are_those_of_the_kinds_of_blocks(config, roomy, monkeypatch):
    """With rates that are given: frozen blocks, blocks on the path and experts each at their own."""
    monkeypatch.setattr(rates.Rates, "_rate", lambda self, kind, storage, images, config: known(kind))

    def known(kind):
        return {None: (1.0, 0.0), rates.DENSE: (10.0, 0.5)}.get(kind, (100.0, 0.25))

    timed = rates.Rates(config, CLASSES, roomy[0].vit, prepare(config.runtime))
    own = replace(config, plan__train_blocks=[3], plan__drop_blocks=[], plan__moe_blocks=[3], storage="exact")
    model = build_on_meta(replace(own, train__grad_accumulation_steps=2), CLASSES)
    cost = predict(model, own, batch=8, precision="fp32")
    flops = cost.flops_by_block
    frozen = sum(flops[name] for name in ("embedding", "block 0", "block 1", "block 2"))
    path = flops["block 4"] + flops["block 5"] + flops["head"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = 2 * (frozen + 10 * path + 100 * flops["block 3"]) + 0.25 * trained
    assert timed.seconds(replace(own, train__grad_accumulation_steps=2), model, cost) == pytest.approx(expected)


def test_blocks_are_timed_once_each_and_the_process_stays_as_it_was(config, roomy):
    timed = rates.Rates(config, CLASSES, roomy[0].vit, prepare(config.runtime))
    threads, cost = torch.get_num_threads(), roomy[1][0]
    own = changed(config, cost)
    model = build_on_meta(own, CLASSES)
    step = predict(model, own, batch=64, precision="fp32", all_tasks=True)
    first = timed.seconds(own, model, step)
    assert first > 0 and timed.seconds(own, model, step) == first and len(timed._known) == 3
    assert torch.get_num_threads() == threads


@pytest.fixture
def ask(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plans.memory, "resident", lambda: 100 * MB)
    (tmp_path / "tiny.yaml").write_text(configuration.dump(config))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["cost", str(tmp_path / "tiny.yaml"), "--plans", "--no-measure", *arguments])
        return status, *capsys.readouterr()

    return run


def test_the_command_line_of_a_plan_is_the_plan(ask, config, tmp_path):
    status, out, _ = ask("--budget", "1GB", "--json")
    result = json.loads(out)
    assert status == 0 and 0 < sum(plan["listed"] for plan in result["plans"]) <= 15
    for plan in result["plans"]:
        own = configuration.load(tmp_path / "tiny.yaml", plan["overrides"].split())
        keys = {key.replace(".", "__"): value for key, value in plan["changes"].items()}
        assert own == replace(config, **keys)
    text = ask("--budget", "1GB")[1]
    assert f"{len(result['plans'])} plans fit into 1024 MB" in text
    assert all(plan["overrides"] in text for plan in result["plans"] if plan["listed"])


def test_what_does_not_fit_or_was_not_asked_is_said_in_a_line(ask, capsys, monkeypatch):
    monkeypatch.setattr(plans, "candidates", lambda *given: [next(candidates(*given))])
    status, out, _ = ask("--budget", "101MB")
    assert status == 1 and "fits into 101.0 MB: the leanest plan takes" in out and out.count("\n") == 1
    assert ask()[0] == 2
    assert main(["cost"]) == 2 and "name a configuration, or give --budget" in capsys.readouterr().err
