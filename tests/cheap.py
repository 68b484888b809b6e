"""Context managers that skip slow parts of a run (pictures, cost prediction, fsync) in tests of other parts."""

import contextlib
import os
from collections.abc import Iterator

import pytest

_drawn: dict = {}  # images of generated tasks, by stream, index and number of images


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Context in which runs draw no pictures."""
    from moe_bsr.callbacks import expert_views, mistakes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_views, "drawing_due", lambda *arguments: False)
        patch.setattr(mistakes.MistakeViews, "on_end", lambda self, report: None)
        yield


@contextlib.contextmanager
def light() -> Iterator[None]:
    """Context in which runs predict no cost, skip fsync and draw each image of a generated task only once."""
    from moe_bsr import api
    from moe_bsr.data.generated import Generated

    draw = Generated.image

    def drawn_once(source: Generated, index: int):
        """Return a cached image. It depends only on its stream (family or suite, split, seed) and its position."""
        key = source._stream, index, len(source)
        if key not in _drawn:
            _drawn[key] = draw(source, index)
        return _drawn[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_predict", lambda *arguments: None)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Generated, "image", drawn_once)
        yield
