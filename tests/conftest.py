"""One compute thread: the tests' tensors are tiny, and spinning threads would slow everything down."""

import gc
import os

import pytest
import torch

from moe_bsr import api, ops
from moe_bsr.callbacks import expert_views, mistakes
from moe_bsr.data.generated import Generated

torch.set_num_threads(1)

# Files of few, long tests. They start first: whichever came last would keep one process busy and the others idle.
LONG = "campaigns fit interrupt browser benchmark sweep configs predict cost registries warm_start data_record".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish():
    """What was imported stays: each full collection of garbage would walk through its 400,000 objects, for 0.5 s."""
    gc.freeze()


@pytest.fixture(params=["fast", "reference"])
def kernels(request):
    """An oracle test with this fixture runs on the fast kernels and on their plain references."""
    if request.param == "fast":
        yield
    else:
        with ops.reference():
            yield


@pytest.fixture(scope="module")
def undrawn():
    """Runs draw no pictures, for tests of anything else: they take longer than everything else in a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_views, "drawing_due", lambda *arguments: False)
        patch.setattr(mistakes.MistakeViews, "on_end", lambda self, report: None)
        yield


@pytest.fixture(scope="module")
def light():
    """Runs do not predict their cost, nor wait for the disk, and each image of a generated task is drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_predict", lambda *arguments: None)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Generated, "image", _drawn_once)
        yield


@pytest.fixture(scope="module")
def bare(undrawn, light):
    """For tests of anything but what these two leave out."""


_draw, _drawn = Generated.image, {}


def _drawn_once(source: Generated, index: int):
    """An image is a function of its stream (family or suite, split, seed) and its position."""
    key = source._stream, index, len(source)
    if key not in _drawn:
        _drawn[key] = _draw(source, index)
    return _drawn[key].copy()
