"""Write a run folder's `config.yaml`, and check that a run can be resumed in its folder.

`config.yaml` has the configuration and, under `resolved`, everything it resolved to: precision, threads, image
settings, the tasks and their images, the hash of the backbone's weights, versions. `config_file.py` reads it, `load.py`
rebuilds the model from it, and `data_record.py` finds its images again.
"""

import datetime
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.schema import AUGMENT_KEYS
from moe_bsr.config.train import LENGTHS
from moe_bsr.data import ImageTransforms, TaskData, TaskSpec, load_spec, load_task
from moe_bsr.data.spec import spec_from
from moe_bsr.model.backbones import family_of
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs import archive, checkpoint, data_record, kept_tasks, ordinary, report
from moe_bsr.runs.config_file import read_config
from moe_bsr.runtime import files
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import commit, environment
from moe_bsr.runtime.top_list import are_many, condensed
from moe_bsr.runtime.version import __version__

# Keys of config.data that are passed to ImageTransforms under the same name.
TRANSFORM_KEYS = ("resize", "augment", "views", "crop_scale", "unreadable", *AUGMENT_KEYS)

# Keys that may change on resume, because they do not change what is computed.
RESUMABLE_KEYS = (
    "runtime",
    "data.root",
    "data.download",
    "data.image_cache_mb",
    "data.feature_cache_mb",
    "data.feature_cache_dir",
    "data.prefetch",
    "data.unreadable",
    "train.checkpoint_every",
    "train.evaluate_test",
    *("train.pictures", "train.log_to", "backbone.weights"),
)

# Keys of config.data that are passed to load_task.
DIVISION_KEYS = ("download", "val_fraction", "val_images", "train_images", "split_seed")
LENGTH_KEYS = tuple(f"train.{key}" for key in LENGTHS)


def open_task(config: Config, task: str | TaskSpec, root: str | None = None) -> TaskData:
    """Open the dataset of a task and split it as the configuration says.

    Args:
        task: a task file or a specification.
        root: folder of the datasets, by default data.root.
    """
    chosen = {key: getattr(config.data, key) for key in DIVISION_KEYS}
    spec = load_spec(task) if isinstance(task, str) else task
    return load_task(spec, root=Path(root or config.data.root).expanduser(), **chosen)


def make_transforms(config: Config, model: MultitaskViT, processes: int = 1) -> ImageTransforms:
    """Make the transforms from images to inputs of this model, by the backbone's settings and the configuration.

    Args:
        processes: number of processes on this machine. They divide data.image_cache_mb among themselves.
    """
    settings = family_of(config.backbone).image_settings(config.backbone, model.vit)
    return ImageTransforms(
        **asdict(settings),
        **{key: getattr(config.data, key) for key in TRANSFORM_KEYS},
        flip=config.data.hflip,
        seed=config.seed,
        cache_mb=config.data.image_cache_mb / processes,
    )


def write_config(
    run: Path,
    config: Config,
    model: MultitaskViT,
    transforms: ImageTransforms,
    runtime: Runtime,
    tasks: dict[str, TaskData],
    resumed: bool = False,
) -> None:
    """Write `config.yaml`: the configuration, and everything it resolved to.

    Args:
        resumed: whether the run resumes from a checkpoint. The record of its tasks and warm start then stays as it is.
    """
    before = _recorded(run) if resumed else {}
    about, init_from = before.get("tasks", {}), before.get("init_from", model.init_from)
    if not about:
        kept = kept_tasks.take_over(config, run)
        now = {"added": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        new = {name: data_record.write(run, data) | now for name, data in tasks.items()}
        about = {name: (kept | new)[name] for name in config.task_names()}
    resolved = {
        "backbone_sha256": model.backbone_sha256,
        "images": {
            "size": transforms.size,
            "mean": list(transforms.mean),
            "std": list(transforms.std),
            "interpolation": transforms.interpolation,
            "crop_pct": transforms.crop_pct,
            "crop_mode": transforms.crop_mode,
        },
        **({"init_from": init_from} if init_from else {}),
        "data_root": str(Path(_data_root(config, before)).expanduser().resolve()),
        "tasks": about,
        "version": __version__,
        "commit": commit(),
        **environment(runtime),
    }
    tree = configuration.to_dict(config) | {"resolved": resolved}
    write_whole(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False, width=110))


