"""Public functions: train a configuration, find a learning rate, evaluate a run, and let it reject foreign images.

They assemble data, model, predicted cost, callbacks and trainer. `moe_bsr.load` is in `runs`.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_bsr import config as configuration
from moe_bsr.callbacks import default_callbacks, loggers, require_loggers
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.config import Config, ConfigError, require
from moe_bsr.config.train import MOST_STEPS
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.data import TaskData
from moe_bsr.data.sampler import SAMPLERS
from moe_bsr.evaluation import evaluate as evaluation
from moe_bsr.model.multitask import MultitaskViT, build, build_on_meta
from moe_bsr.runs import checkpoint, kept_tasks, rejection, report, warm_start
from moe_bsr.runs import folder as run
from moe_bsr.runs.config_file import chosen_tasks
from moe_bsr.runs.load import TrainedRun, load
from moe_bsr.runs.lock import locked
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime, find_device, prepare
from moe_bsr.runtime.distributed import joined
from moe_bsr.runtime.files import write_whole
from moe_bsr.training import alast, lr_finder
from moe_bsr.training.about import about
from moe_bsr.training.callback import Callback
from moe_bsr.training.feature_cache import FeatureCache, make_inputs
from moe_bsr.training.inputs import Inputs
from moe_bsr.training.probe_trainer import ProbeTrainer
from moe_bsr.training.sharing import check_sharing, require_alike
from moe_bsr.training.trainer import Trainer


def train(
    config: Config,
    run_dir: str | Path,
    resume: bool = False,
    callbacks: list[Callback] | None = None,
    features: FeatureCache | None = None,
) -> dict[str, Any]:
    """Train a configuration in a run folder, and return its report.

        config = moe_bsr.config.load("quickstart.yaml", ["train.steps=100"])
        report = moe_bsr.train(config, "runs/mine")
        report["tasks"]["petals"]["top1"]

    Args:
        resume: continue from the newest intact checkpoint of the folder, or start if there is none.
        callbacks: replace the console, TensorBoard and the expert views. metrics.jsonl and the loggers in train.log_to
            are always written. `moe_bsr.callbacks` has Csv, WandB and MLflow.
            With `mode: single_task`, they receive one run after the other.
        features: feature cache of a run with the same images and frozen blocks, to use instead of a new one.
    Raises:
        ConfigError: an invalid configuration, or the folder holds another run or is in use by a process.
        CheckpointError: no intact checkpoint to resume from. ValueError: two callbacks have the same name.
        TrainingFailed: a started run could not go on: the disk is full, memory ran out, or (NonFiniteLoss) the loss or
            the gradient became infinite or NaN.
        FloatingPointError: logits became infinite or NaN in an evaluation.
        UnreadableImage: an image could not be decoded.
    """
    run_dir = Path(run_dir)
    with joined(find_device(config.runtime.device), config.train.exchange) as ranks, contextlib.ExitStack() as held:
        runtime = prepare(config.runtime, ranks)
        ranks.by_first(lambda: run.check_folder(config, run_dir, resume))
        check_sharing(config, ranks)
        check(config)
        if ranks.first:
            parts = [run_dir / name for name in config.task_names()] if config.mode == "single_task" else []
            for place in (run_dir, *parts):
                held.enter_context(locked(place))
        ranks.by_first(lambda: run.check_folder(config, run_dir, resume))  # the lock's last holder may have finished
        return _train(config, run_dir, resume, callbacks, runtime, features)


def _train(
    config: Config,
    run_dir: Path,
    resume: bool,
    callbacks: list[Callback] | None,
    runtime: Runtime,
    features: FeatureCache | None = None,
) -> dict[str, Any]:
    """Do the work of `train`, in a folder that is checked and locked."""
    ranks = runtime.ranks
    if resume and (done := ranks.by_first(lambda: report.complete(run_dir, config))) is not None:
        return done
    if config.mode == "single_task":
        if features is not None:
            raise ValueError("features belong to one model, and mode single_task trains one for each task")
        return _train_each_task(config, run_dir, resume, callbacks, runtime)
    tasks, notes = run.open_tasks(config, run_dir, resume)
    chosen = default_callbacks(run_dir) if callbacks is None else [Jsonl(run_dir), *callbacks]
    chosen += loggers(config.train.log_to, run_dir)
    with runtime.in_effect():
        model, origin = build_model(config, tasks, run_dir, resume)
        require_alike(ranks, model, tasks)
        notes += origin
        chosen = chosen if ranks.first else []
        trainer = make_trainer(config, runtime.place(model), tasks, runtime, run_dir, chosen, features)
        trainer.about += notes
        return trainer.fit(resume)


def build_model(
    config: Config, tasks: dict[str, TaskData], run_dir: Path, resume: bool
) -> tuple[MultitaskViT, list[str]]:
    """Return the model of a run at its start, and notes on what it took from the run `train.init_from`.

    A resumed run does not need that other run.
    """
    kept = {name: about["classes"] for name, about in kept_tasks.records(config, run_dir, resume).items()}
    opened = {name: list(data.class_names) for name, data in tasks.items()}
    classes = {name: (kept | opened)[name] for name in config.task_names()}
    if config.train.init_from is None or (resume and checkpoint.steps(run_dir)):
        return build(config, {name: len(names) for name, names in classes.items()}, checked=True), []
    return warm_start.build_from(config.train.init_from, config, classes)


def check(config: Config) -> None:
    """Check a configuration before data are opened or weights are read.

    Raises:
        ConfigError: an impossible plan; an unknown storage, adapter, router, sampler or backbone; a package in
            train.log_to that is not installed; or parameters that do not fit into memory.
    """
    SAMPLERS.choose(config.sampler.kind)
    require_loggers(config.train.log_to)
    model = build_on_meta(config, dict.fromkeys(config.task_names(), 2))
    alast.check(model, config)
    run.make_transforms(config, model)
    _check_parameters(model, find_device(config.runtime.device))


def _train_each_task(
    config: Config, run_dir: Path, resume: bool, callbacks: list[Callback] | None, runtime: Runtime
) -> dict[str, Any]:
    """Train one complete run per task. On resume, finished runs are not repeated."""
    ranks = runtime.ranks
    ranks.by_first(lambda: write_whole(run_dir / "config.yaml", configuration.dump(config)))
    parts: dict[str, dict[str, Any]] = {}
    names = config.task_names()
    for name in names:
        parts[name] = _train(config.of_task(name), run_dir / name, resume, callbacks, runtime)
        whole = report.aggregate(config, parts)
        if ranks.first:
            report.write(run_dir, whole)
        if parts[name]["status"] != "finished":
            break
    return whole


def make_trainer(
    config: Config,
    model: MultitaskViT,
    tasks: dict[str, TaskData],
    runtime: Runtime,
    run_dir: Path,
    callbacks: list[Callback],
    features: FeatureCache | None = None,
) -> Trainer:
    """Return the trainer of one run, with its inputs, its predicted cost and the lines about it.

    Args:
        model: already on its device (`runtime.place`).
    """
    transforms = run.make_transforms(config, model, runtime.ranks.local)
    inputs = make_inputs(config, model, tasks, transforms, runtime, features)
    predicted = _predict(config, model, runtime) if runtime.ranks.first else None
    steps = config.train.optimizer != "lbfgs"  # lbfgs computes features once: there is no training step
    gflops = predicted and predicted.forward_flops / _micro_batch(config) / 1e9
    prediction = f"predicted: {gflops:.2f} GFLOPs an image" if predicted else "no predicted cost for part of this model"
    if predicted is not None and steps:
        _warn_of_memory(config, inputs, predicted)
        prediction = predicted.summary(_micro_batch(config))
    lines = about(config, model, tasks, runtime, run_dir, prediction) + inputs.summary()
    costs = {"predicted_peak_mb": predicted.peak / 2**20 if predicted and steps else None, "gflops_per_image": gflops}
    trainer = Trainer if steps else ProbeTrainer
    return trainer(config, model, inputs, runtime, run_dir, callbacks=callbacks, about=lines, costs=costs)


def _check_parameters(model: MultitaskViT, device: torch.device) -> None:
    """Raise ConfigError if the model's parameters alone do not fit into memory."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = memory.available(device)
    if free is not None and needed > free[0]:
        raise ConfigError(
            f"backbone.name, moe.num_experts: the model's parameters alone take {needed / 2**20:.0f} MB, and "
            f"{free[1]} has {free[0] / 2**20:.0f} MB free; take a smaller backbone or fewer experts"
        )


