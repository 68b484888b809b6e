"""Test the multitask sampler against slow, simple references, and that it has no state."""

from collections import Counter
from fractions import Fraction
from itertools import zip_longest

import numpy as np
import pytest

from moe_bsr.config import SamplerConfig
from moe_bsr.data.sampler import WINDOW, MultitaskSampler

SIZES = {"big": 331, "small": 7, "middle": 50}
KINDS = ["round_robin", "proportional", "temperature", "joint", "exhaust"]
FIVE = {"cifar10": 50000, "cifar100": 50000, "pets": 3680, "flowers": 1020, "food": 75750}


def make(kind: str, *, sizes=SIZES, batch_size=12, steps=450, seed=3, temperature=2.0) -> MultitaskSampler:
    return MultitaskSampler(sizes, batch_size, steps, SamplerConfig(kind=kind, temperature=temperature), seed)


def order(sampler: MultitaskSampler) -> list[str]:
    return [task for step in range(sampler.steps) for task in sampler.tasks(step)]


def plain(batches) -> list[tuple[str, list[int], list[int]]]:
    return [(task, positions.tolist(), epochs.tolist()) for task, positions, epochs in batches]


# --- which task ---


def test_round_robin_takes_turns():
    names = list(SIZES)
    assert order(make("round_robin")) == [names[step % 3] for step in range(450)]


def test_joint_updates_contain_every_task_once():
    sampler = make("joint", steps=20)
    assert [sampler.tasks(step) for step in range(20)] == [list(SIZES)] * 20


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "joint"])
def test_updates_of_other_samplers_have_one_task(kind):
    sampler = make(kind)
    assert all(len(sampler.tasks(step)) == 1 for step in range(sampler.steps))


def paper_order(batches: dict[str, int], steps: int) -> list[str]:
    taken: list[str] = []
    while len(taken) < steps:
        for turn in zip_longest(*([task] * count for task, count in batches.items())):
            taken += [task for task in turn if task is not None]
    return taken[:steps]


