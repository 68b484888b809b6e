"""The multitask sampler: which task at which step, and which images at which visit.

Stateless: everything is a function of the seed and the step, so a resumed run needs no sampler state.
One batch is one task. Visit v of a task takes positions v*B to (v+1)*B of its concatenated per-epoch
permutations: always a full batch, nothing skipped, short datasets cycle.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_bsr.config import SamplerConfig
from moe_bsr.config.registry import Registry
from moe_bsr.runtime.rng import key, stream

WINDOW = 100  # updates over which proportional and temperature sampling fill their quotas
COUNTED = 1000  # updates after which visits are counted anew: so much is kept of them, whatever the number of tasks


@dataclass(frozen=True, slots=True)
class Request:
    """What a sampler makes its schedule for: `sizes` are the tasks' training images, in the order of round-robin."""

    sizes: list[int]
    batch_size: int
    steps: int
    seed: int
    config: SamplerConfig


# A sampler is a function Request -> (steps, K): the places of the K tasks that each update visits, in rising order.
SAMPLERS: Registry[Callable[[Request], np.ndarray]] = Registry("sampler.kind")


class MultitaskSampler:
    """Schedule of a whole run.

    Args:
        sizes: number of training images by task, in the order of round-robin.
        steps: optimizer updates of the run.
        earlier: (step, steps): up to the update `step` the run was to have `steps`. It keeps the order of that time,
            for an order that fills quotas depends on where it ends.
        labels: int64 (images,) by task; what `sampler.classes: balanced` needs to know.
    Raises:
        ConfigError: `sampler.kind` is not one of `SAMPLERS`.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        batch_size: int,
        steps: int,
        config: SamplerConfig,
        seed: int,
        earlier: Sequence[tuple[int, int]] = (),
        labels: dict[str, np.ndarray] | None = None,
    ) -> None:
        schedule = SAMPLERS[SAMPLERS.choose(config.kind).kind]
        self.sizes, self.batch_size, self.steps, self.seed = dict(sizes), batch_size, steps, seed
        self.names = list(sizes)
        self._balances = config.classes == "balanced"
        self._by_class = {
            task: [np.flatnonzero(of == label) for label in np.unique(of)]
            for task, of in (labels or {}).items()
            if self._balances
        }
        parts, start = [], 0
        for end, planned in (*earlier, (steps, steps)):
            parts.append(schedule(Request(list(sizes.values()), batch_size, planned, seed, config))[start:end])
            start = end
        self._order = np.concatenate(parts).astype(np.int32, copy=False)
        blocks = [self._order[at : at + COUNTED].ravel() for at in range(0, steps, COUNTED)]
        counts = [np.bincount(block, minlength=len(sizes)) for block in blocks]
        self._counts = np.cumsum([np.zeros(len(sizes), np.int64), *counts], 0)  # before each COUNTED updates

    def tasks(self, step: int) -> list[str]:
        """The tasks of update `step` (from 0): one, or all of them when sampling jointly."""
        return [self.names[place] for place in self._order[step]]

    def batch(self, task: str, visit: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the task's training split and their epochs, each (B,) int64.

        With balanced classes, an image's epoch is how often it was drawn before: small classes are ahead of large ones.
        """
        size = self.sizes[task]
        flat = np.arange(visit * self.batch_size, (visit + 1) * self.batch_size)
        epochs = flat // size
        if self._balances:
            drawn = [self._balanced(task, epoch)[:, flat[epochs == epoch] % size] for epoch in np.unique(epochs)]
            positions, times = np.concatenate(drawn, 1)
            return positions, times
        positions = np.concatenate(
            [self._permutation(task, epoch)[flat[epochs == epoch] % size] for epoch in np.unique(epochs)]
        )
        return positions, epochs

    def batches(self, start: int = 0) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(task, positions, epochs) of every batch from update `start` on, in order."""
        visits = self._visits(start)
        for step in range(start, self.steps):
            for place in self._order[step]:
                yield self.names[place], *self.batch(self.names[place], int(visits[place]))
                visits[place] += 1

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """Updates, images and epochs of each task in the first `step` updates."""
        counts = {}
        for name, updates in zip(self.names, self._visits(step).tolist(), strict=True):
            images = updates * self.batch_size
            counts[name] = {"updates": updates, "images": images, "epochs": images / self.sizes[name]}
        return counts

    def _visits(self, step: int) -> np.ndarray:
        """Visits of each task in the first `step` updates: int64 (tasks,)."""
        block = step // COUNTED
        rest = self._order[block * COUNTED : step].ravel()
        return self._counts[block] + np.bincount(rest, minlength=len(self.names))

    @lru_cache(maxsize=64)  # noqa: B019  (one sampler lives as long as the run)
    def _permutation(self, task: str, epoch: int) -> np.ndarray:
        return stream(key(self.seed, task, "order"), int(epoch)).permutation(self.sizes[task])

    @lru_cache(maxsize=64)  # noqa: B019
    def _balanced(self, task: str, epoch: int) -> np.ndarray:
        """As many draws as the task has images, every class alike often: (2, images), positions and times before.

        What a class cannot share out evenly goes in turn from class to class, over all epochs. A class goes through its
        images in a new order each time.
        """
        classes, size = self._by_class[task], self.sizes[task]
        order, count = key(self.seed, task, "balanced order"), len(classes)
        # Draws of class c before epoch e: those of the first e * size turns, which go around the classes.
        before, after = ((turns * size - np.arange(count) + count - 1) // count for turns in (epoch, epoch + 1))
        drawn = []
        for label, places in enumerate(classes):
            draws = np.arange(before[label], after[label])
            times = draws // len(places)
            passes = [places[self._pass(task, label, n)][draws[times == n] % len(places)] for n in np.unique(times)]
            drawn.append(np.stack([np.concatenate(passes), times]))
        return np.concatenate(drawn, 1)[:, stream(order, int(epoch)).permutation(size)]

    def _pass(self, task: str, label: int, number: int) -> np.ndarray:
        name = key(self.seed, task, "balanced class", label)
        return stream(name, int(number)).permutation(len(self._by_class[task][label]))


@SAMPLERS.register("joint")
def joint(request: Request) -> np.ndarray:
    """Every task in every update."""
    return np.broadcast_to(np.arange(len(request.sizes)), (request.steps, len(request.sizes)))


@SAMPLERS.register("round_robin")
def round_robin(request: Request) -> np.ndarray:
    """One task after the other."""
    return _one(np.arange(request.steps) % len(request.sizes))


@SAMPLERS.register("proportional")
def proportional(request: Request) -> np.ndarray:
    """Each task as often as it has images."""
    return _by_temperature(request, 1.0)


@SAMPLERS.register("temperature")
def temperature(request: Request) -> np.ndarray:
    """Each task in proportion to sizes^(1 / sampler.temperature)."""
    return _by_temperature(request, request.config.temperature)


@SAMPLERS.register("exhaust")
def exhaust(request: Request) -> np.ndarray:
    """Round-robin in which exhausted loaders are skipped until the longest ends (the paper's order)."""
    batches = [-(-size // request.batch_size) for size in request.sizes]
    epoch = [task for turn in range(max(batches)) for task, n in enumerate(batches) if turn < n]
    return _one(np.resize(np.array(epoch), request.steps))


def _one(order: np.ndarray) -> np.ndarray:
    """Updates of one task each, (steps,) places, as (steps, 1) in the type that is kept."""
    return order.astype(np.int32)[:, None]


def _by_temperature(request: Request, temperature: float) -> np.ndarray:
    # In logarithms: sizes^(1/T) overflows at small T.
    scaled = np.log(request.sizes) / temperature
    rates = np.exp(scaled - scaled.max())
    return _one(_by_quota(rates / rates.sum(), request.steps, request.seed))


def _by_quota(rates: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Index of each update's task, (steps,).

    Each window holds its share of every task (largest remainder, carried on), shuffled by the seed.
    """
    order, given = [], np.zeros(len(rates), np.int64)
    for window, start in enumerate(range(0, steps, WINDOW)):
        end = min(start + WINDOW, steps)
        due = rates * end - given
        quota = np.maximum(np.floor(due), 0).astype(np.int64)
        missing = (end - start) - quota.sum()
        quota[np.argsort(quota - due, kind="stable")[:missing]] += 1
        given += quota
        order.append(stream(key(seed, "windows"), window).permutation(np.repeat(np.arange(len(rates)), quota)))
    return np.concatenate(order)
