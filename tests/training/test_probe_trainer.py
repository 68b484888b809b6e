"""Runs of the linear probe: report, evaluation, resume and refusals, as for any other run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import SIZES, Crash, act_at, crash, make_config, make_trainer

import moe_bsr
from moe_bsr.config import ConfigError, load, replace
from moe_bsr.config.probe import probe_config
from moe_bsr.cost.predict import predict
from moe_bsr.data import UnreadableImage
from moe_bsr.data.cache import DecodedCache
from moe_bsr.runs import checkpoint
from moe_bsr.training import probe_trainer
from moe_bsr.training.linear_probe import PENALTIES
from moe_bsr.training.probe_trainer import ProbeTrainer

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return probe_config(make_config(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory, bare):
    """The folder of a probe run and its report."""
    folder = tmp_path_factory.mktemp("run") / "probe"
    return folder, train(config, folder)


def train(config, folder, resume=False):
    return moe_bsr.train(config, folder, resume, callbacks=[])


def test_the_report_has_the_entries_of_every_report(finished, tmp_path):
    probe = finished[1]
    usual = train(make_config(tmp_path, train__steps=1), tmp_path / "usual")
    assert probe.keys() - {"penalties"} == usual.keys()
    assert probe["tasks"]["shapes"].keys() == usual["tasks"]["shapes"].keys()
    assert {task: about["images"] for task, about in probe["tasks"].items()} == SIZES
    assert (probe["status"], probe["split"], probe["test_evaluations"]) == ("finished", "test", 1)
    for penalties in probe["penalties"].values():
        assert penalties["chosen"] in PENALTIES and penalties["path"][0]["penalty"] == max(PENALTIES)
    chosen = [next(p for p in t["path"] if p["penalty"] == t["chosen"]) for t in probe["penalties"].values()]
    assert sum(point["val_top1"] for point in chosen) / 2 == pytest.approx(probe["selected_mean_val_top1"])


def test_a_probe_run_can_be_evaluated_and_used_for_prediction(finished, tmp_path):
    folder, report = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)  # a test evaluation is counted in the run's folder
    assert moe_bsr.evaluate(copy, "test")["mean_top1"] == pytest.approx(report["mean_top1"])
    found = moe_bsr.load(copy).predict(np.zeros((40, 40, 3), np.uint8))
    assert set(found["images"][0]["tasks"]) == set(SIZES)


def test_only_the_heads_are_saved(finished):
    saved = checkpoint.read(finished[0] / "checkpoint" / "1")[0]["weights"]
    heads = {f"heads.{task}.{part}" for task in SIZES for part in ("weight", "bias")}
    assert {name for name in saved if name.startswith(("heads.", "vit."))} == heads


def test_the_features_are_those_with_token_dropping(config, tmp_path):
    config = replace(config, train__penalty=0.5)
    dropped, whole = (
        make_trainer(config, tmp_path / "a"),
        make_trainer(replace(config, plan__drop_blocks=[]), tmp_path / "b"),
    )
    assert isinstance(dropped, ProbeTrainer) and dropped.model.path_start == 6
    one, other = (each._solve(each.tasks["shapes"]) for each in (dropped, whole))
    assert not torch.equal(one.weight, other.weight)


def test_heads_read_the_class_tokens_of_more_blocks(config, tmp_path):
    config = replace(config, plan__head_blocks=[4, 2], train__penalty=0.5)
    report = train(config, tmp_path / "run")
    assert moe_bsr.evaluate(tmp_path / "run", "test")["mean_top1"] == pytest.approx(report["mean_top1"])
    run = moe_bsr.load(tmp_path / "run")
    model, images = run.models["shapes"], torch.randn(2, 3, 32, 32)
    assert predict(model, config, batch=8, precision="fp32", all_tasks=True).peak > 0
    with torch.no_grad():
        tokens, class_tokens = model.forward_features(images, upto=0)[0], []
        for index in range(6):
            tokens = model.run_block(index, tokens, "")
            class_tokens.append(tokens.x[:, 0])
        read = torch.cat([model.vit.norm(tokens.x)[:, 0], class_tokens[2], class_tokens[4]], 1)
        assert torch.allclose(model(images, "shapes").logits, model.heads["shapes"](read), atol=1e-4)
    assert run.predict(np.zeros((40, 40, 3), np.uint8))["images"][0]["tasks"].keys() == SIZES.keys()


def test_a_kill_before_or_after_saving_does_not_change_the_result(config, finished, tmp_path, monkeypatch):
    folder, whole = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_trainer, "fit", lambda *given: crash())
        with pytest.raises(Crash):
            train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == []
    with monkeypatch.context() as patch:  # another crash after solving, before the evaluation
        act_at(patch, 1, crash)
        with pytest.raises(Crash):
            train(config, tmp_path / "run", resume=True)
    again = train(config, tmp_path / "run", resume=True)
    assert again["tasks"]["shapes"]["top1"] == whole["tasks"]["shapes"]["top1"]
    assert again["penalties"] == whole["penalties"]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_saved_solution_is_not_computed_again_on_resume(config, tmp_path, monkeypatch):
    config = replace(config, train__penalty=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_bsr.training.trainer.evaluate", lambda *given: crash())
        with pytest.raises(Crash):
            train(config, tmp_path / "run")
    monkeypatch.setattr(probe_trainer, "fit", lambda *given: crash())
    report = train(config, tmp_path / "run", resume=True)
    assert report["status"] == "finished" and report["penalties"].keys() == SIZES.keys()


def test_one_model_per_task_gives_the_same_probe(config, finished, tmp_path):
    together = finished[1]
    each = train(replace(config, mode="single_task"), tmp_path / "each")
    for task in SIZES:
        assert each["tasks"][task]["top1"] == together["tasks"][task]["top1"]


def test_the_configured_penalty_is_used(config, finished, tmp_path):
    mild, fixed = (train(replace(config, train__penalty=p), tmp_path / str(p))["penalties"] for p in ("mild", 0.5))
    assert all(mild[task]["chosen"] >= finished[1]["penalties"][task]["chosen"] for task in SIZES)
    assert {entry["chosen"] for entry in fixed.values()} == {0.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan__train_blocks", [1]),
        ("adapter", "lora"),
        ("data__augment", True),
        ("train__ema_decay", 0.9),
        ("train__steps", 7),
        ("train__penalty", -1.0),
        ("plan__head_blocks", [2, 2]),
    ],
)
def test_incompatible_settings_are_refused(config, key, value):
    with pytest.raises(ConfigError, match=key.replace("__", ".")):
        replace(config, **{key: value})


def test_head_blocks_must_exist(config, tmp_path):
    with pytest.raises(ConfigError, match=r"plan.head_blocks.*\[6\]"):
        make_trainer(replace(config, plan__head_blocks=[6]), tmp_path / "run")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_in_the_repository_can_become_a_probe(file):
    assert probe_config(load(file)).train.optimizer == "lbfgs"


def test_a_configuration_with_other_settings_can_become_a_probe(tmp_path):
    config = make_config(
        tmp_path, adapter="lora", train__ema_decay=0.9, train__warmup_steps=5, data__hflip=True, mode="single_task"
    )
    probe = probe_config(config)
    assert probe.plan.drop_blocks == config.plan.drop_blocks and probe.tasks == config.tasks
    assert probe_config(probe) == probe


def test_skipped_images_are_not_replaced_in_the_features(config, tmp_path, monkeypatch):
    """Also with cached features, where another image replaces an unreadable one."""
    monkeypatch.setattr(DecodedCache, "image", unreadable_third(DecodedCache.image))
    solved = []
    for megabytes in (None, 100):
        settings = {"data__unreadable": "skip", "data__feature_cache_mb": megabytes, "train__penalty": 0.5}
        trainer = make_trainer(replace(config, **settings), tmp_path / str(megabytes))
        data = trainer.tasks["shapes"]
        with pytest.warns(UserWarning, match="it is skipped"):
            solved.append(trainer._solve(data).weight)
        assert trainer.used["shapes"] == len(trainer.transforms.readable(data, "train")) < SIZES["shapes"]
    assert torch.allclose(*solved, atol=1e-3)


def unreadable_third(read):
    def image(cache, source, index):
        if index % 3 == 0:
            raise UnreadableImage(f"{index}: not a readable image")
        return read(cache, source, index)

    return image


def test_time_for_validation_images_does_not_count_as_training_minutes(config, tmp_path, monkeypatch):
    clock, features = [0.0], probe_trainer.split_features

    def slow(make, data, split, *rest):
        clock[0] += 1000.0 * (split == "val")
        return features(make, data, split, *rest)

    monkeypatch.setattr(probe_trainer, "split_features", slow)
    monkeypatch.setattr(probe_trainer.time, "monotonic", lambda: clock[0])
    report = train(replace(config, train__minutes=0.5, train__steps=None, train__penalty=0.5), tmp_path / "run")
    assert {task: about["images"] for task, about in report["penalties"].items()} == SIZES
