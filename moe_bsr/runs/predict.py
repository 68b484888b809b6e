"""Classify images for all tasks of a run at once.

The frozen blocks before the gradient path are the same for every task, so they run once per image and each task
continues from their output. This holds for one model per task too, if the models have the same frozen blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moe_bsr.data import UnreadableImage
from moe_bsr.data.class_folders import images_below, is_picture
from moe_bsr.data.formats import EXTENSIONS, advice
from moe_bsr.data.image_files import decode
from moe_bsr.data.unused import Unused

if TYPE_CHECKING:
    from moe_bsr.runs.load import TrainedRun
    from moe_bsr.runs.rejection import Detector

BATCH = 32  # images in one forward pass

Images = str | PathLike | Image.Image | np.ndarray


def predict_images(
    run: TrainedRun,
    images: Images | Iterable[Images],
    tasks: list[str],
    top: int,
    detectors: dict[str, Detector] | None,
) -> dict[str, Any]:
    """Compute the result of `TrainedRun.predict`. Images are read batch by batch, so a folder may have any size."""
    if top < 1:
        raise ValueError(f"top = {top}: at least 1")
    groups = run.grouped(tasks)
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []

    def readable() -> Iterator[tuple[str | int, Tensor]]:
        for name, image in _named(images):
            try:
                yield name, _as_input(run, name, image, bits)
            except UnreadableImage as error:
                skipped.append({"image": name, "reason": str(error)})

    bits = _bits(run, tasks)
    inputs = readable()
    while batch := list(islice(inputs, BATCH)):
        names, pixels = zip(*batch, strict=True)
        probabilities, margins = _forward(run, groups, torch.stack(pixels), detectors)
        for row, name in enumerate(names):
            answers = {task: _best(probabilities[task][row], run.class_names[task], top) for task in tasks}
            of_image = {task: margins[task][row].item() for task in tasks if margins}
            found.append({"image": name, **_belongs_to(of_image), "tasks": answers})
    return {
        "run": str(run.run),
        "step": run.step,
        "groups": [
            {
                "tasks": members,
                "blocks": len(run.models[members[0]].plan),
                "shared_blocks": run.shared_blocks(members) if len(members) > 1 else 0,
            }
            for members in groups
        ],
        "images": found,
        "skipped": skipped,
    }


def _named(images: Images | Iterable[Images]) -> Iterator[tuple[str | int, Path | Image.Image | np.ndarray]]:
    """Yield each image with its name: the file, or the position among all images if there is no file."""
    one = isinstance(images, str | PathLike | Image.Image) or isinstance(images, np.ndarray) and images.ndim == 3
    position = 0
    many: Iterable[Any] = [images] if one else images  # type: ignore[assignment]
    for image in many:
        if isinstance(image, str | PathLike):
            path = Path(image)
            files = _files_below(path) if path.is_dir() else [path]
            for file in files:
                yield str(file) if path.is_dir() else str(image), file
            position += len(files)
        else:
            yield position, image
            position += 1


def _files_below(folder: Path) -> list[Path]:
    """List images as training does, and those in formats that cannot be read, which are then listed as skipped."""
    unused = Unused()
    files = images_below(str(folder), unused, is_picture)
    if not files:
        found = "; ".join(unused.found()) or "nothing"
        raise ValueError(f"{folder}: no images below it ({', '.join(sorted(EXTENSIONS))}); found: {found}")
    return [Path(file) for file in files]


def _bits(run: TrainedRun, tasks: list[str]) -> int | None:
    """Return the tasks' setting `bits` for 16-bit images if all of them have the same, else None."""
    said = {run.recorded.get(task, {}).get("spec", {}).get("bits") for task in tasks}
    return said.pop() if len(said) == 1 else None


def _as_input(run: TrainedRun, name: str | int, image: Path | Image.Image | np.ndarray, bits: int | None) -> Tensor:
    """Return an image as uint8 (3, S, S), transformed as in evaluation.

    Raises:
        UnreadableImage: the file is damaged or missing. ValueError: this is no image, or an array of another form.
    """
    if isinstance(image, Path):
        if what_to_do := advice(image.suffix.lower()):
            raise UnreadableImage(f"{name}: {image.suffix} files cannot be read here ({what_to_do})")
        return run.transforms.eval_image(Image.fromarray(decode(image, str(name), bits)))
    if isinstance(image, Image.Image):
        try:
            return run.transforms.eval_image(image, bits)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow reads an opened file only here
            raise UnreadableImage(f"image {name}: not a readable image ({error})") from error
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image {name} is a {type(image).__name__}: give a file, a folder, a PIL image or an array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image {name} is an array of {image.dtype} {image.shape}: give uint8 (height, width, 3), RGB, 0 to 255"
        )
    return run.transforms.eval_image(Image.fromarray(image))


@torch.inference_mode()
def _forward(
    run: TrainedRun, groups: list[list[str]], images: Tensor, detectors: dict[str, Detector] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return probabilities (B, classes), float32 on the CPU, and margins (B,) by task for uint8 images (B, 3, S, S).

    Args:
        groups: see `TrainedRun.grouped`.
        detectors: None leaves the margins empty.
    """
    probabilities, margins = {}, {}
    with run.runtime.autocast():
        inputs = run.transforms.normalize(images, device=run.runtime.device)
        for task, features, logits in run.outputs(inputs, groups):
            if not logits.isfinite().all():
                raise FloatingPointError(
                    f"task {task}: logits that are not finite; the weights are broken, use an earlier checkpoint"
                )
            probabilities[task] = logits.float().softmax(1).cpu()
            if detectors is not None:
                margins[task] = detectors[task].margins(features, logits)
    return probabilities, margins


def _belongs_to(margins: dict[str, float]) -> dict[str, Any]:
    """Return the task with the largest margin, or None if no task accepts the image. Empty without margins."""
    if not margins:
        return {}
    best = max(margins, key=lambda task: margins[task])
    return {"belongs_to": best if margins[best] >= 0 else None, "margins": margins}


def _best(probabilities: Tensor, names: list[str], top: int) -> list[dict[str, Any]]:
    order = probabilities.argsort(descending=True, stable=True)[:top].tolist()
    return [{"name": names[i], "probability": probabilities[i].item()} for i in order]
