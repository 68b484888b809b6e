"""Probe images: always the same images, processed as in evaluation, with the experts of every patch."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import make_model, normal, scale_routers
from tiny_runs import make_config, make_trainer

from moe_bsr.config import TokensConfig
from moe_bsr.evaluation import probe

pytestmark = pytest.mark.usefixtures("light")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("tasks"))


def test_probes_are_always_the_same_images_of_the_validation_split(config, tmp_path):
    trainer = make_trainer(config, tmp_path)
    data = trainer.tasks["fractals"]
    few, more = probe.pick_probe_images(data, 3), probe.pick_probe_images(data, 7)
    assert len(few.val) == 3 and few.val.index.tolist() == more.val.index[:3].tolist()
    assert set(more.val.index) <= set(data.val.index) and len(set(more.val.index)) == 7
    assert len(probe.pick_probe_images(data, 10**6).val) == len(data.val)
    labels = dict(zip(data.val.index.tolist(), data.val.labels.tolist(), strict=True))
    assert [labels[i] for i in more.val.index.tolist()] == more.val.labels.tolist()


def test_a_probe_uses_evaluation_mode_and_restores_training_mode(config, tmp_path):
    trainer = make_trainer(config, tmp_path)
    trainer.model.train()
    data = probe.pick_probe_images(trainer.tasks["fractals"], 5)
    seen = probe.run_probe(trainer.model, data, trainer.transforms, trainer.runtime)
    assert trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        output = trainer.model(trainer.transforms.normalize(seen.images), "fractals")
    assert torch.equal(seen.predicted, output.logits.argmax(1))
    assert seen.records.keys() == output.records.keys()
    assert torch.equal(seen.records[3].routing.experts, output.records[3].routing.experts)


@pytest.mark.parametrize(("kind", "prefix"), [("class-token", 1), ("registers", 4), ("average-pool", 0)])
def test_the_expert_map_has_the_experts_of_the_remaining_patches(kind, prefix):
    model = make_model(kind, moe_blocks=[1, 3], drop_blocks=[1, 2]).eval()
    scale_routers(model, 50.0)
    with torch.inference_mode():
        records = model(normal(3, 3, 16, 16), "one").records
    found = probe.expert_map(records, prefix, 16)
    assert found.keys() == {1, 3}
    for block, last_drop in ((1, 1), (3, 2)):
        routing, origin = records[block].routing.experts, records[last_drop].dropped.origin
        for image in range(3):
            expected = {i: routing[image, i].tolist() for i in range(prefix)}
            expected |= {
                prefix + int(patch): routing[image, prefix + token].tolist()
                for token, patch in enumerate(origin[image].tolist())
                if patch >= 0
            }
            for token in range(prefix + 16):
                assert found[block][image, token].tolist() == expected.get(token, [-1, -1])


def test_all_patches_of_a_merged_token_have_its_experts():
    model = make_model("registers", moe_blocks=[3], drop_blocks=[0, 2], tokens=TokensConfig(reduce="merge")).eval()
    with torch.inference_mode():
        records = model(normal(3, 3, 16, 16), "one").records
    found, routing = probe.expert_map(records, 4, 16)[3], records[3].routing.experts
    for image, place in enumerate(records[2].dropped.place.tolist()):
        assert found[image, :4].tolist() == routing[image, :4].tolist()
        assert found[image, 4:].tolist() == [routing[image, 4 + token].tolist() for token in place]


def test_overlap_counts_shared_experts_in_any_order():
    now = np.array([[[0, 1], [2, 3], [-1, -1], [4, 5]]], np.int16)
    before = np.array([[[1, 0], [3, 4], [0, 1], [-1, -1]]], np.int16)
    assert probe.expert_overlap(now, before) == pytest.approx((1 + 0.5) / 2)
    assert probe.expert_overlap(now, now) == 1
    assert math.isnan(probe.expert_overlap(now[:, 2:3], before[:, 2:3]))
    assert np.array_equal(probe.unpack(json.loads(json.dumps(probe.pack(now)))), now)
