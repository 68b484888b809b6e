"""Fixtures and test order. torch uses one thread: the tensors are tiny, and busy-waiting threads slow all tests down.

This module imports nothing slow, because the controller of pytest-xdist reads it too.
"""

import gc

import cheap
import pytest

# The test files that take the most CPU time, longest first. They start first, so that no worker runs a long file at the
# end while the others are idle.
LONG = (
    "predict registries campaigns fit cost_check plans expert_views interrupt cost network warm_start feature_cache "
    "browser bundle folder resume trainer added_task views contents data_record probe_trainer several_processes tables "
    "compare_methods benchmark length multitask weights_files load step_in_backward callbacks share export "
    "positive_control reproduce layers ordinary budgets mezo state experts"
).split()


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    order = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Exclude the 400,000 objects that imports create from all garbage collections."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(params=["fast", "reference"])
def kernels(request):
    """Run a test on the fast kernels and on their plain references."""
    from moe_bsr import ops

    if request.param == "fast":
        yield
    else:
        with ops.reference():
            yield


@pytest.fixture(scope="module")
def undrawn():
    """Runs draw no pictures: see `cheap.undrawn`."""
    with cheap.undrawn():
        yield


@pytest.fixture(scope="module")
def light():
    """Runs predict no cost, do not wait for the disk and draw each image once: see `cheap.light`."""
    with cheap.light():
        yield


@pytest.fixture(scope="module")
def bare(undrawn, light):
    """Combine `undrawn` and `light`, for tests of other parts."""
