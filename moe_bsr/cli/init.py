"""Write the task files and the configuration to train on your image folders.

    moe-bsr init photos
    moe-bsr init photos --out project --test-fraction 0.3

DIR is one dataset, or a folder of several. A dataset looks like one of these:

    train/CLASS/IMAGE     with val/ and test/ beside train/ if there are such splits
    CLASS/IMAGE           a folder of classes

A split that does not exist is set aside from the training images. Adding images later does not move any from one split
to another.

Writes tasks/NAME.yaml for each dataset, and the configuration NAME.yaml, and prints what to do next. Images are not
moved or copied. Existing files are replaced only with --force.

Exit status: 0 written, 2 no dataset found, or a file exists (nothing is written).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bsr.cli.main import program
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.data import TaskData

CONFIG = """\
# {command}
# Made by {made_by}. Fine-tunes the bundled backbone (64 x 64 pixels) in blocks 3, 7 and 11, with a mixture
# of experts, and drops three tenths of the patches at blocks 6 and 9. moe-bsr copy base writes a file with all keys.
#
# To see first what heads alone reach, on frozen features and in less time:
#   {probe} plan.drop_blocks=[] --blocks 6 7 8 9 10
# A backbone pretrained on photographs is much more accurate on photographs (23 MB, downloaded once; slower):
#   backbone.name=deit_tiny_patch16_224.fb_in1k backbone.weights=hub train.lr=5e-4
tasks: {tasks}
plan: {{drop_blocks: [6, 9], keep_rate: 0.7}}
moe: {{mlp_ratio: 1}}
train:
  steps: {steps}
  eval_every: {eval_every}
  lr: 1.0e-3
  head_lr_scale: 10              # heads start untrained
"""

TASK = """\
# {train} training, {val} validation and {test} test images in {classes} classes.
title: {title}
source: folder
path: {path}{test_fraction}
# license: how others may use these images
# flip: false                    # if a mirrored image could be of another class: letters, signs, left and right
"""

EPOCHS, BATCH = 12, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset, or a folder of several")
    help = "folder to write to (default: the current one)"
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help=help)
    help = "share of the images to use as a test split, if there is none (default: 0.2)"
    parser.add_argument("--test-fraction", type=float, default=0.2, metavar="F", help=help)
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError, load, packaged
    from moe_bsr.config.task_folders import folder_name
    from moe_bsr.config.yaml_text import json_text

    folder, out = arguments.folder.resolve(), arguments.out
    if not folder.is_dir():
        raise ConfigError(f"{arguments.folder}: no such folder")
    if not 0 < arguments.test_fraction < 1:
        raise ConfigError(f"--test-fraction {arguments.test_fraction}: above 0 and below 1")
    datasets, left_out = look(folder, arguments.test_fraction)
    for line in left_out:
        say(f"not used: {line}")
    if not datasets:
        raise ConfigError(f"{folder} has no dataset; moe-bsr init --help shows how the folders have to look")
    name = folder_name(folder)
    config = out / f"{name}.yaml"
    command = f"{program('train')} {config}"
    paths = [out / "tasks" / f"{data.name}.yaml" for data in datasets]
    files = {path: task_file(data) for path, data in zip(paths, datasets, strict=True)}
    files[config] = CONFIG.format(
        command=command,
        probe=f"{program('probe')} {config}",
        made_by=f"moe-bsr init {arguments.folder}",
        tasks=json_text([str(path.resolve()) for path in paths]),
        steps=steps(datasets),
        eval_every=steps(datasets) // 5,
    )
    if not arguments.force and (there := [path for path in files if path.exists()]):
        ours = any(path.resolve().parent == packaged.folder("tasks") for path in there)
        names = ", ".join(map(str, there))
        raise ConfigError(
            f"{names}: there already, and this folder has the tasks of the package; --out FOLDER writes elsewhere"
            if ours
            else f"{names}: there already; --force overwrites, --out FOLDER writes elsewhere"
        )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    load(config)  # check that what was written can be read
    for data in datasets:
        say(
            f"{data.name}: {len(data.class_names)} classes, {len(data.train)} training, {len(data.val)} validation and "
            f"{len(data.test)} test images" + "".join(f"\n  {note}" for note in data.notes)
        )
    say("written: " + ", ".join(map(str, files)))
    say(f"next:\n  {command} --dry-run    opens every dataset, prints the plan block by block\n  {command}")
    say(f"  {program('fit')} {config} --minutes 10    finds the best model for the time")
    return 0


def look(folder: Path, test_fraction: float) -> tuple[list["TaskData"], list[str]]:
    """Return the datasets in a folder, and a line of text for everything in it that is not a dataset."""
    found: list[TaskData] = []
    left_out = []
    for place in [folder] if is_dataset(folder) else subfolders(folder):
        if not is_dataset(place):
            left_out.append(f"{place}: no class folders with images in it")
            continue
        try:
            data = dataset_in(place, test_fraction)
        except (ValueError, OSError) as error:
            left_out.append(str(error))
            continue
        if data.name in {other.name for other in found}:
            left_out.append(f"{place}: another folder gives the task name {data.name}; rename one")
            continue
        found.append(data)
    return found, left_out


def is_dataset(folder: Path) -> bool:
    """Return whether a folder is a dataset: it has a training split, or class folders, which hold images directly."""
    from moe_bsr.data.class_names import split_named

    return any(
        split_named(path.name) == "train" or (has_images(path) and not any(map(has_images, subfolders(path))))
        for path in subfolders(folder)
    )


def dataset_in(place: Path, test_fraction: float) -> "TaskData":
    """Open the dataset in a folder as training will open it.

    Raises:
        ValueError, FileNotFoundError: training would not accept it.
    """
    from dataclasses import replace

    from moe_bsr.config.task_folders import folder_name, title_of
    from moe_bsr.data import SOURCES, load_task

    name = folder_name(place)
    spec = SOURCES["folder"](name=name, title=title_of(name), path=str(place))
    if spec.open(Path()).test is None:
        spec = replace(spec, test_fraction=test_fraction)
    return load_task(spec, root=Path())


def subfolders(folder: Path) -> list[Path]:
    from moe_bsr.data.class_folders import entries
    from moe_bsr.data.unused import Unused

    return [Path(entry.path) for entry in entries(str(folder), Unused())[1]]


def has_images(folder: Path) -> bool:
    from moe_bsr.data.class_folders import entries, is_image
    from moe_bsr.data.unused import Unused

    return any(is_image(entry.name) for entry in entries(str(folder), Unused())[0])


def task_file(data: "TaskData") -> str:
    from moe_bsr.config.yaml_text import json_text

    fraction = data.spec.test_fraction
    return TASK.format(
        train=len(data.train),
        val=len(data.val),
        test=len(data.test),
        classes=len(data.class_names),
        title=json_text(data.title),
        path=json_text(data.spec.path),
        test_fraction="" if fraction is None else f"\ntest_fraction: {fraction}",
    )


def steps(datasets: list["TaskData"]) -> int:
    """Return the number of updates for about a dozen epochs, limited to what is bearable for a first run."""
    images = sum(len(data.train) for data in datasets)
    return min(max(EPOCHS * images // BATCH // 10 * 10, 100), 2000)
