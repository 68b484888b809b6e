"""Test that RandAugment, color jitter and erasing equal timm's results and use only the image's own random stream."""

import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train

from moe_bsr.config import ConfigError
from moe_bsr.data.augment import Augment, seeded

SIZE, MEAN, STD = 24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def numbers() -> tuple:
    return random.random(), np.random.rand(), float(torch.rand(()))


def stream(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original-mstd0.5", "3a", None])
def test_augmentation_equals_timm_with_the_same_seeds(policy):
    augment = Augment(SIZE, MEAN, STD, "bicubic", policy, 0.4)
    _, timms, _ = transforms_imagenet_train(
        SIZE, color_jitter=0.4, force_color_jitter=True, auto_augment=policy, interpolation="bicubic", mean=MEAN,
        separate=True,
    )  # fmt: skip
    for seed in range(3):
        first, second, third = stream(seed).integers(0, 2**32, 3).tolist()
        with torch.random.fork_rng(devices=[]):
            random.seed(first), np.random.seed(second), torch.manual_seed(third)
            expected = np.asarray(timms(Image.fromarray(PIXELS)))
        np.testing.assert_array_equal(augment(PIXELS, stream(seed)), expected)
        assert (expected != PIXELS).any()


def test_erasing_equals_timm_on_the_normalized_image():
    augment = Augment(SIZE, MEAN, STD, erasing=1.0)
    erased = augment(PIXELS, stream())
    mean, std = (255 * torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with seeded(stream()):
        expected = RandomErasing(1.0, mode="pixel", device="cpu")(
            (torch.from_numpy(PIXELS).permute(2, 0, 1) - mean) / std
        )
    expected = (expected * std + mean).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(erased - expected).max() <= 0.5 + 1e-3  # rounded to bytes
    changed = (erased != PIXELS).any(2)
    assert 0.02 * SIZE**2 <= changed.sum() <= 0.4 * SIZE**2


def test_global_random_states_are_restored_even_after_an_error():
    augment = Augment(SIZE, MEAN, STD, auto_augment="rand-m9-mstd0.5", color_jitter=0.4, erasing=0.5)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    augment(PIXELS, stream())
    with pytest.raises(KeyError), seeded(stream()):
        numbers()
        raise KeyError
    assert numbers() == expected


def test_augmentation_in_two_threads_is_deterministic():
    augment = Augment(SIZE, MEAN, STD, auto_augment="rand-m9-mstd0.5", erasing=1.0)
    expected = [augment(PIXELS, stream(seed)) for seed in range(20)]
    found = {}
    work = [
        threading.Thread(target=lambda part=part: found.update({s: augment(PIXELS, stream(s)) for s in part}))
        for part in (range(0, 20, 2), range(1, 20, 2))
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    for seed in range(20):
        np.testing.assert_array_equal(found[seed], expected[seed])


@pytest.mark.parametrize("policy", ["randm9", "rand-x9", "nonsense", "original-x3"])
def test_an_unknown_timm_policy_is_refused(policy):
    with pytest.raises(ConfigError, match=r"data\.auto_augment = .*: null, or a policy in timm's notation"):
        Augment(SIZE, MEAN, STD, auto_augment=policy)
