"""Look at image folders, and write the task files and the configuration to train on them.

    moe-bsr init photos
    moe-bsr init photos --out project --test-fraction 0.3

DIR is one dataset or a folder of several. A dataset is

    train/CLASS/IMAGE and test/CLASS/IMAGE    used as they are
    train/CLASS/IMAGE and val/CLASS/IMAGE     val/ becomes the test split
    CLASS/IMAGE                               a share of each class is set aside as the test split

Validation images are always carved from the training images. No image is moved or copied: where a split has to be
made, splits/ holds links to the images. Writes tasks/NAME.yaml for each dataset and NAME.yaml, the configuration,
into the current folder, and says what to do next. Files that are there are kept; --force replaces them.

Exit status: 0 written, 2 refused (nothing is written).
"""

import argparse
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from moe_bsr.cli.main import program
from moe_bsr.cli.terminal import say

CONFIG = """\
# {command}
# Made by {made_by}. Fine-tunes the bundled backbone (64 x 64 pixels) in blocks 3, 7 and 11, with a mixture
# of experts, and drops three tenths of the patches at blocks 6 and 9. moe-bsr copy base writes a file with all keys.
#
# Measure first what the heads alone reach, in less time: add to the command
#   plan.train_blocks=[] plan.drop_blocks=[] plan.moe_blocks=[] train.lr=2e-2 train.head_lr_scale=1
#   --run runs/{name}_heads
# A backbone pretrained on photographs does far better on photographs (23 MB, downloaded once; slower):
#   backbone.name=deit_tiny_patch16_224.fb_in1k backbone.weights=hub train.lr=5e-4
tasks: {tasks}
plan: {{drop_blocks: [6, 9], keep_rate: 0.7}}
moe: {{mlp_ratio: 1}}
train:
  steps: {steps}
  eval_every: {eval_every}
  lr: 1.0e-3
  head_lr_scale: 10              # heads start from nothing
"""

TASK = """\
# {train} training and {test} test images in {classes} classes.{note}
title: "{title}"
source: folder
path: {path}
# license: how others may use these images
# flip: false                    # where a mirrored image would be another class: letters, signs, left and right
"""

EPOCHS, BATCH = 12, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset, or a folder of several")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to write (here)")
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="of each class, where there is no test split (0.2)",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")


