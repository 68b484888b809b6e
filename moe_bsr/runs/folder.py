"""The run folder: what a run writes down about itself, and what it checks before it goes on.

`config.yaml` holds the configuration and, under `resolved`, everything it led to: precision, threads,
image settings, classes, the hash of the backbone's weights, versions. `load.py` makes a model of it again.
"""

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.data import ImageTransforms, TaskData, load_spec, load_task
from moe_bsr.model.backbones import family_of
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs import checkpoint, report
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import commit, environment

# What may differ between a run and its resumption without changing what is computed.
RESUMABLE_KEYS = (
    "runtime",
    "data.root",
    "data.download",
    "data.image_cache_mb",
    "data.feature_cache_mb",
    "data.prefetch",
    "data.unreadable",
    "train.checkpoint_every",
    "train.evaluate_test",
    "backbone.weights",
)

# What a trained model is rebuilt from, and the last key written: without it the file was cut.
RESOLVED = ("backbone_sha256", "tasks", "precision", "python")


def open_task(config: Config, task: str, root: str | None = None) -> TaskData:
    """The dataset of a task file, as the run divides it; `root` takes the place of data.root."""
    data = config.data
    return load_task(
        load_spec(task),
        root=Path(root or data.root).expanduser(),
        download=data.download,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
    )


def make_transforms(config: Config, model: MultitaskViT) -> ImageTransforms:
    """How images become inputs of this model: the backbone's own settings and the configuration's."""
    settings = family_of(config.backbone).image_settings(config.backbone, model.vit)
    return ImageTransforms(
        **asdict(settings),
        resize=config.data.resize,
        augment=config.data.augment,
        flip=config.data.hflip,
        crop_scale=config.data.crop_scale,
        seed=config.seed,
        cache_mb=config.data.image_cache_mb,
        unreadable=config.data.unreadable,
    )


def write_config(
    run: Path,
    config: Config,
    model: MultitaskViT,
    transforms: ImageTransforms,
    runtime: Runtime,
    tasks: dict[str, TaskData],
) -> None:
    """Write `config.yaml`: what was asked for, and everything it led to."""
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
        "tasks": {name: data_fingerprint(data) for name, data in tasks.items()},
        "commit": commit(),
        **environment(runtime),
    }
    tree = configuration.to_dict(config) | {"resolved": resolved}
    write_whole(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False, width=110))


def data_fingerprint(data: TaskData) -> dict[str, Any]:
    """What a resumed run must find again, and where it was."""
    labels = hashlib.sha256(b"".join(split.labels.tobytes() for split in (data.train, data.val, data.test)))
    return {
        "origin": data.origin,
        "train": len(data.train),
        "val": len(data.val),
        "test": len(data.test),
        "labels_sha256": labels.hexdigest(),
        "classes": list(data.class_names),
    }


def read_config(run: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run and what it resolved to.

    Raises:
        ConfigError: there is no config.yaml, or it is cut or damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    try:
        tree = yaml.safe_load(file.read_text())
        if not isinstance(tree, dict):
            raise ConfigError("no keys and values")
        resolved = tree.pop("resolved", None) or {}
        config = configuration.from_dict(tree)
        lacking = [key for key in RESOLVED if key not in resolved and config.mode != "single_task"]
        if lacking:
            raise ConfigError(f"no key resolved.{lacking[0]}")
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file}: cut or damaged: {' '.join(str(error).split())}; put a copy in its place, or "
            "train again into another folder"
        ) from error
    return config, resolved


def config_diff(old: Config, new: Config) -> list[str]:
    """Dotted keys in which two configurations differ, those free to change on resume left out."""

    def walk(a: Any, b: Any, key: str) -> list[str]:
        if key in RESUMABLE_KEYS or a == b:
            return []
        if isinstance(a, dict) and isinstance(b, dict):
            return [d for k in a.keys() | b.keys() for d in walk(a.get(k), b.get(k), f"{key}.{k}".lstrip("."))]
        return [f"{key} was {a!r}, now {b!r}"]

    return sorted(walk(configuration.to_dict(old), configuration.to_dict(new), ""))


