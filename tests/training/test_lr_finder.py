"""The learning-rate finder: its updates equal the trainer's, and it suggests the rate of the steepest fall."""

import csv
import io
import json
import math

import pytest
from tiny_runs import make_config, make_trainer

import moe_bsr
from moe_bsr import config as configuration
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError
from moe_bsr.training.lr_finder import Point, Smoothed, curve, ramp, steepest

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def config(tmp_path_factory, bare):
    return make_config(tmp_path_factory.mktemp("lr"), train__steps=12, train__batch_size=4, train__grad_clip_norm=None)


@pytest.fixture(scope="module")
def found(config):
    return moe_bsr.find_lr(config, steps=12, low=1e-5, high=1e3)


def test_rates_rise_geometrically():
    assert ramp(1e-4, 1.0, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_updates_equal_the_trainers_at_these_rates(config, found, tmp_path):
    trainer = make_trainer(config, tmp_path)
    batches, first, losses = trainer.inputs.batches(trainer.sampler.batches()), {}, []
    for step, rate in enumerate(ramp(1e-5, 1e3, 12)[: len(found["curve"])]):
        (result,), _ = trainer.take(batches, step, rate)
        trainer.state.step = step + 1
        losses.append(result.loss)
        first.setdefault(trainer.sampler.tasks(step)[0], result.loss)
    assert [point["loss"] for point in found["curve"]] == losses
    assert [point["lr"] for point in found["curve"]] == ramp(1e-5, 1e3, 12)[: len(losses)]
    assert not list(tmp_path.iterdir())


def test_each_task_is_scaled_by_its_first_loss_and_smoothed_separately():
    smoothed = Smoothed()
    assert smoothed.add({"a": 4.0}) == pytest.approx(1.0)
    assert smoothed.add({"b": 0.5}) == pytest.approx(1.0)
    a = (0.7 * 0.3 * 1.0 + 0.3 * 0.5) / (1 - 0.7**2)
    assert smoothed.add({"a": 2.0}) == pytest.approx((a + 1.0) / 2)


def test_the_suggestion_is_the_rate_where_a_known_curve_falls_fastest():
    rates = ramp(1e-6, 1.0, 100)
    values = [1 - 0.8 / (1 + math.exp(-3 * (math.log10(rate) + 3))) + max(0.0, rate - 0.05) for rate in rates]
    points = [Point(rate, value, value) for rate, value in zip(rates, values, strict=True)]
    assert steepest(points) == pytest.approx(1e-3, rel=0.25)
    assert steepest([Point(rate, 1.0, 1.0 + rate) for rate in rates]) is None


def test_a_search_ends_when_the_loss_diverges(config, tmp_path):
    sgd = configuration.replace(config, train__optimizer="sgd", train__momentum=0.0, train__weight_decay=0.0)
    points = curve(make_trainer(sgd, tmp_path), ramp(1e-3, 1e8, 12))
    assert 1 < len(points) < 12 and all(math.isfinite(point.smoothed) for point in points)


def test_the_command_prints_the_curve_in_three_formats(config, found, tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(configuration.dump(config))
    monkeypatch.setattr(moe_bsr, "find_lr", lambda config, steps, low, high: found)
    status = 0 if found["suggestion"] else 1
    assert main(["lr", str(file), "--json"]) == status
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert main(["lr", str(file), "--csv"]) == status
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["smoothed"]) for row in rows] == [point["smoothed"] for point in found["curve"]]
    monkeypatch.setattr(moe_bsr, "find_lr", lambda *given: found | {"suggestion": 3.2e-4})
    assert main(["lr", str(file)]) == 0
    assert "train.lr=3.2e-04" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mode": "single_task"}, "mode = 'single_task': multitask"), ({}, "steps = 3: at least 10")],
)
def test_invalid_searches_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        moe_bsr.find_lr(configuration.replace(config, **changes), steps=3)
