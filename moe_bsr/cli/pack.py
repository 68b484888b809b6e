"""Pack the images of a task into one file per split, which is smaller and faster to read.

    moe-bsr pack food101 --root data --download          # 101,000 images, about 2 GB
    moe-bsr pack cifar10 --root data --out packs         # lossless

Writes OUT/TASK/ with train.npz, classes.txt and so on. Training with OUT as its data root then uses the pack instead of
the originals. OUT is by default the data root; if the originals are in TASK/ of the data root, give another OUT. Images
larger than --short-side are resized and stored as JPEG. Smaller ones keep their bytes, or become lossless PNG if they
are not files. Images that cannot be read are listed, and then nothing is written. docs/data.md describes the format.

Exit status: 0 packed, 2 invalid arguments, a pack exists, or an image cannot be read (nothing is written).
"""

import argparse
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli.run_arguments import at_least
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.data import TaskSpec

IMAGES_AT_ONCE = 256  # encoded images that are in memory at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="name of a task (see moe-bsr tasks), or a task file")
    help = "folder of the datasets (default: data)"
    parser.add_argument("--root", type=Path, default=Path("data"), metavar="DIR", help=help)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: the data root)")
    help = "resize images whose shorter side is longer than this (default: 256)"
    parser.add_argument("--short-side", type=at_least(1), default=256, metavar="PIXELS", help=help)
    help = "JPEG quality of resized images (default: 90)"
    parser.add_argument("--quality", type=int, default=90, choices=range(1, 96), metavar="1..95", help=help)
    parser.add_argument("--download", action="store_true", help="download what is missing")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.data import load_spec, open_images
    from moe_bsr.data.packed import write_classes, write_splits
    from moe_bsr.data.splits import SPLITS

    spec = load_spec(arguments.task)
    target = (arguments.out or arguments.root) / spec.name
    refuse_existing(target, spec, arguments.root)
    images = open_images(spec, root=arguments.root, download=arguments.download, use_pack=False)
    say("\n".join([f"{spec.title} from {images.origin}", *images.unused]))
    splits = {name: source for name in SPLITS if (source := getattr(images, name)) is not None}
    partial = target.with_name(f"{spec.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_classes(partial, images.train.class_names)
        write_splits(partial, list(splits))
        broken: list[str] = []
        for name, source in splits.items():
            start = time.monotonic()
            broken += pack_split(source, partial / f"{name}.npz", arguments.short_side, arguments.quality)
            megabytes = (partial / f"{name}.npz").stat().st_size / 1e6
            print(f"{name}: {len(source)} images, {megabytes:.1f} MB, {time.monotonic() - start:.0f} s")
        if broken:
            say("\n".join(broken), error=True)
            raise ValueError(f"{len(broken)} images cannot be read: put readable copies in their places")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"written to {target}; train with {target.parent} as the data root to use it")
    return 0


def pack_split(source: Any, path: Path, short_side: int, quality: int) -> list[str]:
    """Write one split without the images that cannot be read; returns what is wrong with each of these."""
    from moe_bsr.data import UnreadableImage
    from moe_bsr.data.packed import PackWriter, encode
    from moe_bsr.runtime.device import cores

    def encoded(i: int) -> bytes | str:
        try:
            return encode(source, i, short_side, quality)
        except UnreadableImage as error:
            return str(error)

    broken = []
    with PackWriter(path) as writer, ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(source), IMAGES_AT_ONCE):
            part = range(start, min(start + IMAGES_AT_ONCE, len(source)))
            for i, image in zip(part, pool.map(encoded, part), strict=True):
                if isinstance(image, str):
                    broken.append(image)
                else:
                    writer.add(image, int(source.labels[i]), source.names and source.names[i])
    return broken


def refuse_existing(target: Path, spec: "TaskSpec", root: Path) -> None:
    """Raise ValueError if `target` exists, but never advise to remove it unless it is a pack and not the original."""
    if not target.exists():
        return
    originals = spec.folder(root)
    if originals is not None and originals.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is the folder of the originals; name another --out")
    if not (target / "train.npz").is_file():
        raise ValueError(f"{target} exists and is not a pack; name another --out")
    raise ValueError(f"{target} is a pack already; remove it to pack again, or name another --out")
