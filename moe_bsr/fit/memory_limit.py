"""Fit a run into a memory: choose its storage, number of micro-batches and caches."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.schema import AUGMENT_KEYS, DataConfig
from moe_bsr.cost.predict import evaluation_peak, predict
from moe_bsr.model.multitask import build_on_meta

STORAGES = ("exact", "int8", "recompute", "recompute_int8")  # from the fastest to the leanest
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LEAST_IMAGE_CACHE = 16  # MB
# What a run needs beyond the memory of a process that has not trained yet: libraries that load on first use,
# checkpoints, and freed memory that the heap keeps. 47 and 69 MB were measured in two runs.
SPARE = 70 * 2**20
PLAIN = {key: DataConfig.__dataclass_fields__[key].default for key in (*AUGMENT_KEYS, "views")}


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process, in bytes.

    Attributes:
        limit: the most it may use. base: use without a model: libraries and data, on a CPU also `SPARE`.
        reason: where the limit comes from.
    """

    limit: int
    base: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """A configuration that fits.

    Attributes:
        bytes: predicted peak of the whole process, caches included. left: bytes up to the limit.
    """

    config: Config
    bytes: int
    left: int


def fitted(config: Config, classes: dict[str, int], memory: Memory, precision: str, decoded: int) -> Fitted:
    """Return the fastest form of a run that fits.

    Storages are tried from the fastest to the leanest, each in ever more micro-batches.

    Args:
        classes: number of classes by task.
        decoded: bytes of all decoded images. Their cache gets at most half of the remaining memory.

    Raises:
        ConfigError: no form fits.
    """
    least, evaluation = None, evaluation_peak(build_on_meta(config, classes), config, precision)
    for candidate in _forms(config):
        model = build_on_meta(candidate, classes)
        micro_batch = candidate.train.batch_size // candidate.train.grad_accumulation_steps
        cost = predict(model, candidate, batch=micro_batch, precision=precision, all_tasks=True)
        always = cost.parameters + cost.optimizer + cost.average  # an evaluation runs beside them
        needed = memory.base + max(cost.peak, always + evaluation)
        if config.data.feature_cache_dir is None:
            needed += (config.data.feature_cache_mb or 0) * 10**6
        wanted = min(config.data.image_cache_mb, ceil(decoded / 1e6))
        images = min(wanted, (memory.limit - needed) // 2 // 10**6)
        if images >= min(LEAST_IMAGE_CACHE, wanted):
            left = memory.limit - needed - images * 10**6
            return Fitted(configuration.replace(candidate, data__image_cache_mb=images), needed + images * 10**6, left)
        least = min(needed, least or needed)
    raise ConfigError(
        f"memory: {memory.limit / 2**20:.0f} MB ({memory.reason}), but this run needs at least "
        f"{ceil(least / 2**20) + 16} MB, {memory.base / 2**20:.0f} of them for libraries; allow more memory, or choose "
        "a smaller backbone.name"
    )


def _forms(config: Config) -> Iterator[Config]:
    own = [config.storage] if config.storage != "exact" else []
    frozen = config.train.optimizer == "lbfgs"
    for storage in own or (STORAGES[:1] if frozen else STORAGES):
        for parts in MICRO_BATCHES[:1] if frozen else MICRO_BATCHES:
            with contextlib.suppress(ConfigError):  # a batch that cannot be split in this way
                yield configuration.replace(config, storage=storage, train__grad_accumulation_steps=parts)


def with_feature_cache(config: Config, available: int, images: int, tokens: int, width: int, itemsize: int) -> Config:
    """Return the run with a cache of the frozen blocks' features of unaugmented images, if it fits.

    The run is returned unchanged if it mixes images, which leaves nothing to cache, or if its configuration sets
    augmentations, which a cache would disable.

    Args:
        config: trains a list of blocks. available: bytes for the cache. images: training images of all tasks.
        tokens, width: size of the features where the first block trains. itemsize: bytes of one value.
    """
    read = sum(index < min(config.plan.train_blocks) for index in config.plan.head_blocks)
    each = tokens * 8 + read * width * itemsize  # origins, and class tokens for the heads
    sizes = {"exact": tokens * width * itemsize + each, "int8": tokens * width + 4 * width + each}
    fits = [kind for kind, size in sizes.items() if 1.02 * images * size <= available]
    own = any(getattr(config.data, key) != default for key, default in PLAIN.items())
    if not fits or own or config.train.mixup or config.train.cutmix:
        return config
    seen = {"data__augment": False, "data__crop_scale": None, "data__hflip": None}
    megabytes = ceil(1.02 * images * sizes[fits[0]] / 1e6)
    return configuration.replace(config, data__feature_cache_mb=megabytes, data__feature_cache=fits[0], **seen)
