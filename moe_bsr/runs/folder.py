"""The run folder: what a run writes down about itself, and how a trained model comes back from it.

`config.yaml` holds the configuration and, under `resolved`, everything it led to: precision, threads,
image settings, classes, the hash of the backbone's weights, versions.
"""

import datetime
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from moe_bsr.model.backbones import vit as backbone
from moe_bsr.runs import checkpoint
from moe_bsr.runs import report
from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.data import ImageTransforms, TaskData, load_spec, load_task
from moe_bsr.evaluation.evaluate import chosen_tasks
from moe_bsr.runtime.device import Runtime, prepare
from moe_bsr.model.multitask import MultitaskViT, build, build_on_meta

# What may differ between a run and its resumption without changing what is computed.
RESUMABLE_KEYS = ("runtime", "data.root", "data.download", "data.image_cache_mb", "data.feature_cache_mb", "data.prefetch",
                  "train.checkpoint_every", "train.evaluate_test", "backbone.weights")

# What a trained model is rebuilt from, and the last key written: without it the file was cut.
RESOLVED = ("backbone_sha256", "tasks", "precision", "python")


@dataclass(slots=True)
class TrainedRun:
    """A trained run, ready to use.

    Attributes:
        models: by task; in a multitask run the same model for all, in an STL run one each.
        step: of the checkpoint; in an STL run the largest of its models'.
        weights: "average" (EMA) or "live".
    """

    run: Path
    config: Config
    models: dict[str, MultitaskViT]
    transforms: ImageTransforms
    runtime: Runtime
    class_names: dict[str, list[str]]
    step: int
    weights: str
    data_root: str | None = None
    _data: dict[str, TaskData] = field(default_factory=dict)

    def data(self, task: str) -> TaskData:
        """The task's dataset, opened at the first call."""
        if task not in self._data:
            data = open_task(self.config, self.config.task_files()[task], self.data_root)
            if list(data.class_names) != self.class_names[task]:
                raise ConfigError(f"task {task}: its data now have other classes than the run was trained "
                                  f"on ({data.origin})")
            self._data[task] = data
        return self._data[task]


def load(run: str | Path, checkpoint_name: str | int = "best", data_root: str | None = None,
         device: str | None = None, weights: str | None = None, tasks: list[str] | None = None) -> TrainedRun:
    """The model of a run with its transforms and class names, in evaluation mode.

    Args:
        checkpoint_name: "best" (by mean validation top-1), "last", or a step.
        data_root: where the datasets are now, if not where they were.
        device: where to compute, if not where the run did. The precision stays the run's.
        weights: where the backbone's weights are now, if not where they were: a file, or "hub".
        tasks: only these; in an STL run the models of the others are not read, and need not be there yet.
    Raises:
        ConfigError: not a run folder. CheckpointError: missing or damaged checkpoint.
        ValueError: a task that the run does not have.
    """
    run = Path(run)
    config, resolved = read_config(run)
    chosen = chosen_tasks(tasks, config.task_names())
    if config.mode == "single_task":
        _refuse_untrained(run, chosen, config.task_names())
        parts = {task: load(run / task, checkpoint_name, data_root, device, weights) for task in chosen}
        first = next(iter(parts.values()))
        return TrainedRun(run, config, {t: p.models[t] for t, p in parts.items()}, first.transforms, first.runtime,
                      {t: p.class_names[t] for t, p in parts.items()},
                      max(p.step for p in parts.values()), first.weights, data_root)
    config.runtime.precision = resolved["precision"]
    runtime = _prepare_for(run, config, device)
    names = {task: about["classes"] for task, about in resolved["tasks"].items()}
    classes = {task: len(known) for task, known in names.items()}
    folder = _named_checkpoint(run, checkpoint_name)
    tensors, state = checkpoint.read(folder)
    if build_on_meta(config, classes).state_dict().keys() <= tensors["weights"].keys():
        config.backbone.weights = "random"  # everything was saved: no need for the backbone's file
    elif weights is not None:
        config.backbone.weights = weights
    try:
        model = build(config, classes)
    except ConfigError as error:  # the plan passed above: it is the weights
        raise ConfigError(f"{run}: {error}. The run needs the weights it was trained from: --weights says where "
                          "they are now") from error
    restore_weights(model, tensors["weights"], resolved["backbone_sha256"], folder)
    average = tensors.get("average")
    if average:
        model.load_state_dict(average, strict=False)
    return TrainedRun(run, config, dict.fromkeys(chosen, runtime.place(model.eval())),
                  make_transforms(config, model), runtime, {task: names[task] for task in chosen}, state["step"],
                  "average" if average else "live", data_root)


def open_task(config: Config, task: str, root: str | None = None) -> TaskData:
    data = config.data
    return load_task(load_spec(task), root=Path(root or data.root).expanduser(), download=data.download,
                     validation=data.val_fraction, data_seed=data.split_seed)


def make_transforms(config: Config, model: MultitaskViT) -> ImageTransforms:
    settings = backbone.image_settings(config.backbone, model.vit)
    return ImageTransforms(**asdict(settings), resize=config.data.resize, augment=config.data.augment, flip=config.data.hflip,
                    crop_scale=config.data.crop_scale, seed=config.seed, cache_mb=config.data.image_cache_mb)


