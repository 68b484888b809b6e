"""Parts of the hostile cases: a task of images, a configuration, encoded images, and a pickle that runs a command."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_bsr.selftest import tiny

# A name, and a function that writes the files of the case into a folder and returns the command line to run there.
Case = tuple[str, Callable[[Path], list[str]]]
Content = bytes | Callable[[], bytes]  # content of a file, or a function that makes it when the case is tried


class Payload:
    """Object whose unpickling writes the file `executed`."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


def made(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def override_case(override: str) -> Callable[[Path], list[str]]:
    return lambda place: train_command(place, override, "--dry-run")


def train_command(place: Path, *more: str) -> list[str]:
    _, file = tiny.write_config(
        place, train__pictures=False, train__steps=2, train__checkpoint_every=2, train__eval_every=2
    )
    return ["train", file.name, "--run", "run", *more]


def folder_task(place: Path, classes: tuple[str, ...] = ("ant", "bee"), each: int = 8) -> None:
    for split, count in (("train", each), ("test", 2)):
        for label, name in enumerate(classes):
            folder = place / "photos" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = np.random.default_rng(100 * label + n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    (place / "photos.yaml").write_text("title: Photos\nsource: folder\npath: photos\n")


def folder_config(place: Path) -> str:
    _, file = tiny.write_config(
        place,
        tasks=["photos.yaml"],
        data__root=".",
        train__pictures=False,
        train__steps=2,
        train__checkpoint_every=2,
        train__eval_every=2,
        train__grad_accumulation_steps=1,
    )
    return file.name