def _warn_of_memory(config: Config, inputs: Inputs, predicted: Cost) -> None:
    """Warn if the predicted peak, beside the model that is loaded already, exceeds the free memory."""
    free = memory.available(inputs.runtime.device)
    step = predicted.peak - predicted.parameters
    images = inputs.cached_bytes()
    if inputs.runtime.device.type == "cpu":
        step, what = step + images, f"{step / 2**20:.0f} MB for an update and {images / 2**20:.0f} MB of cached images"
    else:
        what = "for an update"
    if free is not None and step > free[0]:
        warnings.warn(
            f"this run may run out of memory: beside the model it needs about {step / 2**20:.0f} MB ({what}), and "
            f"{free[1]} has {free[0] / 2**20:.0f} MB free; {memory.REMEDY}, or lower data.image_cache_mb",
            stacklevel=3,
        )


def _predict(config: Config, model: MultitaskViT, runtime: Runtime) -> Cost | None:
    try:
        return predict(model, config, batch=_micro_batch(config), precision=runtime.precision, all_tasks=True)
    except Exception as error:  # a failed prediction must not stop training
        warnings.warn(f"the cost of this run could not be predicted: {type(error).__name__}: {error}", stacklevel=2)
        return None


def _micro_batch(config: Config) -> int:
    return config.train.batch_size // config.train.grad_accumulation_steps


