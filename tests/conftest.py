"""One compute thread: the tests' tensors are tiny, and spinning threads would slow everything down."""

import pytest
import torch

from moe_bsr import api, ops
from moe_bsr.callbacks import expert_views, mistakes

torch.set_num_threads(1)

# Files of few, long tests. They start first: whichever came last would keep one process busy and the others idle.
LONG = "campaigns resume wheel browser benchmark reproduce streams interrupt data_record sweep".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


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
def bare(undrawn):
    """Nor do they predict their cost, which takes as long as a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_predict", lambda *arguments: None)
        yield
