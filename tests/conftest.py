"""One compute thread: the tests' tensors are tiny, and spinning threads would slow everything down.

Nothing that takes long is imported here: the process that starts the workers of pytest-xdist reads this file too.
"""

import gc
import os

import pytest

# The files that take longest, longest first. They start first: whichever came last would keep one process busy and
# the others idle.
LONG = (
    "predict cost_check campaigns interrupt cost several_processes fit trainer data_record probe_trainer benchmark "
    "feature_cache resume browser registries added_task callbacks views warm_start configs"
).split()


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """What is imported stays, 400,000 objects: nobody looks for garbage among them, neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(params=["fast", "reference"])
def kernels(request):
    """An oracle test with this fixture runs on the fast kernels and on their plain references."""
    from moe_bsr import ops

    if request.param == "fast":
        yield
    else:
        with ops.reference():
            yield


@pytest.fixture(scope="module")
def undrawn():
    """Runs draw no pictures, for tests of anything else: they take longer than everything else in a small run."""
    from moe_bsr.callbacks import expert_views, mistakes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_views, "drawing_due", lambda *arguments: False)
        patch.setattr(mistakes.MistakeViews, "on_end", lambda self, report: None)
        yield


@pytest.fixture(scope="module")
def light():
    """Runs do not predict their cost, nor wait for the disk, and each image of a generated task is drawn once."""
    from moe_bsr import api
    from moe_bsr.data.generated import Generated

    draw = Generated.image

    def drawn_once(source: Generated, index: int):
        """An image is a function of its stream (family or suite, split, seed) and its position."""
        key = source._stream, index, len(source)
        if key not in _drawn:
            _drawn[key] = draw(source, index)
        return _drawn[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_predict", lambda *arguments: None)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Generated, "image", drawn_once)
        yield


_drawn: dict = {}


@pytest.fixture(scope="module")
def bare(undrawn, light):
    """For tests of anything but what these two leave out."""
