"""Load a trained model from its run folder, with its transforms and class names.

    run = moe_bsr.load("runs/quickstart")
    found = run.predict("photos/")
    print(found["images"][0]["tasks"]["petals"][0]["name"])

Loading changes no settings of the program that loads, such as its threads or memory allocator.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_bsr.config import Config, ConfigError
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.data.spec import spec_from
from moe_bsr.model.multitask import MultitaskViT, build, build_on_meta
from moe_bsr.runs import archive, checkpoint, contents, data_record, ordinary, rejection, shared_form
from moe_bsr.runs.config_file import chosen_tasks, read_config
from moe_bsr.runs.folder import make_transforms, open_task, restore_weights
from moe_bsr.runs.predict import Images, predict_images
from moe_bsr.runtime.device import Runtime, most_threads, prepare

SKIP = "leave out what cannot be read (skip_unreadable=True)"


@dataclass(slots=True)
class TrainedRun:
    """A trained run, ready to use. Make it with `load`.

    Attributes:
        models: model by task: the same one for all tasks, or in a single-task run one per task.
        class_names: by task, in the order of the logits.
        step: step of the checkpoint; in a single-task run the largest one of its models.
        weights: "average" (moving average) or "live".
        recorded: by task, the entry that `data_record.write` made when the run began.
        data_root: folder of the datasets.
        changes: by task and split, how the images differ from those the run began with. Filled by `data`.
    """

    run: Path
    config: Config
    models: dict[str, MultitaskViT]
    transforms: ImageTransforms
    runtime: Runtime
    class_names: dict[str, list[str]]
    step: int
    weights: str
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)
    data_root: str | None = None
    changes: dict[str, dict[str, data_record.Changes]] = field(default_factory=dict)
    _data: dict[str, TaskData] = field(default_factory=dict)
    _detectors: dict[str, rejection.Detector] | None = None

    def data(self, task: str, split: str = "val") -> TaskData:
        """Return the task's dataset with the splits that the run began with. It is opened at the first call.

        Args:
            split: split that will be used. Altered images in it are refused, those of the test split only recorded in
                `changes`. Missing ones are refused unless data.unreadable is skip.
        Raises:
            ConfigError: the data have other classes than the run was trained on, or images of this split have changed.
            UnreadableImage: an image of the test split is missing, or has changed and cannot be read.
        """
        if task not in self._data:
            about = self.recorded[task]
            spec = spec_from(task, about["spec"])
            own = about.get("data_root", "")  # only for a task that was trained in another run
            data = open_task(self.config, spec, own if Path(own).is_dir() and own else self.data_root)
            folder = self.run / task if self.config.mode == "single_task" else self.run
            self._data[task], self.changes[task] = data_record.follow(folder, data, about)
        data, changed = self._data[task], self.changes[task][split]
        if split == "test":
            self.transforms.check(data, split, changed.doubtful(data.test))
        elif changed.lost(self.config.data.unreadable):
            skip = "" if changed.lost("skip") else f"{SKIP}, "
            raise ConfigError(
                f"{self.run}: the {split} images of task {task} are not those of the run ({data.origin}): {changed}; "
                f"put them back, {skip}or evaluate the test split"
            )
        return data

    def grouped(self, tasks: Iterable[str]) -> list[list[str]]:
        """Group tasks whose models have the same frozen blocks. Such blocks run once for the group, see `outputs`."""
        groups: dict[tuple, list[str]] = {}
        for task in tasks:
            groups.setdefault(self.models[task].features_key(), []).append(task)
        return list(groups.values())

    def shared_blocks(self, group: list[str]) -> int:
        """Return how many of the first blocks compute the same for all tasks of a group (see `grouped`).

        In one model these are all blocks before the first with experts, also those that were trained.
        """
        first = self.models[group[0]]
        if any(self.models[task] is not first for task in group):
            return first.path_start
        return min(first.balance.blocks, default=len(first.plan))

    def outputs(self, images: Tensor, groups: list[list[str]]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield for each task its name, the inputs of its head (B, D) and its logits (B, classes).

        Args:
            images: (B, 3, S, S), normalized. groups: see `grouped`.
        """
        for tasks in groups:
            shared = self.shared_blocks(tasks)
            tokens, _ = self.models[tasks[0]].forward_features(images, upto=shared)
            for task in tasks:
                features = self.models[task].features_from(tokens, task, shared)
                yield task, features, self.models[task].classify(features, task)

    def predict(
        self,
        images: Images | Iterable[Images],
        tasks: list[str] | None = None,
        top: int = 3,
        reject: bool | None = None,
    ) -> dict[str, Any]:
        """Classify images for all tasks (or only `tasks`). Blocks that the tasks share run once per image.

            run.predict("photo.jpg")
            run.predict(["a.jpg", Image.open("b.png"), array], tasks=["pets"], top=5)

        Args:
            images: a file, a folder (with its subfolders), a PIL image, a uint8 array (H, W, 3) in RGB, or an
                iterable of these.
            top: number of class names per task, the most probable first.
            reject: whether to tell which task an image belongs to, if any. By default True if `moe_bsr.reject` was
                called for the run.
        Returns:
            Plain data, ready for JSON. `images` has {image, tasks: {task: [{name, probability}, ...]}} for each
            image that could be read, `skipped` has {image, reason} for the others. `image` is the file, or the
            position of an image that has none. `groups` tells which tasks shared how many blocks. With `reject` an
            image also has `belongs_to`, a task or None, and `margins` {task: number} in standard deviations of the
            task's own images. A task accepts an image if its margin is at least 0.
        Raises:
            ConfigError: `reject` is True, but `moe_bsr.reject` was not called for the run or for these weights.
            ValueError: a task is unknown, a folder has no images, or an array has another form.
            FloatingPointError: the model's outputs are not finite.
        """
        detectors = self._known_detectors(reject)
        return predict_images(self, images, chosen_tasks(tasks, list(self.models)), top, detectors)

    def _known_detectors(self, reject: bool | None) -> dict[str, rejection.Detector] | None:
        if reject is False:
            return None
        try:
            self._detectors = self._detectors or rejection.load(self)
        except ConfigError as error:
            if reject:
                raise
            warnings.warn(f"{error}; until then nothing is rejected", stacklevel=3)
        if reject and self._detectors is None:
            raise ConfigError(f"{self.run}: it has not learned to reject images: call moe_bsr.reject once")
        return self._detectors


