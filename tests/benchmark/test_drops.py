"""The study of token dropping: features and FLOPs of a setting equal those of a model configured with it."""

import pytest
import torch
import yaml
from tiny_runs import make_config

import moe_bsr
from moe_bsr import config as configuration
from moe_bsr.benchmark import drops
from moe_bsr.benchmark.drop_settings import (
    DropSetting,
    candidates,
    equal_flops,
    features_of_settings,
    relative_flops,
    setting_of,
)
from moe_bsr.config import TokensConfig
from moe_bsr.config.probe import probe_config
from moe_bsr.cost.predict import predict
from moe_bsr.model import block
from moe_bsr.model.multitask import build, build_on_meta
from moe_bsr.runtime.device import prepare

pytestmark = pytest.mark.usefixtures("light")

SETTINGS = [
    DropSetting(),
    DropSetting(((1, 0.5), (3, 0.5))),
    DropSetting(((1, 0.5), (3, 0.25))),
    DropSetting(((3, 0.5),)),
    DropSetting(((1, 0.5), (3, 0.5)), TokensConfig(fuse="normalized")),
    DropSetting(((1, 0.5), (3, 0.5)), TokensConfig(fuse="normalized", protect_fused=True)),
    DropSetting(((1, 0.5), (3, 0.5)), TokensConfig(fuse="none")),
    DropSetting(((1, 0.5), (3, 0.5)), TokensConfig(rank_by="logits")),
    DropSetting(((1, 0.5), (3, 0.75)), TokensConfig(reduce="merge")),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("tasks"))


def configured(config, setting):
    """Return the probe configuration with the overrides of a setting."""
    text = dict(each.split("=", 1) for each in setting.overrides())
    values = {key.replace(".", "__"): yaml.safe_load(value) for key, value in text.items()}
    return configuration.replace(probe_config(config), **values)


@pytest.mark.parametrize("head_blocks", [[], [1, 4]], ids=str)
def test_features_equal_those_of_a_model_with_that_configuration(head_blocks, config):
    config, images = configuration.replace(config, plan__head_blocks=head_blocks), torch.randn(3, 3, 32, 32)
    model = build(drops.frozen(config), {"shapes": 10}).eval()
    with torch.inference_mode():
        found = features_of_settings(model, images, SETTINGS)
        for setting in SETTINGS:
            alone = build(configured(config, setting), {"shapes": 10}).eval()
            assert torch.equal(found[setting], alone.features(alone.forward_features(images)[0])), str(setting)
    assert not torch.equal(found[SETTINGS[1]], found[SETTINGS[4]])  # otherwise the comparison would show nothing


def test_shared_blocks_run_once(config, monkeypatch):
    model, forward, ran = build(drops.frozen(config), {"shapes": 10}).eval(), block.forward, []
    index = {id(layer): number for number, layer in enumerate(model.vit.blocks)}
    monkeypatch.setattr(block, "forward", lambda layer, *rest: ran.append(index[id(layer)]) or forward(layer, *rest))
    with torch.inference_mode():
        features_of_settings(model, torch.randn(1, 3, 32, 32), SETTINGS[:4])
    assert [ran.count(number) for number in range(6)] == [1, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_relative_flops_equal_traced_flops(config, setting):
    def traced(each):
        model = build_on_meta(configured(config, each), {"shapes": 10})
        return predict(model, configured(config, each), batch=1, precision="fp32").forward_flops

    model = build_on_meta(drops.frozen(config), {"shapes": 10})
    edges = 2 * (
        16 * 3 * 64 * model.vit.embed_dim + 10 * model.vit.embed_dim
    )  # patch embedding and head, which dropping does not change
    whole = traced(DropSetting()) - edges
    assert relative_flops(model, setting) == pytest.approx((traced(setting) - edges) / whole, rel=0.01)


def test_equal_flops_finds_the_keep_rate_for_given_flops(config):
    model = build_on_meta(drops.frozen(config), {"shapes": 10})
    found = equal_flops(model, 0.8, lambda rate: DropSetting(((2, rate),)))
    assert 0.8 - 0.05 < relative_flops(model, found) <= 0.8  # one of sixteen tokens changes it by about 0.03
    assert equal_flops(model, 0.3, lambda rate: DropSetting(((4, rate),))) is None


def test_at_most_four_candidates_cost_more_than_the_configured_setting(config):
    model, own = build_on_meta(drops.frozen(config), {"shapes": 10}), setting_of(config)
    found = candidates(model, own)
    assert found[:2] == [DropSetting(), own] and len(set(map(str, found))) == len(found)
    dearer = [each for each in found if relative_flops(model, each) > relative_flops(model, own) + 1e-9]
    assert len(dearer) <= 4
    for each in found:  # each can be configured as its overrides say
        assert setting_of(configured(config, each)) == each


def test_the_study_reports_flops_and_lost_accuracy_of_each_setting(config, monkeypatch):
    frozen, settings = drops.frozen(config), SETTINGS[:2]
    reported = []
    rows = drops.study(frozen, prepare(frozen.runtime), settings, 40, lambda *given: reported.append(given))
    assert reported == [("shapes", 23, 7), ("fractals", 40, 9)]
    assert [row.setting for row in rows] == settings and rows[0].flops == 1 and rows[0].lost == rows[0].error == 0
    assert rows[1].lost == pytest.approx(sum(rows[0].top1[t] - rows[1].top1[t] for t in rows[0].top1) / 2)


def test_the_accuracy_of_each_setting_is_that_of_a_probe_run(config, tmp_path):
    """More images are allowed than there are, so that both use all."""
    frozen = drops.frozen(config)
    settings = [DropSetting(), DropSetting(((0, 0.2), (1, 0.2)), TokensConfig(fuse="none"))]
    rows = drops.study(frozen, prepare(frozen.runtime), settings, 200)
    assert rows[0].top1 != rows[1].top1  # otherwise the comparison would not tell them apart
    for number, row in enumerate(rows):
        alone = configuration.replace(configured(config, row.setting), train__evaluate_test=False)
        report = moe_bsr.train(alone, tmp_path / str(number), callbacks=[])
        assert row.top1 == pytest.approx({task: scores["top1"] for task, scores in report["tasks"].items()})


def row(name, flops, lost):
    return drops.Row(DropSetting(((name, 0.5),)), flops, {"a": 50 - lost}, lost, 1.0)


def test_the_best_setting_loses_least_at_no_more_flops():
    rows = [row(0, 1.0, 0.0), row(1, 0.5, 9.0), row(2, 0.503, 4.0), row(3, 0.6, 2.0), row(4, 0.4, 5.0)]
    assert drops.cheapest_loss(rows, rows[1].setting) == rows[2]
    assert drops.on_the_front(rows) == [rows[0], rows[2], rows[3], rows[4]]