def open_tasks(config: Config, run: Path, resume: bool = False) -> tuple[dict[str, TaskData], list[str]]:
    """Open the datasets of the tasks that train. A resumed run gets the splits that it began with.

    Returns:
        The datasets by task, and notes about them for the user, one line each.
    Raises:
        ConfigError: training or validation images of the run are missing or have changed (with data.unreadable=skip
            they may be missing), or a task file has changed.
    """
    recorded = _recorded(run) if resume else {}
    root, files_of, trained = _data_root(config, recorded), config.task_files(), config.trained_tasks()
    before = {name: about for name, about in recorded.get("tasks", {}).items() if name in trained}
    specs = {name: _spec(name, files_of[name], before) for name in trained}
    for name, about in before.items():
        data_record.check_spec(run, specs[name], about)
    tasks = {name: open_task(config, spec, root) for name, spec in specs.items()}
    notes = condensed([f"{name}: {note}" for name, data in tasks.items() for note in data.notes], tasks)
    for name, about in before.items():
        tasks[name], changes = data_record.follow(run, tasks[name], about)
        for split, change in changes.items():
            if split != "test" and change.lost(config.data.unreadable):
                raise ConfigError(
                    f"cannot resume {run}: the {split} images of task {name} changed ({tasks[name].origin}): {change}; "
                    "put them back, or begin in another folder"
                )
        notes += [
            f"{name}: the {split} images changed since the run began: {change}"
            + ("; the new ones are not used" if change.added and split != "test" else "")
            for split, change in changes.items()
            if change
        ]
    return tasks, notes


def _spec(name: str, file: str, before: dict[str, dict[str, Any]]) -> TaskSpec:
    """Return a task's specification: from its file, or if the file is not found the one that the run recorded."""
    try:
        return load_spec(file)
    except FileNotFoundError:
        if name not in before:
            raise
        return spec_from(name, before[name]["spec"])


def _data_root(config: Config, recorded: dict[str, Any]) -> str:
    """Return the folder of the datasets: data.root.

    If data.root is the one the run recorded and its absolute path of that time still exists, that path is returned.
    """
    same = recorded.get("data.root") == config.data.root and os.path.isdir(recorded.get("data_root", ""))
    return recorded["data_root"] if same else config.data.root


def _recorded(run: Path) -> dict[str, Any]:
    if checkpoint.steps(run) and (run / "config.yaml").is_file():
        config, resolved = read_config(run)
        return resolved | {"data.root": config.data.root}
    return {}


def config_diff(old: Config, new: Config) -> list[str]:
    """Describe each difference between two configurations by its dotted key, as "train.lr was 0.1, now 0.2".

    Keys that may change on resume are left out, and so is a length that has grown.
    """

    def walk(a: Any, b: Any, key: str) -> list[str]:
        grows = key in LENGTH_KEYS and None not in (a, b) and b > a
        if key in RESUMABLE_KEYS or a == b or grows:
            return []
        if isinstance(a, dict) and isinstance(b, dict):
            return [d for k in a.keys() | b.keys() for d in walk(a.get(k), b.get(k), f"{key}.{k}".lstrip("."))]
        if key == "tasks" and are_many([*a, *b]) and set(a) != set(b):  # show only those that differ
            a, b = [each for each in a if each not in b], [each for each in b if each not in a]
            return [f"tasks: {', '.join(b) or 'none'} added, {', '.join(a) or 'none'} gone since (add-task adds one)"]
        return [f"{key} was {a!r}, now {b!r}"]

    return sorted(walk(configuration.to_dict(old), configuration.to_dict(new), ""))


