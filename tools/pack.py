"""Pack a task's images into one file per split, smaller and quicker to read.

    python tools/pack.py TASK [--root DIR] [--out DIR] [--short-side 256] [--quality 90]
                         [--download]

TASK is a name in `tasks/` or a path to a task file: one of torchvision's datasets, a folder of
images per class, a drawn task, or another pack. Writes `<out>/<task>/` with train.npz, test.npz and
classes.txt; training uses it in place of the originals when `<out>` is its data root, which is the
default here; where the originals lie in `<root>/<task>/` themselves, name another. Images above the
short side are shrunk to JPEGs; the others keep their bytes, or become lossless PNGs where they come as
pixels. The format is described in docs/data.md.

    python tools/pack.py food101 --root data --download          # 101,000 images, about 2 GB
    python tools/pack.py cifar10 --root data --out packs         # lossless

Exit status: 0 packed, 2 refused (nothing is left behind).
"""

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_bsr.data import TaskSpec, load_spec, open_sources
from moe_bsr.data.packed import PackWriter, encode, write_classes

IMAGES_AT_ONCE = 256  # encoded images in memory


def pack_split(source, path: Path, short_side: int, quality: int) -> None:
    with PackWriter(path) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), IMAGES_AT_ONCE):
            part = range(start, min(start + IMAGES_AT_ONCE, len(source)))
            images = pool.map(lambda i: encode(source, i, short_side, quality), part)
            for image, label in zip(images, source.labels[part.start : part.stop].tolist()):
                writer.add(image, label)


def refuse_existing(target: Path, spec: TaskSpec, root: Path) -> None:
    """Never advise to remove originals: only what is a pack, and not the one to be packed again."""
    if not target.exists():
        return
    originals = (root / Path(spec.path or "").expanduser()).resolve()
    if spec.path and originals.is_relative_to(target.resolve()):
        raise ValueError(f"{target}: that is where the originals lie; name another --out")
    if not (target / "train.npz").is_file():
        raise ValueError(f"{target} exists and is no pack; name another --out")
    raise ValueError(f"{target} is a pack already; remove it to pack again, or name another --out")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a name in tasks/, or a task file")
    parser.add_argument("--root", type=Path, default=Path("data"), help="data root (data)")
    parser.add_argument("--out", type=Path, help="where to write (the data root)")
    parser.add_argument("--short-side", type=int, default=256, help="pixels (256)")
    parser.add_argument("--quality", type=int, default=90, help="of shrunk JPEGs, 1 to 95 (90)")
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    args = parser.parse_args(arguments)
    if args.short_side < 1 or not 1 <= args.quality <= 95:
        parser.error("--short-side is at least 1, --quality is 1 to 95")

    try:
        spec = load_spec(args.task)
        target = (args.out or args.root) / spec.name
        refuse_existing(target, spec, args.root)
        train, test, origin = open_sources(spec, root=args.root, download=args.download, use_pack=False)
        print(f"{spec.title} from {origin}")
        partial = target.with_name(f"{spec.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_classes(partial, train.class_names)
            for name, source in (("train", train), ("test", test)):
                start = time.monotonic()
                pack_split(source, partial / f"{name}.npz", args.short_side, args.quality)
                megabytes = (partial / f"{name}.npz").stat().st_size / 1e6
                seconds = time.monotonic() - start
                print(f"{name}: {len(source)} images, {megabytes:.1f} MB, {seconds:.0f} s")
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (ValueError, OSError) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written to {target}; train with {target.parent} as the data root to use it")


if __name__ == "__main__":
    main()
