"""Training from cached outputs of the frozen blocks is bitwise equal to training; invalid settings are refused."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from tiny_runs import SIZES, make_config, make_trainer, state_of

import moe_bsr
from moe_bsr.config import ConfigError, replace
from moe_bsr.data.loader import Batch

pytestmark = pytest.mark.usefixtures("light")

PLANS = {
    "BSR": {},
    "a drop before the first trained block": {"train_blocks": [3, 5], "moe_blocks": [5]},
    "merging before it": {
        "train_blocks": [5],
        "drop_blocks": [1, 2, 4],
        "keep_rate": [1.0, 0.6, 0.6],
        "moe_blocks": [5],
    },
    "last layer": {"train_blocks": [], "drop_blocks": [], "moe_blocks": []},
    "from the first block": {"train_blocks": [0, 3], "moe_blocks": [3]},
}
CASES = {
    "float32": {},
    "bfloat16, ahead": {"runtime__precision": "bf16", "data__prefetch": 2},
    "joint, micro-batches": {"sampler__kind": "joint", "train__steps": 4, "train__grad_accumulation_steps": 2},
}
DROP = "a drop before the first trained block"


def fit(folder, plan: dict, megabytes: int | None, **changes):
    """Return a trainer after its run, and the number of images that went through the frozen blocks."""
    settings = {
        "tokens__reduce": "merge" if plan.get("keep_rate") else "drop",
        "data__augment": False,
        "data__feature_cache_mb": megabytes,
        "train__evaluate_test": False,
    }
    plan = {f"plan__{key}": value for key, value in plan.items()}
    config = make_config(folder, **settings | plan | changes)
    trainer = make_trainer(config, folder / f"run{megabytes}")
    trainer.runtime.place(trainer.model)
    counts, forward_features = [], trainer.model.forward_features

    def counted(images, *arguments, **keywords):
        if trainer.model.training:
            counts.append(len(images))
        return forward_features(images, *arguments, **keywords)

    trainer.model.forward_features = counted
    trainer.fit()
    return trainer, sum(counts)


@pytest.fixture(scope="module")
def kept_of(tmp_path_factory):
    """A function that makes (once) the run of a plan with cached features."""
    made: dict[str, tuple] = {}

    def make(plan: str):
        if plan not in made:
            made[plan] = fit(tmp_path_factory.mktemp("kept"), PLANS[plan], 100)
        return made[plan]

    return make


@pytest.mark.parametrize(
    ("plan", "case"), [(plan, "float32") for plan in PLANS] + [(DROP, case) for case in CASES if case != "float32"]
)
def test_weights_are_bitwise_equal_with_and_without_the_cache(kept_of, tmp_path, plan, case):
    """All plans, and all other settings for the plan that caches records of drops beside the tokens."""
    plain, run_for_all = fit(tmp_path, PLANS[plan], None, **CASES[case])
    kept, run_once = kept_of(plan) if case == "float32" else fit(tmp_path, PLANS[plan], 100, **CASES[case])
    expected, got = state_of(plain.model), state_of(kept.model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert run_for_all == 8 * 8
    # Batches of eight run over 23 and 51 images. Only in an image's first epoch do the frozen blocks run.
    assert run_once < run_for_all
    assert kept.inputs.cache.seen["shapes"].all()


AUGMENTED = {"data__augment": True, "data__views": 2, "train__steps": 16}


def test_cached_views_give_the_same_weights(tmp_path):
    """In memory and in a file."""
    plain, run_for_all = fit(tmp_path, PLANS[DROP], None, **AUGMENTED)
    expected = state_of(plain.model)
    for location in ({}, {"data__feature_cache_dir": str(tmp_path)}):
        kept, run_once = fit(tmp_path, PLANS[DROP], 100, **AUGMENTED, **location)
        got = state_of(kept.model)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert run_once < run_for_all
        cache, (position, of_first) = kept.inputs.cache, (torch.tensor([0]).numpy(), torch.tensor([0]).numpy())
        assert cache.seen["shapes"].all() and "2 views of 74 training images" in str(cache)
        first, second = (cache.get("shapes", position, of_first + view)[0].x for view in (0, 1))
        assert not torch.equal(first, second)
        assert cache.bytes == sum(p.nbytes for parts in cache.kept.values() for p in parts)
        assert not list(tmp_path.glob("moe-bsr-features-*"))
        shutil.rmtree(tmp_path / "run100")


def test_int8_features_are_within_one_percent_and_the_same_at_every_use(kept_of, tmp_path):
    trainer, _ = fit(tmp_path, PLANS[DROP], 100, data__feature_cache="int8")
    exact, _ = kept_of(DROP)
    position = torch.arange(8).numpy()
    (got, drops), (expected, _) = (each.inputs.cache.get("shapes", position, 0 * position) for each in (trainer, exact))
    assert 0 < (got.x - expected.x).norm() / expected.x.norm() < 0.01
    assert torch.equal(got.origin, expected.origin) and drops.keys() == {1}
    assert trainer.inputs.cache.kept["shapes"][0].dtype == torch.int8
    images, labels = trainer.transforms.train_batch(trainer.tasks["shapes"], position, 0 * position)
    batch = Batch("shapes", position, images, labels, 0 * position)
    again = trainer.inputs.prepare(batch).features[0].x
    trainer.inputs.cache.seen["shapes"].zero_()
    assert torch.equal(trainer.inputs.prepare(batch).features[0].x, again)


@pytest.mark.parametrize("trained", [[5], [3, 5]], ids=str)
def test_heads_may_read_blocks_before_and_after_the_first_that_trains(trained, tmp_path):
    """With and without a cache of the frozen blocks' features, which contains only what heads read of these."""
    plan = {"train_blocks": trained, "drop_blocks": [1], "moe_blocks": [5], "head_blocks": [2, 4]}
    plain, _ = fit(tmp_path, plan, None, storage="recompute")
    kept, _ = fit(tmp_path, plan, 100, storage="recompute")
    assert all(torch.equal(state_of(kept.model)[name], value) for name, value in state_of(plain.model).items())
    model, images = plain.model.eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens, class_tokens = model.forward_features(images, upto=0)[0], {}
        for index in range(6):
            tokens = model.run_block(index, tokens, "shapes")
            class_tokens[index] = tokens.x[:, 0]
        read = torch.cat([model.vit.norm(tokens.x)[:, 0], class_tokens[2], class_tokens[4]], 1)
        assert torch.allclose(model(images, "shapes").logits, model.heads["shapes"](read), atol=1e-5)


