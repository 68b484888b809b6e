"""The conclusions at the top of a page, for statistics with known properties."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_routing import spread, to

from moe_bsr.evaluation.ablation import Ablation
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.visualize import conclusions
from moe_bsr.visualize.conclusions import KeptPatches


def routed(**by_task) -> RoutingStatistics:
    statistics = RoutingStatistics(list(by_task), 4)
    for task, routing in by_task.items():
        statistics.add(task, routing)
    return statistics


EVEN = routed(a=spread(4, [0, 1, 2, 3]), b=spread(4, [0, 1, 2, 3]))
APART = routed(a=spread(4, [0, 1]), b=spread(4, [2, 3]))
COLLAPSED = routed(a=to(4, [2]), b=to(4, [2]))


def test_even_and_shared_use_is_stated_but_not_notable():
    load, tasks = conclusions.of_load({3: EVEN, 5: EVEN}), conclusions.of_tasks({3: EVEN, 5: EVEN})
    assert load.verdict == "Experts are used evenly." and "4.0 of 4 experts" in load.reasons and not load.notable
    assert tasks.verdict == "Tasks share the experts." and not tasks.notable


def test_collapse_and_separation_are_notable_and_their_blocks_named():
    load = conclusions.of_load({3: EVEN, 5: COLLAPSED})
    assert load.notable and load.verdict == "Experts are not used evenly in block 5." and "collapsed" in load.reasons
    tasks = conclusions.of_tasks({3: EVEN, 5: APART})
    assert tasks.notable and tasks.verdict == "Tasks use experts of their own."
    assert "Farthest apart are a and b, at block 5 (distance 1.00" in tasks.reasons


def test_a_single_task_has_no_conclusion_about_sharing():
    assert conclusions.of_tasks({3: routed(a=spread(4, [0, 1]))}) is None


def masked(lost: list[list[int]]) -> Ablation:
    images = np.full(len(lost), 200)
    return Ablation([f"task{i}" for i in range(len(lost))], images, images // 2, np.array(lost), 0 * np.array(lost))


def test_an_expert_matters_only_after_correction_for_multiple_tests():
    nothing = conclusions.of_ablation({3: masked([[6, 0, 1], [0, 2, 3]])})  # 6 of 6: p = 0.03, but in 6 tests
    assert not nothing.notable and nothing.verdict == "No expert matters by itself."
    assert "1 of the 6 cells below are bold" in nothing.reasons
    some = conclusions.of_ablation({3: masked([[6, 0, 1]]), 7: masked([[0, 40, 0]])})
    assert some.notable and some.reasons.startswith("Without expert 1 of block 7, task0 loses 20.0 points (")


def dropping(*kept: int) -> dict:
    """Return records of an image of 4 x 4 patches. After two drops, these patches and a fused token are left."""
    first, last = (
        SimpleNamespace(dropped=SimpleNamespace(origin=torch.tensor([o]))) for o in ([*range(16)], [*kept, -1])
    )
    return {1: first, 2: SimpleNamespace(dropped=None), 3: last}


@pytest.mark.parametrize(
    ("kept", "verdict", "notable"),
    [
        ((5, 6, 9, 10), "The drops keep the middle of the images.", True),
        ((0, 3, 12, 15), "The drops keep the border of the images.", True),
        (range(16), "The drops prefer neither the middle nor the border of the images.", False),
    ],
)
def test_the_part_that_the_drops_keep_is_named(kept, verdict, notable):
    patches = KeptPatches((4, 4))
    patches.add(dropping(*kept))
    claim = conclusions.of_drops({"a": patches})
    assert (claim.verdict, claim.notable) == (verdict, notable)
    assert claim.reasons.startswith(f"{100 * len(kept) / 16:.0f} % of the patches are left")


def test_there_is_no_conclusion_without_drops_or_for_tiny_grids():
    assert conclusions.of_drops({"a": KeptPatches((4, 4))}) is None
    small = KeptPatches((2, 2))
    small.add({1: SimpleNamespace(dropped=SimpleNamespace(origin=torch.tensor([[0]])))})
    assert conclusions.of_drops({"a": small}) is None