def find_lr(config: Config, steps: int | None = None, low: float = 1e-6, high: float = 1.0) -> dict[str, Any]:
    """Search for a learning rate: record the loss while the rate rises from `low` to `high` (`training.lr_finder`).

    No file is written.

    Args:
        steps: number of updates; by default 100, or 30 per task if that is more.
    Returns:
        suggestion: a value for train.lr, the rate at which the loss falls fastest; None if it never falls.
        lowest: the rate with the lowest loss.
        diverged: whether the search ended before `high`.
        curve: [{lr, loss, smoothed}, ...], one entry per update.
    Raises:
        ConfigError: an invalid configuration, one with a model per task, or one with train.optimizer = lbfgs.
    """
    require(config.mode == "multitask", "mode", config.mode, "multitask, with one task: it tunes one model")
    solver = config.train.optimizer
    require(solver != "lbfgs", "train.optimizer", solver, "adamw, adamw8 or sgd: a solver has no learning rate")
    steps = steps or max(100, 30 * len(config.tasks))
    require(10 <= steps <= MOST_STEPS, "steps", steps, "at least 10")
    require(0 < low < high <= 1e4, "low, high", (low, high), "0 < low < high, at most 10,000")
    updates = {"steps": steps, "epochs": None, "minutes": None, "patience": None, "warmup_steps": None}
    planned = dataclasses.replace(config, train=dataclasses.replace(config.train, **updates, log_to=[]))
    runtime = prepare(config.runtime)
    check(planned)
    with tempfile.TemporaryDirectory() as nowhere, runtime.in_effect():
        tasks, _ = run.open_tasks(planned, Path(nowhere))
        model = runtime.place(build_model(planned, tasks, Path(nowhere), False)[0])
        inputs = make_inputs(planned, model, tasks, run.make_transforms(planned, model), runtime)
        trainer = Trainer(planned, model, inputs, runtime, Path(nowhere))
        points = lr_finder.curve(trainer, lr_finder.ramp(low, high, steps))
    require(len(points) > 1, "low", low, "a smaller rate: the loss is not finite after the first update")
    return {
        "suggestion": lr_finder.steepest(points),
        "lowest": min(points, key=lambda point: point.smoothed).lr,
        "diverged": len(points) < steps,
        "curve": [dataclasses.asdict(point) for point in points],
    }