@dataclass
class Dataset:
    """One task to be: its images by split and class.

    Attributes:
        path: the folder that holds train/ and test/, or will.
        links: where a split has to be made: link -> what it points to.
        notes: what a person should know about how it is used.
    """

    name: str
    path: Path
    train: dict[str, int]
    test: dict[str, int]
    links: dict[Path, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Unusable(ValueError):
    """Why a folder is no dataset."""


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError, load

    folder, out = arguments.folder.resolve(), arguments.out
    if not folder.is_dir():
        raise ConfigError(f"{arguments.folder}: no such folder")
    if not 0 < arguments.test_fraction < 1:
        raise ConfigError(f"--test-fraction {arguments.test_fraction}: above 0 and below 1")
    datasets, left_out = look(folder, (out / "splits").resolve(), arguments.test_fraction)
    for line in left_out:
        say(f"not used: {line}")
    if not datasets:
        raise ConfigError(f"{folder}: no dataset in it; moe-bsr init --help shows the folders that are understood")
    name = task_name(folder)
    config = out / f"{name}.yaml"
    command = f"{program('train')} {config}"
    paths = {dataset.name: out / "tasks" / f"{dataset.name}.yaml" for dataset in datasets}
    files = {paths[dataset.name]: task_file(dataset) for dataset in datasets}
    files[config] = CONFIG.format(
        command=command,
        made_by=f"moe-bsr init {arguments.folder}",
        name=name,
        tasks=json.dumps([str(path.resolve()) for path in paths.values()]),
        steps=steps(datasets),
        eval_every=steps(datasets) // 5,
    )
    new = [*files, *(dataset.path for dataset in datasets if dataset.links)]
    if not arguments.force and (there := [str(path) for path in new if path.exists()]):
        raise ConfigError(f"{', '.join(there)}: there already; --force replaces it, --out FOLDER writes elsewhere")
    for dataset in datasets:
        make_links(dataset)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    load(config)  # what was written can be read
    for dataset in datasets:
        say(
            f"{dataset.name}: {len(dataset.train)} classes, {sum(dataset.train.values())} training and "
            f"{sum(dataset.test.values())} test images" + "".join(f"\n  {note}" for note in dataset.notes)
        )
    say("written: " + ", ".join(map(str, files)))
    print(f"next:\n  {command} --dry-run    every dataset opened, the plan block by block\n  {command}")
    return 0


def look(folder: Path, splits: Path, test_fraction: float) -> tuple[list[Dataset], list[str]]:
    """The datasets in a folder, and a line for everything in it that cannot be used.

    Args:
        splits: where the links of a split go that has to be made.
    """
    places = [folder] if is_dataset(folder) else subfolders(folder)
    found, left_out = [], []
    for place in places:
        if place == splits:
            continue  # made by this command
        if not is_dataset(place):
            left_out.append(f"{place}: no class folders with images in it")
            continue
        try:
            dataset = dataset_in(place, splits, test_fraction, left_out)
        except Unusable as error:
            left_out.append(str(error))
            continue
        if dataset.name in {other.name for other in found}:
            left_out.append(f"{place}: another folder gives the task name {dataset.name}; rename one")
            continue
        found.append(dataset)
    return found, left_out


def is_dataset(folder: Path) -> bool:
    """Whether a folder itself has splits or classes: in it are folders that hold images, and no folders of images."""
    return any(
        path.name == "train" or (images_in(path) and not any(map(images_in, subfolders(path))))
        for path in subfolders(folder)
    )


def dataset_in(place: Path, splits: Path, test_fraction: float, left_out: list[str]) -> Dataset:
    """The dataset that a folder is.

    Raises:
        Unusable: it is none, or training on it would be refused.
    """
    name = task_name(place)
    if (place / "train").is_dir():
        test = next((place / split for split in ("test", "val") if (place / split).is_dir()), None)
        if test is None:
            return split_classes(name, place / "train", splits / name, test_fraction, left_out)
        train_counts, test_counts = count(place / "train", left_out), count(test, left_out)
        if strangers := sorted(test_counts.keys() - train_counts.keys()):
            raise Unusable(f"{test / strangers[0]}: a class without training images; remove it, or add some")
        for split in (place / "train", test):
            if empty := [path for path in subfolders(split) if not images_in(path)]:
                raise Unusable(f"{empty[0]}: a class folder without images; remove it, then {place} can be used")
        dataset = Dataset(name, place, train_counts, test_counts)
        if test.name == "val":
            dataset.path = splits / name
            dataset.links = {splits / name / "train": place / "train", splits / name / "test": test}
            dataset.notes.append("val/ is its test split, for it has no test/; validation is carved from train/")
        elif (place / "val").is_dir():
            left_out.append(f"{place / 'val'}: validation is carved from train/; move its images there to use them")
        check(place, dataset)
        return dataset
    return split_classes(name, place, splits / name, test_fraction, left_out)


def split_classes(name: str, place: Path, target: Path, test_fraction: float, left_out: list[str]) -> Dataset:
    """A folder of classes, of each of which a share is set aside: always the same images, whatever else there is."""
    dataset = Dataset(name, target, {}, {})
    for kind, images in classes_in(place, left_out).items():
        ordered = sorted(images, key=lambda path: hashlib.sha256(f"{kind}/{path.name}".encode()).hexdigest())
        held_back = min(max(round(len(images) * test_fraction), 1), len(images) - 1)
        dataset.train[kind], dataset.test[kind] = len(images) - held_back, held_back
        for i, image in enumerate(ordered):
            dataset.links[target / ("test" if i < held_back else "train") / kind / image.name] = image
    dataset.test = {kind: number for kind, number in dataset.test.items() if number}
    dataset.notes.append(f"{test_fraction:.0%} of each class are set aside as the test split: links in {target}")
    check(place, dataset)
    return dataset


def check(place: Path, dataset: Dataset) -> None:
    if len(dataset.train) < 2:
        raise Unusable(f"{place}: {len(dataset.train)} class folder with images; two are needed to tell apart")
    if not dataset.test:
        raise Unusable(f"{place}: no test images")


def count(split: Path, left_out: list[str]) -> dict[str, int]:
    return {kind: len(images) for kind, images in classes_in(split, left_out).items()}


def classes_in(folder: Path, left_out: list[str]) -> dict[str, list[Path]]:
    """The images by class; what lies there and is none is told."""
    from moe_bsr.data.image_files import EXTENSIONS

    classes = {}
    if loose := images_in(folder):
        left_out.append(f"{len(loose)} image(s) in {folder} itself, outside of a class folder")
    for path in subfolders(folder):
        if images := images_in(path):
            classes[path.name] = images
        else:
            left_out.append(f"{path}: no images in it ({', '.join(sorted(EXTENSIONS))})")
        if inner := subfolders(path):
            left_out.append(f"{inner[0]}: a folder within a class; images have to lie in {path} itself")
        others = [file for file in path.iterdir() if file.is_file() and file not in images and file.name[0] != "."]
        if others:
            left_out.append(f"{len(others)} file(s) in {path} that are no images, such as {others[0].name}")
    return classes


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def images_in(folder: Path) -> list[Path]:
    from moe_bsr.data.image_files import EXTENSIONS

    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS and p.name[0] != ".")


def task_name(folder: Path) -> str:
    """A folder's name as a task may be called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", folder.name).strip("_") or "images"


def task_file(dataset: Dataset) -> str:
    return TASK.format(
        train=sum(dataset.train.values()),
        test=sum(dataset.test.values()),
        classes=len(dataset.train),
        note="".join(f"\n# {note}" for note in dataset.notes),
        title=dataset.name.replace("_", " ").strip().capitalize(),
        path=json.dumps(str(dataset.path)),
    )


def steps(datasets: list[Dataset]) -> int:
    """Updates for about a dozen epochs, within what is bearable for a first try."""
    images = sum(sum(dataset.train.values()) for dataset in datasets)
    return min(max(EPOCHS * images // BATCH // 10 * 10, 100), 2000)


def make_links(dataset: Dataset) -> None:
    """The links of a split that has to be made; those of an earlier one are removed."""
    if not dataset.links:
        return
    if dataset.path.exists():
        if real := [path for path in dataset.path.rglob("*") if not path.is_symlink() and not path.is_dir()]:
            raise ValueError(f"{real[0]}: no link of moe-bsr init; take it out of {dataset.path} first")
        shutil.rmtree(dataset.path)  # the links, not what they point to
    for link, target in dataset.links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=target.is_dir())
