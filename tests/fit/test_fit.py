"""The search: candidates that continue earlier ones, settings that fit into memory, and the report."""

import dataclasses
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import SIZES, make_config

import moe_bsr
from moe_bsr.cli import fit as command
from moe_bsr.config import ConfigError, replace
from moe_bsr.fit import Budget, Search, candidates, memory_limit, search
from moe_bsr.fit.measure import measure
from moe_bsr.fit.memory_limit import Memory, fitted
from moe_bsr.model.multitask import build, build_on_meta
from moe_bsr.runs import warm_start
from moe_bsr.runs.load import load
from moe_bsr.runtime.device import prepare
from moe_bsr.training.failures import NonFiniteLoss
from moe_bsr.training.feature_cache import FeatureCache

pytestmark = pytest.mark.usefixtures("light")

CLASSES = {"shapes": 10, "fractals": 12}
HEADS_ONLY = {"plan__train_blocks": [], "plan__moe_blocks": [], "data__augment": False}
MANY = 10**12  # bytes of decoded images
HUGE = Memory(2**40, 100 * 2**20, "asked for")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Run a search in about a second. Returns configuration, folder, result and messages."""
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEAST_TRIAL", -1e6)  # however little time is left
        config, messages = make_config(folder), []
        found = Search(config, folder / "fit", Budget(0.02), messages.append, callbacks=[]).run()
    return config, folder / "fit", found, messages


def test_every_candidate_is_a_run_and_the_best_is_named(searched):
    _, folder, found, messages = searched
    names = [candidate["name"] for candidate in found["candidates"]]
    assert names[:4] == ["probe", "trial_late", "trial_bsr", "trial_experts"] and len(names) == 7
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names)
    best = max(found["candidates"], key=lambda candidate: candidate["val_top1"])
    assert found["best"] == best["name"] and found["run"] == str(folder / best["name"])
    assert found["reason"].startswith(f"{best['name']} has the highest validation top-1")
    assert json.loads((folder / "fit.json").read_text()) == found
    assert moe_bsr.evaluate(folder / best["name"])["mean_top1"] == pytest.approx(best["val_top1"])
    assert len(messages) > 2 * len(names)


def test_the_last_candidate_continues_the_best_trial(searched):
    _, folder, found, _ = searched
    *before, last = found["candidates"]
    trials = [candidate for candidate in before if candidate["name"].startswith("trial_")]
    plans = [
        candidate for candidate in trials if candidate["name"].removeprefix("trial_") in ("late", "bsr", "experts")
    ]
    assert last["name"] == max(plans, key=lambda candidate: candidate["val_top1"])["name"].removeprefix("trial_")
    of_plan = [candidate for candidate in trials if candidate["name"].startswith(f"trial_{last['name']}")]
    assert len(of_plan) == 3
    best = max(of_plan, key=lambda candidate: candidate["val_top1"])
    assert last["settings"]["init_from"] == best["run"] and last["settings"]["lr"] == best["settings"]["lr"]


def test_no_candidate_was_tested_and_all_have_the_same_validation_images(searched):
    _, folder, found, _ = searched
    for candidate in found["candidates"]:
        report = json.loads((folder / candidate["name"] / "report.json").read_text())
        assert report["test_evaluations"] == 0 and report["split"] == "val"
    names = {
        load(folder / candidate["name"]).data("shapes", "val").val.index.tobytes()
        for candidate in found["candidates"][:3]
    }
    assert len(names) == 1


def test_heads_read_the_configured_blocks_or_the_upper_half(tmp_path):
    config = make_config(tmp_path)
    assert candidates.head_blocks(config, 6, True) == [3, 4] and candidates.head_blocks(config, 6, False) == []
    assert candidates.head_blocks(replace(config, plan__head_blocks=[1, 5]), 6, True) == [1, 5]


def test_late_blocks_start_with_the_predictions_of_the_probe(searched):
    config, folder, *_ = searched
    trained = load(folder / "probe")
    late = candidates.late(config, 6, candidates.head_blocks(config, 6, True))
    classes = {task: list(trained.data(task, "val").class_names) for task in SIZES}
    model, _ = warm_start.build_from(str(folder / "probe"), late, classes)
    assert late.plan.head_blocks == [3, 4] and model.path_start == 4
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for task in SIZES:
            expected = trained.models[task].eval()(images, task).logits
            assert torch.allclose(model.eval()(images, task).logits, expected, atol=1e-5)


def test_a_short_budget_trains_only_the_probe(tmp_path):
    config = make_config(tmp_path)
    found = Search(config, tmp_path / "fit", Budget(0.02), callbacks=[]).run()
    assert [candidate["name"] for candidate in found["candidates"]] == ["probe"]
    assert found["reason"] == "only probe fits into the time: training blocks needs 60 s after it"


def test_a_diverging_trial_is_skipped_and_the_search_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LEAST_TRIAL", -1e6)
    monkeypatch.setattr(search, "RATES", ())
    train = search.api.train

    def diverging(config, folder, **keywords):
        if folder.name == "trial_bsr":
            raise NonFiniteLoss("loss nan at step 1")
        return train(config, folder, **keywords)

    monkeypatch.setattr(search.api, "train", diverging)
    config, messages = make_config(tmp_path, plan__moe_blocks=[]), []
    found = Search(config, tmp_path / "fit", Budget(0.01), messages.append, callbacks=[]).run()
    assert [candidate["name"] for candidate in found["candidates"]] == ["probe", "trial_late", "trial_bsr", "late"]
    assert "trial_bsr: loss nan at step 1" in messages and found["best"] != "trial_bsr"


def test_a_plan_that_cannot_be_trained_is_left_out_and_the_search_continues(tmp_path, monkeypatch):
    """Its feature cache is too small for the class tokens that its heads read here. A warm-up of many updates is no
    reason: trials are shorter than that."""
    monkeypatch.setattr(search, "LEAST_TRIAL", -1e6)
    monkeypatch.setattr(search, "RATES", ())
    settings = {"plan__train_blocks": [5], "plan__moe_blocks": [], "train__warmup_steps": 8}
    config, messages = make_config(tmp_path, data__augment=False, data__feature_cache_mb=1, **settings), []
    monkeypatch.setattr(FeatureCache, "__init__", too_small(FeatureCache.__init__))
    found = Search(config, tmp_path / "fit", Budget(0.01), messages.append, callbacks=[]).run()
    assert [candidate["name"] for candidate in found["candidates"]] == ["probe", "trial_late", "late"]
    assert any(line.startswith("trial_bsr is left out: data.feature_cache_mb = 1e-06: at least") for line in messages)


def too_small(make):
    def made(self, model, sizes, settings):
        megabytes = 1e-6 if model.path_start == 5 else settings.feature_cache_mb
        make(self, model, sizes, dataclasses.replace(settings, feature_cache_mb=megabytes))

    return made


def test_late_blocks_train_without_a_draw_of_blocks(tmp_path):
    plan = {"plan__train_blocks": "all", "plan__drop_blocks": [], "plan__moe_blocks": [], "tokens__fuse": "none"}
    config = make_config(tmp_path, **plan, train__alast__blocks=2)
    assert candidates.late(config, 6, [3]).train.alast.blocks is None
    assert candidates.own_candidates(config, [3])["bsr"].train.alast.blocks == 2


def test_late_trains_on_the_cached_features_of_the_probe(searched, tmp_path):
    config, folder, *_ = searched
    candidate = {name: load(folder / name).config for name in ("probe", "trial_late")}
    assert candidate["probe"].data.feature_cache_mb == candidate["trial_late"].data.feature_cache_mb > 0
    late = replace(candidates.late(config, 6, [3]), data__augment=False, data__feature_cache_mb=100)
    cache = FeatureCache(build(late, CLASSES), SIZES, late.data)
    alone = replace(candidates.probe(config, [3]), train__penalty=0.5)
    moe_bsr.train(alone, tmp_path / "alone", callbacks=[])
    moe_bsr.train(candidates.with_features_of(alone, late), tmp_path / "kept", callbacks=[], features=cache)
    heads = [load(tmp_path / name).models["shapes"].heads["shapes"].weight for name in ("alone", "kept")]
    assert torch.allclose(*heads, atol=1e-3) and all(seen.all() for seen in cache.seen.values())


def test_other_plans_get_the_memory_of_the_feature_cache_if_they_need_it(tmp_path, monkeypatch):
    config, messages = make_config(tmp_path), []
    fitting = Search(config, tmp_path / "fit", Budget(1), messages.append, callbacks=[])
    fitting.speed, fitting.shared = SimpleNamespace(classes=CLASSES, decoded=0), SimpleNamespace(bytes=50 * 2**20)
    own, late = candidates.own_candidates(config, [3])["bsr"], candidates.late(config, 6, [3])
    needed = fitted(own, CLASSES, HUGE, "fp32", 0).bytes
    for room_for, kept in ((60 * 2**20, True), (40 * 2**20, False)):
        monkeypatch.setattr(memory_limit, "STORAGES", ("exact",))
        monkeypatch.setattr(memory_limit, "MICRO_BATCHES", (1,))
        fitting.memory = Memory(needed + room_for, HUGE.base, "asked for")
        assert fitting._fitted(late, shares=True).bytes <= fitting.memory.limit
        assert fitting._fitted(own, shares=False).bytes == needed + (50 * 2**20 if kept else 0)
        assert (fitting.shared is not None) == kept == (not messages)


def test_cached_features_are_freed_when_another_plan_continues(tmp_path, monkeypatch):
    fitting, seen = Search(make_config(tmp_path), tmp_path / "fit", Budget(10), callbacks=[]), []

    class Kept:
        pass

    def go(name, config, seconds, start=None, shares=False):
        top1 = 90.0 if name == "trial_bsr" else 10.0
        fitting.candidates.append(SimpleNamespace(name=name, val_top1=top1))
        seen.append((name, shares, kept() is not None))
        return True

    fitting.speed, fitting.shared = SimpleNamespace(head_blocks=[3]), Kept()
    kept = weakref.ref(fitting.shared)
    monkeypatch.setattr(fitting, "_go", go)
    fitting._train_the_best(candidates.late(fitting.config, 6, [3]))
    assert seen[0] == ("trial_late", True, True) and seen[-1] == ("bsr", False, False)


def test_a_plan_with_adapters_is_tried_in_addition_to_late_blocks_without_them(tmp_path):
    config = make_config(tmp_path, plan__train_blocks=[], plan__moe_blocks=[], adapter="lora")
    late = candidates.late(config, 6, [3])
    assert late.adapter is None and build_on_meta(late, CLASSES).path_start == 4
    assert candidates.own_candidates(config, [3])["bsr"].adapter == "lora"
    assert not candidates.own_candidates(replace(config, adapter=None), [3])
    projections = replace(config, adapter=None, plan__train_blocks="all", plan__train_weights="proj")
    assert candidates.late(projections, 6, [3]).plan.train_weights == "all"


def test_the_number_of_training_images_fits_the_time(tmp_path):
    fitting = Search(make_config(tmp_path), tmp_path / "fit", Budget(1), callbacks=[])
    fitting.config = replace(fitting.config, data__val_images=10)
    fitting.speed = SimpleNamespace(images={"a": 30, "b": 100, "c": 500}, classes=dict.fromkeys("abc", 2), forward=0.5)
    for seconds, most in ((15 + 15, 10), (15 + 65, 50), (15 + 215, 300), (15 + 315, None)):  # 15 s for validation
        assert fitting._with_fewer_images(fitting.config, seconds).data.train_images == most


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "single_task"}, "mode = 'single_task'.*multitask"),
        ({}, "already exists"),
        ({"train__optimizer": "lbfgs", "train__steps": 1, **HEADS_ONLY}, "train.optimizer = 'lbfgs'"),
        ({"train__only": ["shapes"], "train__init_from": "runs/other"}, r"train.only = \['shapes'\]"),
    ],
)
def test_single_task_mode_and_a_folder_in_use_are_refused(tmp_path, changes, says):
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=says):
        Search(make_config(tmp_path, **changes), tmp_path / "fit", Budget(1))


def test_too_little_memory_is_an_error_before_any_image_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_bsr.fit.measure._seconds", None)
    with pytest.raises(ConfigError, match=r"memory: 50 MB \(asked for\), but this run needs at least \d+ MB"):
        Search(make_config(tmp_path), tmp_path / "fit", Budget(0.1, 50 * 2**20)).run()


def test_candidates_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    """There is time for all candidates, but no settings of `late` or another plan with trained blocks fit."""
    monkeypatch.setattr(search, "LEAST_TRIAL", -1e6)
    whole = memory_limit.fitted

    def narrow(config, *given):
        if config.train.optimizer != "lbfgs":
            raise ConfigError("memory: too little")
        return whole(config, *given)

    monkeypatch.setattr(memory_limit, "fitted", narrow)
    messages = []
    fitting = Search(make_config(tmp_path), tmp_path / "fit", Budget(0.01), messages.append, callbacks=[])
    found = fitting.run()
    assert [candidate["name"] for candidate in found["candidates"]] == ["probe"]
    assert found["reason"] == "only probe could be trained"
    assert all(f"trial_{name} is left out: memory: too little" in messages for name in ("late", "bsr", "experts"))


def test_the_timed_network_keeps_all_tokens_as_the_probe_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("moe_bsr.fit.measure._seconds", lambda model, *_: seen.append(model.plan) or 1e-3)
    config = make_config(tmp_path)
    assert config.plan.drop_blocks
    measure(config, prepare(config.runtime), None, 1.0)
    assert seen and all(block.keep_rate == 1 for plan in seen for block in plan)


def test_few_images_are_timed_in_a_short_budget(tmp_path, monkeypatch):
    """A few images of each task are timed, then as many as there is time for."""
    seen = []

    def slow(model, data, transforms, runtime, batch):
        seen.append((data.name, len(data.train)))
        return 0.5 * len(data.train)

    monkeypatch.setattr("moe_bsr.fit.measure._seconds", slow)
    config = make_config(tmp_path)
    speed, _ = measure(config, prepare(config.runtime), None, seconds=400)
    assert seen == [("shapes", 8), ("shapes", 12), ("fractals", 8), ("fractals", 12)] and speed.forward == 0.5
    assert speed.opening > 0


def test_too_little_time_leaves_one_image_per_class(tmp_path):
    fitting = Search(make_config(tmp_path), tmp_path / "fit", Budget(1), (messages := []).append, callbacks=[])
    fitting.config = replace(fitting.config, data__val_images=10)
    fitting.speed = SimpleNamespace(images={"a": 30, "b": 90}, classes={"a": 2, "b": 7}, forward=0.5)
    assert fitting._with_fewer_images(fitting.config, 1).data.train_images == 7 and "too short" in messages[0]


def test_task_names_and_configuration_files_are_distinguished():
    config, name = command.configuration(["shapes", "petals", "train.lr=0.5", "train.weight_decay=0"])
    assert (config.task_names(), config.train.lr, name) == (["shapes", "petals"], 0.5, "shapes_petals")
    config, name = command.configuration(["configs/quickstart.yaml", "seed=3"])
    assert (len(config.tasks), config.seed, name) == (5, 3, "quickstart")
    with pytest.raises(ConfigError, match="name a configuration"):
        command.configuration(["seed=3"])


def test_the_table_shows_every_candidate_and_marks_the_best(searched):
    _, _, found, _ = searched
    lines = command.table(found).splitlines()
    assert len(lines) == 1 + len(found["candidates"])
    assert [line.split()[0] for line in lines if line.rstrip().endswith("*")] == [found["best"]]
