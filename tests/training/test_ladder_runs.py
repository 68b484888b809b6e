"""Runs with a side network: bitwise equal resumed runs, cached features, warm starts, and refused export."""

import pytest
import torch
from tiny_runs import assert_resumed_is_whole, finished, make_config, make_trainer, state_of

import moe_bsr
from moe_bsr.config import ConfigError, replace
from moe_bsr.model.summary import table
from moe_bsr.runs.warm_start import build_from
from moe_bsr.training.feature_cache import CachedInputs

pytestmark = pytest.mark.usefixtures("bare")

LADDER = {
    "adapter": {"kind": "ladder", "reduction": 4},
    "plan__train_blocks": [],
    "plan__moe_blocks": [],
    "train__evaluate_test": False,
    "train__steps": 6,
    "train__checkpoint_every": 2,
    "data__augment": False,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its configuration and trainer."""
    folder = tmp_path_factory.mktemp("ladder")
    config = make_config(folder, **LADDER)
    return config, finished(config, folder / "run")


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    resumed = assert_resumed_is_whole(monkeypatch, whole[1], tmp_path / "run")
    assert any("resumed from" in line for line in resumed.about)


def test_a_run_with_cached_features_is_the_same(whole, tmp_path, monkeypatch):
    """The cache keeps everything that the ladder reads. No block of the backbone runs again for a cached image."""
    config, trainer = whole
    cached = make_trainer(replace(config, data__feature_cache_mb=100), tmp_path / "run")
    assert isinstance(cached.inputs, CachedInputs) and cached.inputs.cache.start == len(cached.model.plan)
    cached.fit()
    expected, found = state_of(trainer.model), state_of(cached.model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert cached.inputs.cache.seen["shapes"].all()


def test_a_warm_start_copies_the_whole_ladder(whole):
    config, trainer = whole
    classes = {name: data.class_names for name, data in trainer.tasks.items()}
    model, notes = build_from(str(trainer.folder), config, classes)
    assert any("adapters of blocks 0, 1, 2, 3, 4, 5" in line for line in notes)
    state = state_of(trainer.model)
    ladder = {name: value for name, value in state_of(model).items() if name.startswith("ladder.")}
    assert ladder and all(torch.equal(value, state[name]) for name, value in ladder.items())
    assert float(ladder["ladder.up.weight"].abs().max()) > 0
    alone = replace(config, train__only=["shapes"], train__init_from=str(trainer.folder))
    model, _ = build_from(str(trainer.folder), alone, classes)
    model(torch.randn(2, 3, 32, 32), "shapes").logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "heads.shapes.weight",
        "heads.shapes.bias",
    }


def test_all_tasks_share_one_forward_pass_and_export_is_refused(whole, tmp_path):
    run = moe_bsr.load(whole[1].folder, device="cpu")
    model = run.models["shapes"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = model.forward_features(images)
        for task in run.models:
            torch.testing.assert_close(
                model.classify(model.features_from(tokens, task), task), model(images, task).logits
            )
    pytest.importorskip("onnx")
    from moe_bsr.export.bundle import export

    with pytest.raises(ConfigError, match="adapter = 'ladder': a side network cannot be exported"):
        export(run, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_plan_table_includes_the_ladder(whole):
    lines = table(whole[1].model, whole[0])
    assert "beside" in lines[1] and "ladder" in lines[1] and "exact" in lines[1]
