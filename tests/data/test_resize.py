"""Test that resizing a crop equals cropping the resized image, bit for bit, and uses bounded memory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_bsr.data import ImageTransforms, resize
from moe_bsr.data.resize import resized, resized_part


def whole(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(tensor, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


SHAPES = [
    (1, 900),
    (900, 1),
    (2, 501),
    (77, 3),
    (40, 40),
    (300, 7),
    (7, 300),
    (64, 1000),
    (1000, 64),
    (333, 334),
    (31, 5),
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_a_crop_equals_cropping_the_resized_image(shape, interpolation, monkeypatch):
    image = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    monkeypatch.setattr(resize, "LARGE", 0)
    for size, crop_pct in ((8, 1.0), (24, 0.9), (33, 0.875)):
        short = math.floor(size / crop_pct)
        height, width = (short * side // min(shape) for side in shape)
        top, left = round((height - size) / 2), round((width - size) / 2)
        part = resized_part(image, height, width, interpolation, top, left, size, size)
        expected = whole(image, height, width, interpolation)[top : top + size, left : left + size]
        assert np.array_equal(part, expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_in_pieces_equals_resizing_the_whole_image(interpolation, monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(20):
        *shape, height, width = rng.integers(1, 120, 4).tolist()
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        monkeypatch.setattr(resize, "LARGE", int(rng.integers(1, 2000)))
        assert np.array_equal(resized(image, height, width, interpolation), whole(image, height, width, interpolation))


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000), (60_000, 3), (1, 200_000)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_thin_images_take_bounded_memory(shape, mode, monkeypatch):
    made = []

    def spy(image, height, width, interpolation):
        made.extend([image.shape[0] * image.shape[1], height * width])
        return resize_once(image, height, width, interpolation)

    resize_once = resize._interpolate
    monkeypatch.setattr(resize, "_interpolate", spy)
    transforms = ImageTransforms(size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_mode=mode)
    image = np.full((*shape, 3), 77, np.uint8)
    if mode == "border":
        assert (transforms.eval_transform(image)[110:114, 110:114] == 77).any()
    else:
        assert (transforms.eval_transform(image) == 77).all()
    assert max(made) <= 200_000 * 248