def check_folder(config: Config, folder: Path, resume: bool) -> None:
    """Raise ConfigError unless a run can begin, or with `resume` can be resumed, in this folder.

    Refused are a path that is no folder, a folder with a run if `resume` is False, and one with a run of another
    configuration.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; name a folder for the run")
    names = config.task_names() if config.mode == "single_task" else []
    ordinary.check(folder, names)
    parts = [folder / name for name in names]
    if not resume and any(checkpoint.steps(place) or (place / "report.json").is_file() for place in (folder, *parts)):
        raise ConfigError(f"{folder} holds a run already; go on with it by resume=True, or name another folder")
    if not resume or not (folder / "config.yaml").is_file():
        return
    if changed := config_diff(read_config(folder, exact=True)[0], config):
        raise ConfigError(
            f"cannot resume {folder}: the configuration changed: {'; '.join(changed[:4])}; a resumed run keeps its "
            "settings (its length may grow, in the same unit), so name another folder for these"
        )


def restore_weights(model: MultitaskViT, weights: dict[str, torch.Tensor], backbone_sha256: str, folder: Path) -> None:
    """Load the weights that training changed into a model that has the run's backbone.

    Args:
        backbone_sha256: hash of the backbone that the run was trained from.
        folder: named in errors.
    Raises:
        CheckpointError: the model has another backbone than the run, or other parameters.
    """
    reference = model.unchanged_backbone_names()
    if reference - weights.keys() and model.backbone_sha256 != backbone_sha256:
        raise checkpoint.CheckpointError(
            f"{folder} holds only the weights that training changed, and needs the backbone with sha256 "
            f"{backbone_sha256[:12]}...; the weights now given have {model.backbone_sha256[:12]}...; name the file "
            "the run was trained from: backbone.weights=FILE to resume, weights=FILE to load"
        )
    check_names(model, weights, folder)
    if model.backbone_sha256 == backbone_sha256:  # frozen parameters that a warm start changed must be saved again
        state = model.state_dict()
        model.replaced |= {
            k for k in reference & weights.keys() if not torch.equal(state[k].to(weights[k]), weights[k])
        }
    model.load_state_dict(weights, strict=False)


def check_names(model: MultitaskViT, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise CheckpointError if a parameter that training changes is missing, or a name is not in the model."""
    expected, reference = model.state_dict().keys(), model.unchanged_backbone_names()
    problems = [f"missing {k}" for k in expected - weights.keys() - reference]
    problems += [f"unexpected {k}" for k in weights.keys() - expected]
    if problems:
        raise checkpoint.CheckpointError(f"{folder} does not fit the model: {'; '.join(sorted(problems)[:6])}")


def count_test_evaluation(run: Path, tasks: Iterable[str] = ()) -> int:
    """Count one more evaluation on the test split and return the total. The report has the count too.

    Call it before the evaluation, since one that fails half-way has seen test data too. Several processes may call it
    for the same run.

    Args:
        tasks: tasks to be evaluated, by default all. In a run with one model per task, each is counted in its own
            folder, and the whole run has the largest of these counts.
    Raises:
        ConfigError: the run is a zip file.
    """
    archive.require_folder(run, "evaluations of the test split are counted in a folder")
    report.read(run)  # if it is damaged, nothing is counted
    config, _ = read_config(run)
    if config.mode == "single_task":
        counted = [run / task for task in config.task_names()]
        for task in tasks or config.task_names():
            count_test_evaluation(run / task)
    else:
        counted = [run]
        with files.open_file(run / "test_evaluations.log", "ab") as stream:
            stream.write(f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}\n".encode())
    while True:  # again if another process has counted, or written its report, in the meantime
        count, known = max(map(test_evaluations, counted)), report.read(run)
        if known is None or known.get("test_evaluations") == count:
            return count
        report.write(run, known | {"test_evaluations": count})


def test_evaluations(run: Path) -> int:
    """Return how often the test split of a run was evaluated."""
    log = run / "test_evaluations.log"
    return len(files.read_bytes(log).splitlines()) if files.kind(log) else 0
