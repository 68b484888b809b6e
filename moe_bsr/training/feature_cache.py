"""Outputs of the frozen blocks before the gradient path, kept for all training images and computed once.

Without augmentation an image comes back the same in every epoch, and so does what the frozen blocks make
of it: from an image's second epoch on, neither it nor these blocks are looked at again.
"""

from collections.abc import Iterator
from math import ceil

import numpy as np
import torch
from torch import Tensor

from moe_bsr.config import require
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Dropped, Tokens

Stem = tuple[Tokens, dict[int, Record]]


class FeatureCache:
    """What `MultitaskViT.stem` returns for each training image of each task.

    Attributes:
        bytes: of everything kept, when every image has been seen.
    """

    def __init__(self, model: MultitaskViT, sizes: dict[str, int], megabytes: int) -> None:
        """
        Args:
            model: on its device, under the autocast it will run in. sizes: training images of each task.
            megabytes: of 10**6 bytes, that may be used.
        Raises:
            ConfigError: they are not enough for all images, or there is no stem that stays the same.
        """
        require(
            not model.embedding_trains,
            "data.feature_cache_mb",
            megabytes,
            "0: the embedding trains under this plan, so nothing stays the same",
        )
        self.model = model
        # Only the class token of the last block is looked at.
        self.narrow = model.path_start == len(model.plan) and model.vit.global_pool == "token"
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
            f"{parts[0].shape[1]} tokens, or 0 to run the frozen blocks every time",
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

    def know(self, task: str, positions: np.ndarray) -> bool:
        """Whether all these images of the task's training split were seen before."""
        return bool(self.seen[task][torch.from_numpy(positions)].all())

    def of(self, images: Tensor | None, task: str, positions: np.ndarray) -> Stem:
        """The stem of training images: of all from memory, or if one is new of all from `images`.

        Args:
            images: (B, 3, S, S) normalized; may be None if they are known.
        """
        known, places = self.know(task, positions), torch.from_numpy(positions)
        if not known:
            tokens, records = self.model.forward_features(images, task)
            for kept, part in zip(self.kept[task], self._parts(tokens, records), strict=True):
                kept[places.to(kept.device)] = part
            self.seen[task][places] = True
            return tokens, records
        x, origin, *rest = (kept[places.to(kept.device)] for kept in self.kept[task])
        drops = zip(rest[0::3], rest[1::3], rest[2::3], strict=True)
        records = {i: Record(dropped=Dropped(*drop)) for i, drop in zip(self.drops, drops, strict=True)}
        return Tokens(x, origin, self.fused), records

    def _parts(self, tokens: Tokens, records: dict[int, Record]) -> Iterator[Tensor]:
        """Everything in a stem that has a row for each image."""
        yield tokens.x[:, :1] if self.narrow else tokens.x
        yield tokens.origin
        for index in self.drops:
            dropped = records[index].dropped
            yield from (dropped.origin_in, dropped.origin, dropped.scores)