def check_folder(config: Config, folder: Path, resume: bool) -> None:
    """Raise ConfigError if the folder holds another run, or without `resume` any, or is none."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the run")
    parts = [folder / name for name in config.task_names()] if config.mode == "single_task" else []
    if not resume and any(checkpoint.steps(place) or (place / "report.json").is_file() for place in (folder, *parts)):
        raise ConfigError(f"{folder} holds a run already; go on with it by resume=True, or name another folder")
    if not resume or not (folder / "config.yaml").is_file():
        return
    if changed := config_diff(read_config(folder)[0], config):
        raise ConfigError(
            f"cannot resume {folder}: the configuration changed: {'; '.join(changed[:4])}; a resumed "
            "run keeps its settings, so name another folder for these"
        )


def check_data(run: Path, before: dict[str, dict[str, Any]], tasks: dict[str, TaskData]) -> None:
    """Raise ConfigError if a task's data are not those that `data_fingerprint` told of when the run began.

    Other images or classes under the same names would go unnoticed, and mix up everything learned.
    """
    for name, data in tasks.items():
        then, now = before[name], data_fingerprint(data)
        changed = [
            f"{key} was {then.get(key)}, now {now[key]}"
            for key in ("train", "val", "test", "classes")
            if then.get(key) != now[key]
        ]
        if not changed and then.get("labels_sha256", now["labels_sha256"]) != now["labels_sha256"]:
            changed = ["other labels, or in another order"]
        if changed:
            raise ConfigError(
                f"cannot resume {run}: the data of task {name} changed ({data.origin}): "
                f"{'; '.join(changed)}; put them back, or begin in another folder"
            )


def restore_weights(model: MultitaskViT, weights: dict[str, torch.Tensor], backbone_sha256: str, folder: Path) -> None:
    """Load what training changed over the backbone it was trained from.

    Raises:
        CheckpointError: another backbone than the run's, or other parameters than the model's.
    """
    reference = model.unchanged_backbone_names()
    if reference - weights.keys() and model.backbone_sha256 != backbone_sha256:
        raise checkpoint.CheckpointError(
            f"{folder} holds only what training changed, over a backbone with sha256 "
            f"{backbone_sha256[:12]}...; the weights now given have {model.backbone_sha256[:12]}...; name the file "
            "the run was trained from: backbone.weights=FILE to resume, weights=FILE to load"
        )
    expected = model.state_dict().keys()
    problems = [f"missing {k}" for k in expected - weights.keys() - reference]
    problems += [f"unexpected {k}" for k in weights.keys() - expected]
    if problems:
        raise checkpoint.CheckpointError(f"{folder} does not fit the model: {'; '.join(sorted(problems)[:6])}")
    model.load_state_dict(weights, strict=False)


def count_test_evaluation(run: Path, tasks: Iterable[str] = ()) -> int:
    """Note one more evaluation on test data and return how many there were; the report keeps the count.

    Counting comes before evaluating: one that fails half-way has seen test data too.

    Args:
        tasks: what is evaluated, by default all. In an STL run each of these is counted in its own run, and the
            whole run counts as often as the one evaluated most.
    """
    known = report.read(run) or {}
    config, _ = read_config(run)
    if config.mode == "single_task":
        for task in tasks or config.task_names():
            count_test_evaluation(run / task)
        count = max(test_evaluations(run / task) for task in config.task_names())
    else:
        log = run / "test_evaluations.log"
        with log.open("a") as stream:
            stream.write(f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}\n")
        count = test_evaluations(run)
    if known:
        report.write(run, known | {"test_evaluations": count})
    return count


def test_evaluations(run: Path) -> int:
    """How often the test split of a complete run was evaluated."""
    log = run / "test_evaluations.log"
    return len(log.read_text().splitlines()) if log.is_file() else 0
