"""Write a few small images in the layout of each data source."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat
from tiny_shards import write_shard

from moe_bsr.data.packed import PackWriter, encode, write_classes
from moe_bsr.data.sources.folder import FolderSource


def picture(seed: int, size=(12, 10)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int) -> bytes:
    """Return an image as a PNG."""
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def save(path: Path, seed: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)


def fake_cifar(root: Path, dataset, monkeypatch) -> None:
    """Write four images into each of the official files, and patch the checksums to match."""
    fine = dataset is torchvision.datasets.CIFAR100
    folder, rng = root / dataset.base_folder, np.random.default_rng(0)
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for listed in ("train_list", "test_list"):
        batches = [
            write(name, {
                "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                "fine_labels" if fine else "labels": [0, 1, 0, 1],
            })
            for name, _ in getattr(dataset, listed)
        ]  # fmt: skip
        monkeypatch.setattr(dataset, listed, batches)
    name, digest = write(dataset.meta["filename"], {dataset.meta["key"]: ["apple", "boat"]})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "filename": name, "md5": digest})


def fake_flowers(root: Path, monkeypatch) -> None:
    folder = root / "flowers-102"
    for number in range(1, 13):
        save(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 102] * 4]})
    splits = {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    savemat(folder / "setid.mat", splits)
    files = dict(torchvision.datasets.Flowers102._file_dict)
    for name in ("label", "setid"):
        file = files[name][0]
        files[name] = (file, hashlib.md5((folder / file).read_bytes()).hexdigest())
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)


def fake_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 1), ("test", 10)):
        lines = []
        for label, breed in enumerate(["Abyssinian", "american_bulldog"], start=1):
            for number in range(first, first + 3):
                save(folder / "images" / f"{breed}_{number}.jpg", 100 * label + number)
                lines.append(f"{breed}_{number} {label} {label} 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))


def fake_food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        names = {c: [f"{c}/{n}" for n in numbers] for c in ("apple_pie", "waffles")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))
        for number, name in enumerate(n for group in names.values() for n in group):
            save(folder / "images" / f"{name}.jpg", number)


def _task_file(root: Path, name: str, text: str) -> Path:
    file = root / f"{name}.yaml"
    file.write_text(f"{text}\n")
    return file


def folder_task(root: Path, classes=("ant", "bee", "cat"), each=10) -> Path:
    for split, count in (("train", each), ("test", 2)):
        for k, name in enumerate(classes):
            for n in range(count):
                save(root / "pictures" / split / name / f"{n}.png", 1000 * k + n)
    return _task_file(root, "pictures", "title: Pictures\nsource: folder\npath: pictures")


def packed_task(root: Path) -> Path:
    folder_task(root)
    pack = root / "pack"
    pack.mkdir()
    for split in ("train", "test"):
        source = FolderSource(root / "pictures" / split)
        write_classes(pack, source.class_names)
        with PackWriter(pack / f"{split}.npz") as writer:
            for i, label in enumerate(source.labels.tolist()):
                writer.add(encode(source, i, 64, 90), label)
    return _task_file(root, "pack", "title: Pack\nsource: packed\npath: pack")


def csv_task(root: Path) -> Path:
    lines = ["path,label"]
    for k, name in enumerate(("ant", "bee")):
        for n in range(12):
            save(root / "photos" / f"{name}{n}.png", 1000 * k + n)
            lines.append(f"photos/{name}{n}.png,{name}")
    (root / "labels.csv").write_text("\n".join(lines))
    return _task_file(root, "table", "title: Table\nsource: csv\npath: labels.csv")


def huggingface_task(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"image": [picture(n) for n in range(24)], "label": [n % 2 for n in range(24)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "saved"))
    return _task_file(root, "hub", "title: Hub\nsource: huggingface\npath: saved")


def torchvision_task(root: Path) -> Path:
    fake_food(root)
    return _task_file(root, "food", "title: Food\nsource: torchvision\ndataset: Food101")


def tar_task(root: Path) -> Path:
    members = [
        member for n in range(24) for member in ((f"{n:04}.png", encoded(n)), (f"{n:04}.cls", str(n % 2).encode()))
    ]
    for shard in range(2):
        write_shard(root / f"bugs-{shard}.tar", members[24 * shard : 24 * (shard + 1)])
    return _task_file(root, "bugs", "title: Bugs\nsource: tar\ntrain: bugs-{0..1}.tar")


def generated_task(root: Path) -> Path:
    return _task_file(
        root, "petals", "title: Petals\nsource: generated\nfamily: petals\nclasses: 24\ntrain: 60\ntest: 24"
    )


# Source -> function that writes a few images below the data root and returns their task file.
TASK_FILES: dict[str, Callable[[Path], Path]] = {
    "torchvision": torchvision_task,
    "folder": folder_task,
    "packed": packed_task,
    "generated": generated_task,
    "csv": csv_task,
    "huggingface": huggingface_task,
    "tar": tar_task,
}
