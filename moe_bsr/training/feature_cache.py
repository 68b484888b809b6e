"""Outputs of the frozen blocks before the gradient path, kept for all training images and computed once.

Without augmentation an image comes back the same in every epoch, and so does what the frozen blocks make
of it: from an image's second epoch on, neither is it decoded nor do these blocks run.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from math import ceil

import numpy as np
import torch
from torch import Tensor

from moe_bsr.config import require
from moe_bsr.data import Loader
from moe_bsr.data.loader import Batch
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Dropped, Tokens
from moe_bsr.training.inputs import Inputs

Features = tuple[Tokens, dict[int, Record]]


class FeatureCache:
    """What `MultitaskViT.forward_features` returns for each training image of each task.

    Attributes:
        bytes: of everything kept, when every image has been seen.
    """

    def __init__(self, model: MultitaskViT, sizes: dict[str, int], megabytes: int) -> None:
        """
        Args:
            model: on its device, under the autocast it will run in. sizes: training images of each task.
            megabytes: of 10**6 bytes, that may be used.
        Raises:
            ConfigError: they are not enough for all images, or nothing before the gradient path stays the same.
        """
        require(
            not model.embedding_trains,
            "data.feature_cache_mb",
            megabytes,
            "null (off): the embedding trains under this plan, so nothing stays the same",
        )
        self.model = model
        # After the last block the head reads the class token alone.
        self.class_token_only = model.path_start == len(model.plan) and model.vit.global_pool == "token"
        side, device = model.vit.patch_embed.img_size[0], model.vit.pos_embed.device
        with torch.no_grad():
            tokens, records = model.forward_features(torch.zeros(1, 3, side, side, device=device))
        self.fused, self.drops = tokens.fused, sorted(records)
        parts = list(self._parts(tokens, records))
        self.bytes = sum(sizes.values()) * sum(p[0].numel() * p.element_size() for p in parts)
        require(
            self.bytes <= megabytes * 1e6,
            "data.feature_cache_mb",
            megabytes,
            f"at least {ceil(self.bytes / 1e6)}, for {sum(sizes.values())} images of "
            f"{parts[0].shape[1]} tokens, or null to run the frozen blocks every time",
        )
        self.kept = {task: [p.new_empty(count, *p.shape[1:]) for p in parts] for task, count in sizes.items()}
        self.seen = {task: torch.zeros(count, dtype=torch.bool) for task, count in sizes.items()}

    def __str__(self) -> str:
        images, blocks = sum(map(len, self.seen.values())), self.model.path_start
        source = f"blocks 0 to {blocks - 1} make" if blocks else "the embedding makes"
        return (
            f"{self.bytes / 1e6:.0f} MB for what {source} of {images} training images, from an image's second "
            "epoch on not computed again"
        )

    def contains(self, task: str, positions: np.ndarray) -> bool:
        """Whether the features of all these images of the task's training split are here."""
        return bool(self.seen[task][torch.from_numpy(positions)].all())

    def get(self, task: str, positions: np.ndarray) -> Features:
        """The features of images that the cache contains, as `forward_features` returned them."""
        places = torch.from_numpy(positions)
        x, origin, *rest = (kept[places.to(kept.device)] for kept in self.kept[task])
        drops = zip(rest[0::3], rest[1::3], rest[2::3], strict=True)
        records = {i: Record(dropped=Dropped(*drop)) for i, drop in zip(self.drops, drops, strict=True)}
        return Tokens(x, origin, self.fused), records

    def add(self, task: str, positions: np.ndarray, features: Features) -> None:
        """Keep the features of these images."""
        places = torch.from_numpy(positions)
        for kept, part in zip(self.kept[task], self._parts(*features), strict=True):
            kept[places.to(kept.device)] = part
        self.seen[task][places] = True

    def _parts(self, tokens: Tokens, records: dict[int, Record]) -> Iterator[Tensor]:
        """All of the features that has a row for each image."""
        yield tokens.x[:, :1] if self.class_token_only else tokens.x
        yield tokens.origin
        for index in self.drops:
            dropped = records[index].dropped
            yield from (dropped.origin_in, dropped.origin, dropped.scores)


class CachedInputs(Inputs):
    """Feeds features in place of images: from the cache, or into it when an image is new."""

    def __init__(self, inputs: Inputs, cache: FeatureCache) -> None:
        super().__init__(inputs.tasks, inputs.transforms, inputs.runtime, inputs.prefetch)
        self.cache = cache

    def batches(self, plan: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        return iter(Loader(self.tasks, self.transforms, plan, self.prefetch, self.cache.contains))

    def prepare(self, batch: Batch) -> Batch:
        task, positions = batch.task, batch.positions
        if self.cache.contains(task, positions):
            features, labels = self.cache.get(task, positions), batch.labels.to(self.runtime.device)
        else:
            prepared = super().prepare(batch)
            with self.runtime.autocast():
                features, labels = self.cache.model.forward_features(prepared.images, task), prepared.labels
            self.cache.add(task, positions, features)
        return dataclasses.replace(batch, images=None, labels=labels, features=features)

    def cached_bytes(self) -> int:
        return super().cached_bytes() + self.cache.bytes

    def keeps_all(self) -> bool:
        return True

    def summary(self) -> list[str]:
        return [str(self.cache)]
