"""Fit a run into a memory: its storage, number of micro-batches and caches."""

import pytest
from tiny_runs import SIZES, make_config

from moe_bsr.config import ConfigError, replace
from moe_bsr.cost.predict import predict
from moe_bsr.fit import candidates, memory_limit
from moe_bsr.fit.memory_limit import Memory, fitted, with_feature_cache
from moe_bsr.model.multitask import build, build_on_meta
from moe_bsr.training.feature_cache import FeatureCache

pytestmark = pytest.mark.usefixtures("light")

CLASSES = {"shapes": 10, "fractals": 12}
MANY = 10**12  # bytes of decoded images
HUGE = Memory(2**40, 100 * 2**20, "asked for")


def test_leaner_settings_are_used_only_as_far_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "MICRO_BATCHES", (1, 4))
    config = make_config(tmp_path, train__batch_size=64, data__image_cache_mb=0, plan__moe_blocks=[])
    config = candidates.own_candidates(config, [3])["bsr"]
    whole = fitted(config, CLASSES, HUGE, "fp32", MANY)
    assert (whole.config.storage, whole.config.train.grad_accumulation_steps) == ("exact", 1)
    limits, forms = [whole.bytes - 1], [("exact", 1)]
    while True:
        try:
            form = fitted(config, CLASSES, Memory(limits[-1], HUGE.base, "asked for"), "fp32", MANY)
        except ConfigError as error:
            assert "this run needs" in str(error) and "of them for libraries" in str(error)
            break
        assert form.bytes <= limits[-1] < limits[0] + 1
        forms.append((form.config.storage, form.config.train.grad_accumulation_steps))
        limits.append(form.bytes - 1)
    assert len(forms) > 2 and forms == sorted(forms, key=lambda form: (memory_limit.STORAGES.index(form[0]), form[1]))


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
    """Evaluations need more than the updates of such small batches."""
    monkeypatch.setattr(memory_limit, "evaluation_peak", lambda *_: 0)


def test_an_evaluation_runs_beside_the_optimizer_state(tmp_path, monkeypatch):
    config = candidates.own_candidates(make_config(tmp_path, data__image_cache_mb=0, train__ema_decay=0.9), [3])["bsr"]
    model, batch = build_on_meta(config, CLASSES), config.train.batch_size
    cost = predict(model, config, batch=batch, precision="fp32", all_tasks=True)
    evaluation = 2 * cost.peak
    monkeypatch.setattr(memory_limit, "evaluation_peak", lambda *_: evaluation)
    form = fitted(config, CLASSES, HUGE, "fp32", 0)
    assert form.bytes == HUGE.base + cost.parameters + cost.optimizer + cost.average + evaluation


def test_half_of_the_remaining_memory_caches_images(tmp_path):
    config = candidates.own_candidates(make_config(tmp_path, data__image_cache_mb=100), [3])["bsr"]
    needed = fitted(replace(config, data__image_cache_mb=0), CLASSES, HUGE, "fp32", MANY).bytes
    form = fitted(config, CLASSES, Memory(needed + 60 * 10**6, HUGE.base, "asked for"), "fp32", MANY)
    assert (form.config.data.image_cache_mb, form.config.storage) == (30, "exact")
    assert form.bytes == needed + 30 * 10**6
    few = fitted(config, CLASSES, Memory(needed + 60 * 10**6, HUGE.base, "asked for"), "fp32", 2 * 10**6)
    assert (few.config.data.image_cache_mb, few.left) == (2, 58 * 10**6)


@pytest.mark.parametrize("room_for", ["exact", "int8", "nothing"])
def test_the_feature_cache_has_the_format_that_fits(tmp_path, room_for):
    config = candidates.late(make_config(tmp_path, data__feature_cache_mb=1, data__augment=False), 6, [3])
    assert config.data.feature_cache_mb is None  # it was set for the blocks of another plan
    model = build_on_meta(config, CLASSES)
    tokens, width, images = 1 + model.vit.patch_embed.num_patches, model.vit.embed_dim, sum(SIZES.values())
    each = {"exact": 4 * tokens * width, "int8": tokens * width + 4 * width, "nothing": 0}[room_for]
    space = int(1.03 * images * (each + 8 * tokens + 4 * width))
    kept = with_feature_cache(config, space, images, tokens, width, 4)
    if room_for == "nothing":
        assert kept == config
        return
    assert (kept.data.feature_cache, kept.data.augment) == (room_for, False)
    cache = FeatureCache(build(config, CLASSES), SIZES, kept.data)  # raises an error if the megabytes do not suffice
    assert cache.bytes <= space
    plain, counted = (fitted(each, CLASSES, HUGE, "fp32", 0) for each in (config, kept))
    assert counted.bytes - plain.bytes == kept.data.feature_cache_mb * 10**6 > 0


@pytest.mark.parametrize("key", ["data__erasing", "data__views", "train__mixup"])
def test_configured_augmentation_is_not_given_up_for_a_feature_cache(tmp_path, key):
    config = candidates.late(make_config(tmp_path, **{key: 1}), 6, [3])
    assert with_feature_cache(config, 10**12, 74, 17, 24, 4) == config


def test_a_batch_is_not_split_if_steps_are_taken_in_the_backward_pass(tmp_path):
    settings = {"train__step_in_backward": True, "train__grad_clip_norm": None}
    config = candidates.own_candidates(make_config(tmp_path, **settings), [3])["bsr"]
    assert {form.train.grad_accumulation_steps for form in memory_limit._forms(config)} == {1}