def load(
    run: str | Path,
    checkpoint_name: str | int = "best",
    data_root: str | None = None,
    device: str | None = None,
    weights: str | None = None,
    tasks: list[str] | None = None,
    skip_unreadable: bool = False,
) -> TrainedRun:
    """Load the model of a run in evaluation mode, with its transforms and class names.

    Args:
        run: the run's folder, or the folder or zip file that `moe-bsr share` made of it.
        checkpoint_name: "best" (by mean validation top-1), "last", or a step.
        data_root: folder of the datasets, if they have moved.
        device: device to compute on, if it is not the run's. The precision stays the run's.
        weights: the backbone's weights, if they have moved: a file, or "hub".
        tasks: tasks to load, by default all. In a single-task run the models of the others need not exist yet.
        skip_unreadable: leave out images that are missing or cannot be read, whatever the run's data.unreadable says.
    Raises:
        ConfigError: this is not a run folder. CheckpointError: the checkpoint is missing or damaged.
        ValueError: the run does not have one of the tasks.
    """
    with archive.opened(Path(run)) as folder:
        loaded = _load(folder, checkpoint_name, data_root, device, weights, tasks)
    loaded.run, loaded.transforms.remedy = Path(run), SKIP
    if skip_unreadable:
        loaded.config.data.unreadable = loaded.transforms.unreadable = "skip"
    return loaded


def _load(
    run: Path,
    checkpoint_name: str | int,
    data_root: str | None,
    device: str | None,
    weights: str | None,
    tasks: list[str] | None,
) -> TrainedRun:
    """Load a run from a folder; see `load`."""
    ordinary.check(run)
    config, resolved = read_config(run)
    chosen = chosen_tasks(tasks, config.task_names())
    if config.mode == "single_task":
        ordinary.check(run, chosen)
        _require_trained(run, chosen, config.task_names())
        parts = {task: load(run / task, checkpoint_name, data_root, device, weights) for task in chosen}
        first = next(iter(parts.values()))
        return TrainedRun(
            run,
            config,
            {task: part.models[task] for task, part in parts.items()},
            first.transforms,
            first.runtime,
            {task: part.class_names[task] for task, part in parts.items()},
            max(part.step for part in parts.values()),
            first.weights,
            {task: part.recorded[task] for task, part in parts.items()},
            first.data_root,
        )
    config.runtime.precision = resolved["precision"]
    runtime = _prepare_for(run, config, device)
    names = {task: about["classes"] for task, about in resolved["tasks"].items()}
    classes = {task: len(known) for task, known in names.items()}
    saved = read_named(run, checkpoint_name, config)
    if build_on_meta(config, classes).state_dict().keys() <= saved.weights.keys():
        config.backbone.weights = "random"  # the checkpoint has all weights, so the backbone's file is not needed
    elif weights is not None:
        config.backbone.weights = weights
    try:
        model = build(config, classes, checked=True)
    except ConfigError as error:  # the plan was checked by build_on_meta, so this is about the backbone's weights
        raise ConfigError(
            f"{run}: {error}. The run needs the weights it was trained from: weights=FILE says where they are now"
        ) from error
    saved.check(model, config.train.ema_decay is not None)
    restore_weights(model, saved.weights, resolved["backbone_sha256"], saved.file.parent)
    if saved.average:
        model.load_state_dict(saved.average, strict=False)
    return TrainedRun(
        run,
        config,
        dict.fromkeys(chosen, runtime.place(model.eval())),
        make_transforms(config, model),
        runtime,
        {task: names[task] for task in chosen},
        saved.step,
        "average" if saved.average else "live",
        {
            task: {key: value for key, value in about.items() if data_root is None or key != "data_root"}
            for task, about in resolved["tasks"].items()
        },
        data_root or _data_root(config, resolved),
    )


