"""A model whose routers have clear preferences, and noise images to evaluate it on."""

from types import SimpleNamespace

import numpy as np
from tiny_models import CLASSES, make_model, scale_routers

from moe_bsr.data import ImageTransforms
from moe_bsr.data.task import Split

PIPELINE = ImageTransforms(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), cache_mb=1)


class Noise:
    """Noise images of 16 x 16 pixels, seeded by their index."""

    names = sizes = None

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def make_data(task: str, count: int):
    labels = np.random.default_rng(count).integers(0, CLASSES[task], count)
    return SimpleNamespace(name=task, val=Split(Noise(), np.arange(count), labels))


def decided(kind: str = "class-token", **options):
    """Return a model with different experts and clear router preferences, so that masking changes answers."""
    model = make_model(kind, **{"init_noise": 2.0} | options)
    scale_routers(model, 60.0)
    return model.eval()
