"""Pack a task's images into one file per split, smaller and quicker to read.

    moe-bsr pack food101 --root data --download          # 101,000 images, about 2 GB
    moe-bsr pack cifar10 --root data --out packs         # lossless

TASK is a name in `tasks/` or a path to a task file. Writes `<out>/<task>/` with train.npz, classes.txt and so on;
training uses it in place of the originals when `<out>` is its data root, which is the default here; where the
originals lie in `<root>/<task>/` themselves, name another. Images above the short side are shrunk to JPEGs; the
others keep their bytes, or become lossless PNGs where they come as pixels. Images that cannot be read are listed,
all at once, and nothing is written. The format is described in docs/data.md.

Exit status: 0 packed, 2 refused (nothing is left behind).
"""

import argparse
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli.run_arguments import at_least
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.data import TaskSpec

IMAGES_AT_ONCE = 256  # encoded images in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="a name in tasks/, or a task file")
    parser.add_argument("--root", "--data-root", type=Path, default=Path("data"), help="data root (data)")
    parser.add_argument("--out", type=Path, help="where to write (the data root)")
    parser.add_argument("--short-side", type=at_least(1), default=256, help="pixels (256)")
    parser.add_argument(
        "--quality", type=int, default=90, choices=range(1, 96), metavar="1..95", help="of shrunk JPEGs (90)"
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.data import load_spec, open_images
    from moe_bsr.data.packed import SPLITS, write_classes, write_splits

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
    """Write one split; returns what is wrong with the images that cannot be read, which are left out."""
    from moe_bsr.data import UnreadableImage
    from moe_bsr.data.packed import PackWriter, encode

    def encoded(i: int) -> bytes | str:
        try:
            return encode(source, i, short_side, quality)
        except UnreadableImage as error:
            return str(error)

    broken = []
    with PackWriter(path) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), IMAGES_AT_ONCE):
            part = range(start, min(start + IMAGES_AT_ONCE, len(source)))
            for i, image in zip(part, pool.map(encoded, part), strict=True):
                if isinstance(image, str):
                    broken.append(image)
                else:
                    writer.add(image, int(source.labels[i]), source.names and source.names[i])
    return broken


def refuse_existing(target: Path, spec: "TaskSpec", root: Path) -> None:
    """Never advise to remove originals: only what is a pack, and not the one to be packed again."""
    if not target.exists():
        return
    originals = spec.folder(root)
    if originals is not None and originals.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target}: that is where the originals lie; name another --out")
    if not (target / "train.npz").is_file():
        raise ValueError(f"{target} exists and is no pack; name another --out")
    raise ValueError(f"{target} is a pack already; remove it to pack again, or name another --out")