def _require_trained(run: Path, chosen: list[str], known: list[str]) -> None:
    """Refuse a single-task run in which a model of `chosen` has no checkpoint yet."""
    trained = [task for task in known if checkpoint.steps(run / task)]
    if missing := [task for task in chosen if task not in trained]:
        others = f", or choose from those that are trained: tasks={trained}" if trained else ""
        raise checkpoint.CheckpointError(
            f"{run}: not trained yet: {', '.join(missing)}; go on training with resume=True{others}"
        )


def _data_root(config: Config, resolved: dict[str, Any]) -> str:
    """Return the absolute folder where the run found its data, or data.root if that folder does not exist here."""
    then = resolved.get("data_root", config.data.root)
    return then if Path(then).is_dir() else config.data.root


def _prepare_for(run: Path, config: Config, device: str | None) -> Runtime:
    """Return the runtime for `device`, or by default for the run's own device."""
    if (config.runtime.threads or 0) > most_threads():  # the run was trained on a larger machine
        config.runtime.threads = None
    if device is not None:
        config.runtime.device = device
        return prepare(config.runtime)
    try:
        return prepare(config.runtime)
    except ConfigError as error:
        raise ConfigError(f"{run}: {error}. The run was trained on it; device='cpu' computes without it") from error


@dataclass(slots=True)
class Saved:
    """Weights from a checkpoint or a shared run.

    Attributes:
        file: file of the weights.
        weights: tensors by name. average: moving average of the trained ones, if there is one.
        step: step of the checkpoint.
    """

    file: Path
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    step: int

    def check(self, model: MultitaskViT, averaged: bool) -> None:
        """Raise CheckpointError if the weights do not fit the model.

        Args:
            averaged: whether the configuration asks for a moving average.
        """
        contents.check_tensors(self.file, self.weights, contents.model_tensors(model))
        contents.check_average(self.file.parent, self.average, model, averaged)


def read_named(run: Path, name: str | int, config: Config) -> Saved:
    """Read a checkpoint of a run folder.

    Args:
        name: "best" (as recorded in the newest intact checkpoint), "last", or a step.
    Raises:
        CheckpointError: it is missing or damaged, or has other tasks than the configuration.
    """
    if shared_form.is_shared(run):
        file, weights, step = shared_form.read_weights(run)
        if str(name) not in ("best", "last", str(step)):
            raise checkpoint.CheckpointError(f"no checkpoint {name} in {run}: this shared run has only step {step}")
        return Saved(file, weights, None, step)
    folder, tensors, state = _read_checkpoint(run, name)
    contents.check_state(folder, state, config.trained_tasks())
    return Saved(folder / "weights.safetensors", tensors["weights"], tensors.get("average"), state["step"])


def _read_checkpoint(run: Path, name: str | int) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]]:
    why = ""
    if name in ("best", "last"):
        newest = checkpoint.latest(run)
        best = checkpoint.best_step(newest)
        if name == "last" or best is None or newest.name == str(best):
            return newest, *checkpoint.read(newest, verified=True)
        name, why = best, "; it is the best one, and there is no copy; checkpoint_name='last' takes the newest"
    there = checkpoint.steps(run)
    if str(name) not in map(str, there):
        others = why or f"; there are best, last and {', '.join(map(str, there))}"
        raise checkpoint.CheckpointError(f"no checkpoint {name} in {run}{others}")
    folder = run / "checkpoint" / str(name)
    try:
        return folder, *checkpoint.read(folder)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{error}{why}") from error