def write_config(run: Path, config: Config, model: MultitaskViT, transforms: ImageTransforms, runtime: Runtime,
                 tasks: dict[str, TaskData]) -> None:
    resolved = {
        "backbone_sha256": model.backbone_sha256,
        "images": {"size": transforms.size, "mean": list(transforms.mean), "std": list(transforms.std),
                   "interpolation": transforms.interpolation, "crop_pct": transforms.crop_pct},
        "tasks": {name: data_fingerprint(data) for name, data in tasks.items()},
        **environment(runtime),
    }
    tree = configuration.to_dict(config) | {"resolved": resolved}
    checkpoint.write_whole(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False, width=110))


def data_fingerprint(data: TaskData) -> dict[str, Any]:
    """What a resumed run must find again, and where it was."""
    labels = hashlib.sha256(b"".join(split.labels.tobytes() for split in (data.train, data.val, data.test)))
    return {"origin": data.origin, "train": len(data.train), "val": len(data.val), "test": len(data.test),
            "labels_sha256": labels.hexdigest(), "classes": list(data.class_names)}


def environment(runtime: Runtime) -> dict[str, Any]:
    return {"precision": runtime.precision, "precision_reason": runtime.precision_reason, "threads": runtime.threads,
            "device": str(runtime.device), "processor": processor(runtime), "torch": str(torch.__version__),
            "timm": timm.__version__, "python": platform.python_version()}


def processor(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    capabilities = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capabilities}"


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
        raise ConfigError(f"{file}: cut or damaged: {' '.join(str(error).split())}; put a copy in its place, or "
                          "train again into another folder") from error
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
        raise ConfigError(f"--run {folder}: is a file; name a folder")
    parts = [folder / name for name in config.task_names()] if config.mode == "single_task" else []
    if not resume and any(checkpoint.steps(place) or (place / "report.json").is_file()
                          for place in (folder, *parts)):
        raise ConfigError(f"--run {folder}: holds a run already; add --resume to go on with it, or name "
                          "another folder")
    if not resume or not (folder / "config.yaml").is_file():
        return
    if changed := config_diff(read_config(folder)[0], config):
        raise ConfigError(f"--resume {folder}: the configuration changed: {'; '.join(changed[:4])}; a resumed run "
                          "keeps its settings, so name another --run for these")


def check_data(run: Path, before: dict[str, dict[str, Any]], tasks: dict[str, TaskData]) -> None:
    """Raise ConfigError if a task's data are not those that `about_data` told of when the run began.

    Other images or classes under the same names would go unnoticed, and mix up everything learned.
    """
    for name, data in tasks.items():
        then, now = before[name], data_fingerprint(data)
        changed = [f"{key} was {then.get(key)}, now {now[key]}" for key in ("train", "val", "test", "classes")
                   if then.get(key) != now[key]]
        if not changed and then.get("labels_sha256", now["labels_sha256"]) != now["labels_sha256"]:
            changed = ["other labels, or in another order"]
        if changed:
            raise ConfigError(f"--resume {run}: the data of task {name} changed ({data.origin}): "
                              f"{'; '.join(changed)}; put them back, or begin in another --run")


def restore_weights(model: MultitaskViT, weights: dict[str, torch.Tensor], backbone_sha256: str,
                    folder: Path) -> None:
    """Load what training changed over the backbone it was trained from.

    Raises:
        CheckpointError: another backbone than the run's, or other parameters than the model's.
    """
    reference = model.unchanged_backbone_names()
    if reference - weights.keys() and model.backbone_sha256 != backbone_sha256:
        raise checkpoint.CheckpointError(
            f"{folder} holds only what training changed, over a backbone with sha256 "
            f"{backbone_sha256[:12]}...; backbone.weights now gives {model.backbone_sha256[:12]}...; name the file "
            "the run was trained from: backbone.weights=FILE to resume, --weights FILE to evaluate or predict")
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


def _refuse_untrained(run: Path, chosen: list[str], known: list[str]) -> None:
    """Say which of the chosen models of an STL run have no checkpoint yet, and what can be done."""
    trained = [task for task in known if checkpoint.steps(run / task)]
    if missing := [task for task in chosen if task not in trained]:
        others = f", or choose from those that are there: --task {' '.join(trained)}" if trained else ""
        raise checkpoint.CheckpointError(f"{run}: not trained yet: {', '.join(missing)}; go on with train.py "
                                         f"--resume{others}")


def _prepare_for(run: Path, config: Config, device: str | None) -> Runtime:
    """The machine to compute on: `device`, or what the run was configured for."""
    if device is not None:
        config.runtime.device = device
        return prepare(config.runtime)
    try:
        return prepare(config.runtime)
    except ConfigError as error:
        raise ConfigError(f"{run}: {error}. The run was trained there; give --device cpu to compute without "
                          "it") from error


def _named_checkpoint(run: Path, name: str | int) -> Path:
    if name in ("best", "last"):
        newest = checkpoint.latest(run)
        best = checkpoint.best_step(newest)
        return newest if name == "last" or best is None else run / "checkpoint" / str(best)
    folder = run / "checkpoint" / str(name)
    if not folder.is_dir():
        raise checkpoint.CheckpointError(f"no checkpoint {name} in {run}; there are best, last and "
                                         f"{', '.join(map(str, checkpoint.steps(run)))}")
    return folder