@pytest.mark.parametrize("batch_size", [1, 12, 50, 400])
def test_the_order_of_the_paper_is_zip_longest_over_loaders(batch_size):
    batches = {task: -(-size // batch_size) for task, size in SIZES.items()}
    sampler = make("exhaust", batch_size=batch_size, steps=1000)
    assert order(sampler) == paper_order(batches, 1000)


def test_the_order_of_the_paper_gives_the_published_numbers_of_updates():
    """8000 rounds of its loop: 112 updates of Flowers, 406 of Pets, 5387 of each CIFAR, 8000 of Food.

    A round is one turn of zip_longest. An epoch has 592 rounds (Food) and 391 + 391 + 29 + 8 + 592 = 1411 updates; 8000
    rounds are 13 epochs and 304 rounds, 13 x 1411 + 3 x 304 + 29 + 8 = 19292 updates.
    """
    sampler = make("exhaust", sizes=FIVE, batch_size=128, steps=19292)
    updates = {task: counts["updates"] for task, counts in sampler.progress(19292).items()}
    assert updates == {"cifar10": 5387, "cifar100": 5387, "pets": 406, "flowers": 112, "food": 8000}
    # Flowers occurs in the first 8 rounds of an epoch. The last 201 rounds have only Food.
    epoch = order(sampler)[:1411]
    assert [i for i, task in enumerate(epoch) if task == "flowers"] == [5 * turn + 3 for turn in range(8)]
    assert epoch[-204:] == ["cifar10", "cifar100", "food"] + ["food"] * 201


def quotas(weights: list[Fraction], steps: int) -> list[list[int]]:
    """Return the updates per window and task: largest remainders, with deficits carried over to the next window."""
    given, windows = [0] * len(weights), []
    for start in range(0, steps, WINDOW):
        end = min(start + WINDOW, steps)
        due = [end * weight / sum(weights) - had for weight, had in zip(weights, given, strict=True)]
        seats = [max(0, int(d // 1)) for d in due]
        while sum(seats) < end - start:
            owed = [d - seat for d, seat in zip(due, seats, strict=True)]
            seats[owed.index(max(owed))] += 1
        given = [had + seat for had, seat in zip(given, seats, strict=True)]
        windows.append(seats)
    return windows


RATES = {
    "proportional": ("proportional", 2.0, [Fraction(size) for size in SIZES.values()]),
    "temperature 1": ("temperature", 1.0, [Fraction(size) for size in SIZES.values()]),
    "temperature 2": ("temperature", 2.0, [Fraction(size**0.5) for size in SIZES.values()]),
    "temperature 1/2": ("temperature", 0.5, [Fraction(size**2) for size in SIZES.values()]),
}


@pytest.mark.parametrize("case", RATES)
def test_windows_of_a_hundred_fill_their_quotas(case):
    kind, temperature, weights = RATES[case]
    taken = order(make(kind, temperature=temperature, steps=1250))
    windows = [taken[start : start + WINDOW] for start in range(0, 1250, WINDOW)]
    assert [len(window) for window in windows] == [100] * 12 + [50]
    counts = [[Counter(window)[task] for task in SIZES] for window in windows]
    assert counts == quotas(weights, 1250)


@pytest.mark.parametrize("case", RATES)
def test_shares_are_within_one_update_after_every_window(case):
    kind, temperature, weights = RATES[case]
    sampler = make(kind, temperature=temperature, steps=5000)
    for step in range(WINDOW, 5001, WINDOW):
        updates = [counts["updates"] for counts in sampler.progress(step).values()]
        wanted = [step * weight / sum(weights) for weight in weights]
        assert all(abs(u - w) < 1 for u, w in zip(updates, wanted, strict=True))


def test_extreme_temperatures_give_only_the_largest_task_or_uniform_shares():
    assert set(order(make("temperature", temperature=1e-3))) == {"big"}
    assert Counter(order(make("temperature", temperature=1e6))) == dict.fromkeys(SIZES, 150)


@pytest.mark.parametrize("kind", ["proportional", "temperature"])
def test_windows_of_equal_quotas_are_shuffled_differently_for_each_seed(kind):
    windows = []
    for seed in (3, 4):
        taken = order(make(kind, sizes={"a": 30, "b": 10}, temperature=1.0, steps=400, seed=seed))
        windows += [tuple(taken[start : start + WINDOW]) for start in range(0, 400, WINDOW)]
    assert {window.count("a") for window in windows} == {75} and len(set(windows)) == 8
    assert order(make(kind)) == order(make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_run_begins_like_a_shorter_one_of_whole_windows(kind):
    shorter, longer = make(kind, steps=200), make(kind, steps=450)
    assert plain(shorter.batches()) == plain(longer.batches())[: len(order(shorter))]


# --- which images ---


@pytest.mark.parametrize("batch_size", [1, 12, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_of_a_task_is_a_new_permutation(kind, batch_size):
    """A batch of 12 is larger than `small`, and a batch of 50 spans eight of its epochs."""
    visits = {task: ([], []) for task in SIZES}
    for task, positions, epochs in make(kind, batch_size=batch_size).batches():
        assert positions.shape == epochs.shape == (batch_size,)
        assert positions.dtype == epochs.dtype == np.int64
        visits[task][0].extend(positions.tolist())
        visits[task][1].extend(epochs.tolist())
    for task, (positions, epochs) in visits.items():
        size = SIZES[task]
        assert epochs == [i // size for i in range(len(epochs))]
        whole = [positions[i : i + size] for i in range(0, len(positions) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        if size > 7:  # two epochs of only 7 images may have the same order by chance
            assert len(set(map(tuple, whole))) == len(whole)
        rest = positions[len(whole) * size :]
        assert len(set(rest)) == len(rest) and set(rest) <= set(range(size))


def test_permutations_differ_between_tasks_and_seeds():
    first = make("round_robin", sizes={"a": 40, "b": 40})
    again = make("round_robin", sizes={"a": 40, "b": 40}, seed=4)
    batches = [sampler.batch(task, 0)[0].tolist() for sampler in (first, again) for task in "ab"]
    assert len(set(map(tuple, batches))) == 4


def test_permutations_do_not_depend_on_the_other_tasks():
    few = make("round_robin")
    more = make("proportional", sizes={"new": 80, **dict(reversed(SIZES.items()))})
    for task in SIZES:
        for visit in (0, 1, 9, 40):
            ours, theirs = few.batch(task, visit), more.batch(task, visit)
            assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])


# --- no state ---


@pytest.mark.parametrize("kind", KINDS)
def test_batches_from_a_later_start_equal_the_rest_of_all_batches(kind):
    every = plain(make(kind, steps=130).batches())
    each = len(every) // 130
    for start in (0, 1, 37, 100, 129, 130):
        assert plain(make(kind, steps=130).batches(start)) == every[start * each :]


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_the_batches(kind):
    sampler, counted = make(kind, steps=130), Counter()
    batches = sampler.batches()
    for step in range(131):
        progress = sampler.progress(step)
        assert list(progress) == list(SIZES)
        for task, size in SIZES.items():
            assert progress[task] == {
                "updates": counted[task],
                "images": 12 * counted[task],
                "epochs": 12 * counted[task] / size,
            }
        if step < 130:
            counted.update(next(batches)[0] for _ in sampler.tasks(step))


# --- classes ---


LABELS = {"big": np.repeat([0, 1, 2], [300, 30, 1]), "small": np.array([0, 0, 0, 0, 1, 1, 2])}


def balanced(steps=400, batch_size=5, seed=3) -> MultitaskSampler:
    sizes = {task: len(labels) for task, labels in LABELS.items()}
    return MultitaskSampler(sizes, batch_size, steps, SamplerConfig(classes="balanced"), seed, labels=LABELS)


def test_balanced_classes_have_equal_counts_and_visit_all_images_before_repeating():
    sampler = balanced()
    for task, labels in LABELS.items():
        drawn = [sampler.batch(task, visit) for visit in range(200)]
        positions, times = (np.concatenate(part) for part in zip(*drawn, strict=True))
        size = len(labels)
        for epoch in range(1000 // size):
            counts = np.bincount(labels[positions[epoch * size : (epoch + 1) * size]], minlength=3)
            assert counts.max() - counts.min() <= 1
        whole = np.bincount(labels[positions[: 1000 // size * size]], minlength=3)
        assert whole.max() - whole.min() <= 1  # left-over images rotate among the classes
        assert len(set(zip(positions.tolist(), times.tolist(), strict=True))) == 1000
        for label in range(3):
            mine = times[: 1000 // size * size][labels[positions[: 1000 // size * size]] == label]
            assert (np.bincount(mine)[:-1] == (labels == label).sum()).all()


def test_balanced_batches_depend_only_on_seed_and_visit():
    sampler, other = balanced(), balanced(seed=4)
    late = sampler.batch("big", 150)
    for ours, theirs in zip(late, balanced().batch("big", 150), strict=True):
        assert np.array_equal(ours, theirs)
    assert not np.array_equal(late[0], other.batch("big", 150)[0])


@pytest.mark.parametrize("kind", ["round_robin", "temperature"])
def test_memory_hardly_grows_with_the_number_of_tasks(kind):
    def kept(tasks: int) -> int:
        sizes = {f"t{n}": 50 + n for n in range(tasks)}
        sampler = MultitaskSampler(sizes, 8, 20_000, SamplerConfig(kind=kind), 0)
        assert sampler.progress(20_000)["t1"]["updates"] == sum(sampler.tasks(s) == ["t1"] for s in range(20_000))
        return sum(value.nbytes for value in vars(sampler).values() if isinstance(value, np.ndarray))

    assert kept(200) < 1.5 * kept(2)