def test_cached_features_equal_the_outputs_of_the_frozen_blocks(kept_of):
    trainer, _ = kept_of(DROP)
    data = trainer.tasks["shapes"]
    positions = torch.arange(0, SIZES["shapes"], 3).numpy()
    images, _ = trainer.transforms.train_batch(data, positions, 0 * positions)
    assert trainer.inputs.cache.contains("shapes", positions, 0 * positions)
    tokens, records = trainer.inputs.cache.get("shapes", positions, 0 * positions)
    with torch.no_grad():
        expected, drops = trainer.model.forward_features(trainer.transforms.normalize(images))
    assert torch.allclose(tokens.x, expected.x, atol=1e-5)
    assert torch.equal(tokens.origin, expected.origin) and tokens.fused == expected.fused
    assert records.keys() == drops.keys() == {1}
    for name in ("origin_in", "origin", "scores"):
        assert torch.allclose(getattr(records[1].dropped, name), getattr(drops[1].dropped, name), atol=1e-6)


def test_a_cache_can_be_used_by_another_run_with_the_same_frozen_blocks(tmp_path):
    first, _ = fit(tmp_path, PLANS["last layer"] | {"train_blocks": [5]}, 100)
    cache = first.inputs.cache
    plan = {"plan__drop_blocks": [], "plan__moe_blocks": []}
    other = make_trainer(make_config(tmp_path, plan__train_blocks=[], **plan), tmp_path)
    cache.take_over(other.model, other.tasks)
    assert cache.start == 5
    for changes in ({"plan__train_blocks": [4]}, {"plan__drop_blocks": [2]}, {"plan__train_blocks": [5], "seed": 1}):
        with pytest.raises(ValueError, match="blocks 0 to 4 of this model are not those"):
            cache.take_over(make_trainer(make_config(tmp_path, **plan | changes), tmp_path).model, other.tasks)
    with pytest.raises(ValueError, match="features are cached for .*'shapes': 23"):
        cache.take_over(other.model, other.tasks | {"shapes": other.tasks["shapes"].select("train", np.arange(22))})
    with pytest.raises(ValueError, match="cached features of shapes are those of other training images"):
        reverse = other.tasks["shapes"].select("train", np.arange(SIZES["shapes"])[::-1])
        cache.take_over(other.model, other.tasks | {"shapes": reverse})


