"""Test loading a trained run: the model scores as it did in the report, or the error says what to do."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Crash, act_at, crash, script_scores, state_of

import moe_bsr
from moe_bsr.api import train
from moe_bsr.config import Config, ConfigError
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.model.backbones.vit import load as load_backbone
from moe_bsr.runs import checkpoint
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.config_file import chosen_tasks

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize("ema", [None, 0.7])
def test_a_loaded_run_scores_exactly_as_in_its_report(config, tmp_path, ema):
    report = train(moe_bsr.config.replace(config, train__ema_decay=ema, train__eval_every=None), tmp_path / "run")
    loaded = moe_bsr.load(tmp_path / "run")
    assert loaded.weights == ("live" if ema is None else "average") and loaded.step == 8
    for name, model in loaded.models.items():
        assert not model.training
        scores = evaluate(model, loaded.data(name), "test", loaded.transforms, loaded.runtime)
        assert {k: v for k, v in scores.items() if k != "images_per_second"} == {
            k: report["tasks"][name][k] for k in scores if k != "images_per_second"
        }
        assert loaded.class_names[name] == loaded.data(name).class_names


def test_best_last_or_any_kept_step_can_be_loaded(config, tmp_path, monkeypatch):
    script_scores(monkeypatch, [10.0, 30.0, 20.0])  # at updates 3, 6 and 8
    folder = tmp_path / "run"
    train(moe_bsr.config.replace(config, train__ema_decay=None), folder)
    for name, step in (("best", 6), ("last", 8), (6, 6), ("8", 8)):
        loaded = moe_bsr.load(folder, name)
        assert loaded.step == step
        saved = checkpoint.read(folder / "checkpoint" / str(step))[0]["weights"]
        held = loaded.models["shapes"].state_dict()
        assert all(torch.equal(held[key], value) for key, value in saved.items())
    with pytest.raises(CheckpointError, match="no checkpoint 7 .* 6, 8"):
        moe_bsr.load(folder, 7)


def test_tasks_of_a_run_can_be_chosen(finished):
    loaded = moe_bsr.load(finished, tasks=["fractals"])
    assert list(loaded.models) == list(loaded.class_names) == ["fractals"]
    with pytest.raises(ValueError, match="did you mean shapes"):
        moe_bsr.load(finished, tasks=["shape"])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        moe_bsr.load(tmp_path)


def test_train_save_selects_trainable_or_all_weights(config, tmp_path):
    saved, models = {}, {}
    for save in ("trainable", "all"):
        folder = tmp_path / save
        train(moe_bsr.config.replace(config, train__save=save, train__steps=2), folder)
        saved[save] = checkpoint.read(folder / "checkpoint" / "2")[0]["weights"]
        models[save] = state_of(moe_bsr.load(folder).models["shapes"])
    assert saved["all"].keys() == models["all"].keys()
    left_out = saved["all"].keys() - saved["trainable"].keys()
    assert {"vit.patch_embed.proj.weight", "vit.pos_embed", "vit.blocks.0.attn.qkv.weight"} <= left_out
    assert not [name for name in left_out if name.startswith(("vit.blocks.5.", "vit.norm.", "heads."))]
    assert models["all"].keys() == models["trainable"].keys()
    assert all(torch.equal(value, models["trainable"][name]) for name, value in models["all"].items())


@pytest.fixture
def own_backbone(config, tmp_path) -> tuple[Config, Path]:
    """Return the configuration with a backbone loaded from a weights file, and that file."""
    file = tmp_path / "backbone.safetensors"
    save_file(load_backbone(config.backbone, seed=5).state_dict(), file)
    return moe_bsr.config.replace(config, backbone__weights=str(file), train__ema_decay=None), file


def replace_backbone(config: Config, file: Path) -> None:
    save_file(
        load_backbone(moe_bsr.config.replace(config, backbone__weights="random").backbone, seed=6).state_dict(), file
    )


def test_loading_with_another_backbone_is_refused(own_backbone, tmp_path):
    config, file = own_backbone
    train(config, tmp_path / "run")
    replace_backbone(config, file)
    with pytest.raises(CheckpointError, match="only the weights that training changed.*backbone.weights"):
        moe_bsr.load(tmp_path / "run")


def test_the_weights_option_names_a_backbone_file_that_was_moved(own_backbone, tmp_path):
    config, file = own_backbone
    train(moe_bsr.config.replace(config, train__steps=2), tmp_path / "run")
    before = state_of(moe_bsr.load(tmp_path / "run").models["shapes"])
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="no such file.*weights=FILE"):
        moe_bsr.load(tmp_path / "run")
    after = moe_bsr.load(tmp_path / "run", weights=str(moved)).models["shapes"].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    replace_backbone(config, moved)
    with pytest.raises(CheckpointError, match="weights=FILE to load"):
        moe_bsr.load(tmp_path / "run", weights=str(moved))


def test_the_device_option_replaces_a_missing_device(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("  device: cpu\n", "  device: cuda:99\n"))
    with pytest.raises(ConfigError, match="cuda:99.*device='cpu'"):
        moe_bsr.load(tmp_path / "run")
    here = moe_bsr.load(tmp_path / "run", device="cpu")
    assert here.runtime.device.type == "cpu" and here.runtime.precision == "fp32"


def test_resuming_with_another_backbone_is_refused(own_backbone, tmp_path, monkeypatch):
    config, file = own_backbone
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 5, crash)
        train(config, tmp_path / "run")
    replace_backbone(config, file)
    with pytest.raises(CheckpointError, match="only the weights that training changed.*backbone.weights"):
        train(config, tmp_path / "run", resume=True)


def test_a_checkpoint_of_all_weights_needs_no_backbone_file(own_backbone, tmp_path):
    config, file = own_backbone
    train(moe_bsr.config.replace(config, train__save="all", train__steps=2), tmp_path / "run")
    file.unlink()
    assert moe_bsr.load(tmp_path / "run").step == 2


def test_tasks_are_chosen_by_name():
    assert chosen_tasks(None, ["a", "b"]) == ["a", "b"]
    assert chosen_tasks(["b", "b"], ["a", "b"]) == ["b"]
    with pytest.raises(ValueError, match="no task 'petls': this run has pets, food101; did you mean pets"):
        chosen_tasks(["petls"], ["pets", "food101"])


def test_each_file_of_a_checkpoint_is_hashed_once(finished, monkeypatch):
    hashed, sha256 = [], checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda file: hashed.append(file) or sha256(file))
    moe_bsr.load(finished, "last")
    moe_bsr.load(finished, "last", tasks=["shapes"])
    assert all(hashed.count(file) == 2 for file in hashed) and len(hashed) > 4


def test_a_run_predicts_the_class_names_it_was_trained_on(finished):
    loaded = moe_bsr.load(finished)
    split = loaded.data("shapes").test
    found = loaded.predict([split.source.image(int(index)) for index in split.index], top=1)
    names = [image["tasks"]["shapes"][0]["name"] for image in found["images"]]
    right = [name == loaded.class_names["shapes"][label] for name, label in zip(names, split.labels, strict=True)]
    scores = evaluate(loaded.models["shapes"], loaded.data("shapes"), "test", loaded.transforms, loaded.runtime)
    assert sum(right) / len(right) == pytest.approx(scores["top1"] / 100)
