"""Runs of a ResNet: resume, loading and prediction, cached features, refused commands, and predicted peak memory."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import make_config, make_trainer, state_of

import moe_bsr
from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import measure
from moe_bsr.cli.main import main
from moe_bsr.cost import kernel_scratch
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build
from moe_bsr.runtime.device import prepare
from moe_bsr.training.feature_cache import FeatureCache
from moe_bsr.training.update import training_step

pytestmark = pytest.mark.usefixtures("bare")

RESNET = {
    "backbone__name": "resnet10t",
    "backbone__image_size": 32,
    "plan__train_blocks": [1],
    "plan__drop_blocks": [],
    "plan__moe_blocks": [],
    "train__steps": 4,
    "train__checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def finished(bare, tmp_path_factory):
    """A run of four updates: its configuration, folder and last state."""
    folder = tmp_path_factory.mktemp("resnet")
    config = make_config(folder, **RESNET)
    trainer = make_trainer(config, folder / "run")
    trainer.fit()
    return config, folder / "run", state_of(trainer.model)


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(finished, tmp_path):
    config, run, state = finished
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint" / "4")
    (again / "report.json").unlink()
    trainer = make_trainer(config, again)
    trainer.fit(resume=True)
    resumed = state_of(trainer.model)
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []


def test_a_finished_run_classifies_images(finished):
    _, run, state = finished
    loaded = moe_bsr.load(run, "last")
    models = list(loaded.models.values())
    assert all(torch.equal(value, state[name]) for name, value in models[0].state_dict().items())
    pictures = [np.full((40, 50, 3), shade, dtype=np.uint8) for shade in (0, 200)]
    found = loaded.predict(pictures)
    assert [set(image["tasks"]) for image in found["images"]] == [{"shapes", "fractals"}] * 2
    assert found["groups"][0]["shared_blocks"] == len(models[0].plan)


@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_feature_maps_are_cached(finished, kind):
    config, _, _ = finished
    settings = configuration.replace(
        config, data__feature_cache_mb=10, data__feature_cache=kind, data__augment=False
    ).data
    model = build(config, {"shapes": 10, "fractals": 12}).eval()
    cache = FeatureCache(model, {"shapes": 4, "fractals": 1}, settings)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows, views = np.arange(4), np.zeros(4, dtype=int)
    with torch.no_grad():
        features = model.forward_features(images)
        cache.add("shapes", rows, views, features)
        tokens, records = cache.get("shapes", rows, views)
        x, again = features[0].x, tokens.x
        assert tokens.origin is None and not records and model.forward_from(tokens, "shapes").logits.isfinite().all()
    largest = x.abs().amax((2, 3), keepdim=True)
    assert torch.equal(x, again) if kind == "exact" else bool(((x - again).abs() <= largest / 254 + 1e-6).all())


@pytest.mark.parametrize(
    "command",
    [
        "export RUN",
        "views RUN --no-serve",
        "share RUN --timm OUT --task shapes",
        "drops CONFIG",
        "fit CONFIG --minutes 1 --run OUT",
        "cost CONFIG --mode paper",
        "cost CONFIG --sweep",
        "cost CONFIG --plans --budget 2GB --no-measure",
        "compare-methods CONFIG --out OUT",
    ],
)
def test_commands_that_need_tokens_refuse_with_a_one_line_error(finished, command, tmp_path, capsys):
    config, run, _ = finished
    file = tmp_path / "resnet.yaml"
    file.write_text(yaml.safe_dump(configuration.to_dict(config)))
    places = {"RUN": str(run), "CONFIG": str(file), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "resnet10t" in lines[0] and "not a Vision Transformer" in lines[0], lines


@pytest.mark.skipif(kernel_scratch.cpu_kind() != kernel_scratch.AVX2, reason="kernels measured on Zen 3 alone")
def test_the_predicted_peak_of_a_step_is_the_measured_one(tmp_path):
    """The sweep over registries tests the other quantities, on any CPU."""
    config = make_config(tmp_path, **RESNET | {"backbone__image_size": 96, "storage": "recompute"})
    model = build(config, dict.fromkeys(config.task_names(), 10))
    predicted = predict(model, config, batch=4, precision="fp32", task="shapes")
    measured = measure(training_step(model, config, prepare(config.runtime), batch=4, task="shapes"))
    assert predicted.kept == measured.kept
    before = predicted.parameters + predicted.optimizer + predicted.average
    assert predicted.peak - before == pytest.approx(max(measured.peaks.values()), rel=0.02)