def test_a_cache_does_not_keep_the_model_of_its_first_run_alive(tmp_path):
    late = make_config(tmp_path, plan__train_blocks=[5], plan__drop_blocks=[], plan__moe_blocks=[])
    trainer = make_trainer(replace(late, data__augment=False, data__feature_cache_mb=100), tmp_path / "late")
    cache, model = trainer.inputs.cache, weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None and cache.start == 5


def test_a_cache_can_be_used_by_a_model_with_more_frozen_blocks(tmp_path):
    late = make_config(tmp_path, plan__train_blocks=[4, 5], plan__drop_blocks=[], plan__moe_blocks=[])
    late = replace(late, data__augment=False, data__feature_cache_mb=100, plan__head_blocks=[2])
    cache = make_trainer(late, tmp_path / "late").inputs.cache
    heads = replace(late, plan__train_blocks=[], train__evaluate_test=False)
    moe_bsr.train(replace(heads, data__feature_cache_mb=None), tmp_path / "plain", callbacks=[])
    moe_bsr.train(heads, tmp_path / "kept", callbacks=[], features=cache)
    plain, kept = (moe_bsr.load(tmp_path / name).models["shapes"].heads["shapes"] for name in ("plain", "kept"))
    assert cache.start == 4 and torch.allclose(plain.weight, kept.weight, atol=1e-5)


def test_training_only_the_heads_caches_one_token(kept_of):
    trainer, _ = kept_of("last layer")
    assert trainer.inputs.cache.kept["shapes"][0].shape[1] == 1
    assert "outputs of blocks 0 to 5 on 74 training images" in str(trainer.inputs.cache)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__augment": True}, r"data.feature_cache_mb.*null while data.augment is true"),
        ({"data__views": 2}, r"data.views.*null with data.augment = false"),
        ({"data__feature_cache_mb": None, "data__feature_cache": "int8"}, r"data.feature_cache = 'int8'.*exact while"),
        ({"data__feature_cache_dir": "nowhere"}, r"data.feature_cache_dir = 'nowhere': no folder"),
        ({"plan__train_blocks": "all"}, r"data.feature_cache_mb.*null \(off\): the embedding trains"),
        (
            {
                "plan__train_blocks": [3, 5],
                "plan__moe_blocks": [5],
                "data__feature_cache_mb": 1,
                "backbone__image_size": 256,
            },
            r"data.feature_cache_mb.*at least \d+, for 74 images",
        ),
    ],
)
def test_invalid_cache_settings_are_refused(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        make_trainer(
            make_config(tmp_path, **{"data__augment": False, "data__feature_cache_mb": 100} | changes), tmp_path
        )


def test_augmentation_settings_without_augmentation_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.augment.*crop_scale"):
        make_config(tmp_path, data__augment=False, data__hflip=True)


def test_the_cache_description_names_the_embedding(kept_of):
    trainer, _ = kept_of("from the first block")
    assert "outputs of the embedding on 74 training images" in str(trainer.inputs.cache)
