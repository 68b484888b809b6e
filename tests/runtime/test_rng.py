"""Random streams by name: their values are fixed here, because every reported run depends on them."""

import torch

from moe_bsr.runtime.rng import generator, key, stream

KEY = 274283552224351205054867721726000739736
FIRST, AT_2_5, OF_TORCH = [321, 543, 248, 377], [331, 231, 56, 282], [671, 518, 945, 319]


def test_the_numbers_of_a_name_never_change():
    assert key(0, "shapes", "augment") == KEY
    assert stream(KEY).integers(0, 1000, 4).tolist() == FIRST
    assert stream(KEY, 2, 5).integers(0, 1000, 4).tolist() == AT_2_5
    assert torch.randint(0, 1000, (4,), generator=generator(0, "head", "shapes")).tolist() == OF_TORCH


def test_streams_differ_by_name_and_counter():
    names = [(1, "a"), (1, "b"), (2, "a"), ("a", 1)]
    assert len({key(*name) for name in names}) == len(names)
    draws = [stream(7, *counter).random() for counter in ((), (1,), (0, 1), (1, 1), (2,))]
    assert len(set(draws)) == len(draws)