def evaluate(
    run_dir: str | Path | TrainedRun,
    split: str = "val",
    tasks: list[str] | None = None,
    *,
    batch_size: int = 64,
    on_task: Callable[[str, int], None] = lambda task, images: None,
    **options: Any,
) -> dict[str, Any]:
    """Return accuracy, calibration, tokens kept and experts used for each task of a run.

    Args:
        run_dir: a run folder, or what `load` returned.
        split: "val" or "test". The run counts its test evaluations.
        tasks: evaluate only these tasks, in this order; by default, and for an empty list, all.
        on_task: called before each task with its name and number of images.
        options: arguments of `load` for a folder, such as data_root or skip_unreadable.
    Returns:
        run, step, split, mean_top1, tasks ({name: numbers}), data_changes ({name: how its images of this split differ
        from those at the start of the run}, only tasks that differ) and, for the test split, test_evaluations.
    Raises:
        ValueError: the split or a task does not exist.
        ConfigError: not a run folder, or validation images differ from those at the start of the run.
        UnreadableImage: an image cannot be read. The evaluation is not counted if a missing or changed image was one.
        CheckpointError: a missing or damaged checkpoint.
        FloatingPointError: logits are not finite.
    """
    if split not in ("val", "test"):
        raise ValueError(f"split: {split!r} is neither 'val' nor 'test'")
    if isinstance(run_dir, TrainedRun):
        chosen = chosen_tasks(tasks, list(run_dir.models))
        trained = dataclasses.replace(run_dir, models={task: run_dir.models[task] for task in chosen})
    else:
        trained = load(run_dir, tasks=tasks, **options)
    data = {task: trained.data(task, split) for task in trained.models}  # may fail: not counted yet
    changes = {task: str(changed) for task in data if (changed := trained.changes[task][split])}
    result: dict[str, Any] = {"run": str(trained.run), "step": trained.step, "split": split, "data_changes": changes}
    if split == "test":
        result["test_evaluations"] = run.count_test_evaluation(trained.run, list(data))
    scores = {}
    for task, model in trained.models.items():
        on_task(task, len(getattr(data[task], split)))
        scores[task] = evaluation.evaluate(model, data[task], split, trained.transforms, trained.runtime, batch_size)
    return result | {"mean_top1": statistics.fmean(s["top1"] for s in scores.values()), "tasks": scores}


def reject(
    run_dir: str | Path | TrainedRun,
    *,
    batch_size: int = 64,
    on_task: Callable[[str, int], None] = lambda task, images: None,
    **options: Any,
) -> dict[str, Any]:
    """Teach a run to reject images that belong to none of its tasks; `TrainedRun.predict` does so from then on.

    This takes one pass over training images (at most 5,000 per task) and validation images. It selects the score in
    `evaluation.rejection.SCORES` that best separates the tasks' validation images, with a threshold that accepts 95 %
    of a task's own.

    Args:
        run_dir: a run folder, or what `load` returned.
        on_task: called before each task with its name and number of images.
        options: arguments of `load` for a folder, such as data_root or skip_unreadable.
    Returns:
        run, step, score (its name), accepted (the share), mean_auroc {score: number}, tasks {name: train_images,
        val_images and, in a run of several tasks, auroc, rejected, named, foreign (`runs.rejection`)}. The run's report
        gets the same values under `rejection`.
    Raises:
        ConfigError: not a run folder, or the images differ from the run's.
        CheckpointError: a missing or damaged checkpoint.
        FloatingPointError: features are not finite.
    """
    trained = run_dir if isinstance(run_dir, TrainedRun) else load(run_dir, **options)
    return rejection.learn(trained, batch_size, on_task)
