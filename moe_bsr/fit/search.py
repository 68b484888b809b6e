"""Search for the best model: a linear probe, short trials of plans that train blocks, and the best trial for the rest.

Every candidate is a training run in a folder of its own, and may start from the weights of an earlier one. All have the
same data splits, so their validation accuracies are comparable. The time budget starts when the images are opened and
covers everything except the single test at the end.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError, require
from moe_bsr.evaluation.metrics import half_width
from moe_bsr.fit import candidates, memory_limit
from moe_bsr.fit.measure import measure
from moe_bsr.model.backbones import require_tokens
from moe_bsr.model.multitask import build
from moe_bsr.runs.folder import open_task
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import made_by
from moe_bsr.training.callback import Callback
from moe_bsr.training.failures import NonFiniteLoss
from moe_bsr.training.feature_cache import FeatureCache

FOR_VALIDATION = 0.03  # share of the budget for one evaluation of all tasks
LEAST_VALIDATION = 20  # images per task
FOR_PROBE = 0.85  # largest share of the budget: new images bring more than training blocks on those seen
FOR_FEATURES = 0.75  # share of the probe's time for computing features. The rest is for solving.
FOR_TRIAL = 0.08  # share of the time left after the probe, for each trial
RATES = (1 / 3, 3.0)  # factors on the best trial's learning rate that are tried as well
LEAST_TRIAL = 20.0  # seconds. The result of a shorter trial would be meaningless.


@dataclass(frozen=True, slots=True)
class Budget:
    """What `fit` may spend.

    Attributes:
        minutes: for everything but the test. memory: bytes for the whole process; None: most of the free memory.
    """

    minutes: float
    memory: int | None = None


@dataclass(slots=True)
class Candidate:
    """Result of a candidate.

    Attributes:
        run: its folder.
        val_top1: mean over the tasks, percent. interval: half-width of its 95 % interval. tasks: top-1 by task.
        seconds: in total. training: of training alone. planned: the limit for training.
        peak_mb: measured peak of the process. predicted_mb: its prediction.
    """

    name: str
    run: str
    val_top1: float
    interval: float
    tasks: dict[str, float]
    seconds: float
    training: float
    planned: float
    updates: int
    peak_mb: float
    predicted_mb: float
    settings: dict[str, Any] = field(default_factory=dict)


class Search:
    """The runs of one `fit`.

    Attributes:
        candidates: results of the finished runs, in order.
        overhead: seconds that a run takes besides training.
        interrupted: number of the signal that ended a run, or 0.
        left_out: whether a candidate did not fit or was refused.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        budget: Budget,
        say: Callable[[str], None] = lambda line: None,
        callbacks: list[Callback] | None = None,
    ) -> None:
        """Make a search.

        Args:
            config: tasks, backbone and plan. Its training length is ignored. folder: for the runs, empty or new.
            say: called with a line for each decision. callbacks: for every run, as in `api.train`.

        Raises:
            ConfigError: the folder is not empty, or the configuration has a model for each task or trains only heads.
        """
        require_tokens(config.backbone, "fit")
        if config.mode != "multitask":
            raise ConfigError(f"mode = {config.mode!r}: multitask, because fit trains one model for all tasks")
        why = "because fit decides itself what trains"
        require(config.train.optimizer != "lbfgs", "train.optimizer", "lbfgs", f"adamw, adamw8, sgd or mezo, {why}")
        require(config.train.only is None, "train.only", config.train.only, f"null, {why}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} already exists; name another folder for the runs")
        ignored = ("eval_every", "patience", "init_from", "epochs", "minutes", "warmup_steps")
        settings = {"evaluate_test": False, "pictures": False, "steps": 1000} | dict.fromkeys(ignored)
        train = dataclasses.replace(config.train, **settings)
        self.config = dataclasses.replace(config, train=train)
        self.folder, self.budget, self.say, self.callbacks = folder, budget, say, callbacks
        self.runtime = prepare(config.runtime)
        self.shared: FeatureCache | None = None  # shared by probe and late
        self.began, self.candidates, self.overhead = time.monotonic(), [], 0.0
        self.interrupted, self.left_out = 0, False

    def run(self) -> dict[str, Any]:
        """Run the candidates, write `fit.json`, and return its content.

        Raises:
            ConfigError: nothing fits into the memory. Other errors are those of `api.train`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.runtime.in_effect():
            self.speed, self.memory = measure(self.config, self.runtime, self.budget.memory, self.left())
        self.overhead = self.speed.opening  # an estimate until a run has finished
        self._limit_validation()
        speed, config = self.speed, self.config
        seconds = FOR_PROBE * self.left()
        few = self._with_fewer_images(config, FOR_FEATURES * (seconds - self.overhead))
        late = self._share_features(candidates.late(few, speed.depth, speed.head_blocks))
        probe = candidates.with_features_of(candidates.probe(few, speed.head_blocks), late)
        if self._go("probe", probe, seconds, shares=True) and self.left() >= 3 * LEAST_TRIAL:
            self._train_the_best(late)
        return self._conclude()

    def left(self) -> float:
        """Return the remaining seconds of the budget."""
        return 60 * self.budget.minutes - (time.monotonic() - self.began)

    def _train_the_best(self, late: Config) -> None:
        """Try each plan briefly, then other learning rates for the best plan, then train it for the remaining time."""
        rest = self.left()
        trial = FOR_TRIAL * rest
        own = candidates.own_candidates(self.config, self.speed.head_blocks)
        if trial < LEAST_TRIAL or not own:
            if own:
                left = f"{', '.join(own)} would need a trial of {LEAST_TRIAL:.0f} s, and there are {trial:.0f}"
                self.say(f"{left}: late gets the remaining time")
            self._go("late", late, self.left(), "probe", shares=True)
            return
        arms = {"late": late} | own
        for name, config in arms.items():
            if not self._go(f"trial_{name}", config, trial, "probe", shares=name == "late"):
                return
        tried = {name: candidate.val_top1 for name in arms if (candidate := self._of(f"trial_{name}"))}
        if not tried:
            return
        chosen = max(tried, key=tried.__getitem__)
        config, shares = arms[chosen], chosen == "late"
        rate, best, most = config.train.lr, f"trial_{chosen}", tried[chosen]
        for factor in RATES:
            name = f"trial_{chosen}_{rate * factor:.0e}"
            if not self._go(name, _at(config, rate * factor), trial, "probe", shares):
                return
            if (candidate := self._of(name)) and candidate.val_top1 > most:
                best, most, config = name, candidate.val_top1, _at(config, rate * factor)
        self.say(f"{chosen} did best in the trials; it continues from {best} for the remaining time")
        if not shares:
            self.shared = None  # frees its memory
        self._go(chosen, config, self.left(), best, shares)

    def _go(self, name: str, config: Config, seconds: float, start: str | None = None, shares: bool = False) -> bool:
        """Run a candidate if it fits, and add its result to `candidates`. Return False if a signal interrupted it.

        Args:
            seconds: limit for the whole run. start: the candidate whose weights it starts from.
            shares: whether it reads the shared feature cache.
        """
        began, solved = time.monotonic(), config.train.optimizer == "lbfgs"
        minutes = max(0.5, min(seconds, self.left()) - 1.1 * self.overhead) / 60
        origin = None if start is None else str(self.folder / start)
        train = dataclasses.replace(config.train, steps=None, minutes=minutes, init_from=origin)
        try:
            fitted = self._fitted(dataclasses.replace(config, train=train), shares)
            config, form = fitted.config, f"storage {fitted.config.storage}"
            if not solved:
                form += f", micro-batches of {config.train.batch_size // config.train.grad_accumulation_steps}"
            length = f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
            self.say(f"{name}: {length}, {form}, {fitted.bytes / 2**20:.0f} MB predicted for the process")
            report = api.train(
                config, self.folder / name, callbacks=self.callbacks, features=self.shared if shares else None
            )
        except ConfigError as error:
            if not self.candidates:
                raise
            self.say(f"{name} is left out: {error}")
            self.left_out = True
            return True
        except NonFiniteLoss as error:  # the learning rate is too high: the candidate counts with an accuracy of 0
            self.say(f"{name}: {error}")
            self.candidates.append(self._diverged(name, time.monotonic() - began, minutes, config))
            return True
        took = time.monotonic() - began
        if report["status"] != "finished":
            self.interrupted = report["signal"]
            return False
        training = report["train_seconds"]
        self.overhead = max(self.overhead, took - training)
        tasks = {task: about["top1"] for task, about in report["tasks"].items()}
        counts = {task: about["n"] for task, about in report["tasks"].items()}
        mean = report["selected_mean_val_top1"]
        self.candidates.append(
            Candidate(
                name,
                str(self.folder / name),
                mean,
                half_width(tasks, counts),
                tasks,
                took,
                training,
                60 * minutes,
                report["step"],
                report["measured_peak_mb"],
                fitted.bytes / 2**20,
                {"lr": config.train.lr, "storage": config.storage, "init_from": origin},
            )
        )
        self.say(f"{name}: {mean:.2f} % validation top-1, {took:.0f} s in total, {self.left():.0f} s left")
        return True

    def _fitted(self, config: Config, shares: bool) -> memory_limit.Fitted:
        """Return the form in which the run fits. If needed, the shared feature cache is given up for it."""

        def within(memory: memory_limit.Memory) -> memory_limit.Fitted:
            return memory_limit.fitted(config, self.speed.classes, memory, self.runtime.precision, self.speed.decoded)

        if self.shared is not None and not shares:
            try:
                return within(dataclasses.replace(self.memory, base=self.memory.base + self.shared.bytes))
            except ConfigError:
                self.say("the cached features do not fit beside this run and are dropped; late will recompute them")
                self.shared = None
        return within(self.memory)

    def _diverged(self, name: str, took: float, minutes: float, config: Config) -> Candidate:
        zero, place = dict.fromkeys(self.speed.classes, 0.0), str(self.folder / name)
        settings = {"lr": config.train.lr, "storage": config.storage, "init_from": config.train.init_from}
        return Candidate(
            name, place, 0.0, 0.0, zero, took, took, 60 * minutes, 0, self.runtime.peak_mb(), 0.0, settings
        )

    def _of(self, name: str) -> Candidate | None:
        """Return the candidate's result; None if it was left out."""
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def _limit_validation(self) -> None:
        """Set `data.val_images` so that one evaluation takes at most its share of the budget."""
        speed, asked = self.speed, self.config.data.val_images
        seconds = FOR_VALIDATION * 60 * self.budget.minutes
        count = max(LEAST_VALIDATION, int(seconds / speed.forward / len(speed.classes)))
        count = count if asked is None else min(asked, count)
        self.config = configuration.replace(self.config, data__val_images=count)
        images = sum(speed.images.values())
        self.say(
            f"{1000 * speed.forward:.1f} ms per image for the backbone, {images} training images: "
            f"{images * speed.forward:.0f} s for one pass over all; validation on at most {count} images per task"
        )

    def _with_fewer_images(self, config: Config, seconds: float) -> Config:
        """Set `data.train_images` so that the backbone can process training and validation images in `seconds`."""
        speed = self.speed
        validation = config.data.val_images * len(speed.classes)
        affordable = max(len(speed.classes), int(seconds / speed.forward) - validation)
        count, sizes = 0, sorted(speed.images.values())
        for place, size in enumerate(sizes):
            count = max(count, (affordable - sum(sizes[:place])) // (len(sizes) - place))
            if count <= size:
                break
        least = max(speed.classes.values())
        if max(count, least) >= sizes[-1]:
            return config
        if count < least:
            self.say(f"the time is too short for one image per class; {least} images per task are used nevertheless")
        else:
            self.say(f"{seconds:.0f} s are enough for {count} images per task: probe and late train on these")
        return configuration.replace(config, data__train_images=max(least, count))

    def _share_features(self, late: Config) -> Config:
        """Return `late` with a feature cache, which the probe fills already, if the memory allows one."""
        tasks = {name: open_task(late, file) for name, file in late.task_files().items()}
        sizes = {name: len(data.train) for name, data in tasks.items()}
        itemsize = 2 if self.runtime.precision == "bf16" else 4
        try:
            left, speed = self._fitted(late, shares=True).left, self.speed
        except ConfigError:  # reported when the candidate is run
            return late
        kept = memory_limit.with_feature_cache(late, left, sum(sizes.values()), speed.tokens, speed.width, itemsize)
        if kept.data.feature_cache_mb:
            with self.runtime.in_effect(), self.runtime.autocast():
                model = self.runtime.place(build(kept, speed.classes))
                self.shared = FeatureCache(model, sizes, kept.data)
        return kept

    def _conclude(self) -> dict[str, Any]:
        best = max(self.candidates, key=lambda candidate: candidate.val_top1, default=None)
        result = {
            **made_by(self.runtime),
            "minutes": self.budget.minutes,
            "memory_bytes": self.memory.limit,
            "memory_reason": self.memory.reason,
            "seconds": time.monotonic() - self.began,
            "forward_seconds": self.speed.forward,
            "validation_images": self.config.data.val_images,
            "training_images": self.speed.images,
            "best": best and best.name,
            "run": best and best.run,
            "reason": best and self._reason(best),
            "signal": self.interrupted,
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }
        write_whole(self.folder / "fit.json", json.dumps(result, indent=1))
        return result

    def _reason(self, best: Candidate) -> str:
        """Return a sentence that says why this candidate was chosen."""
        second = max((r for r in self.candidates if r is not best), key=lambda r: r.val_top1, default=None)
        if second is None:
            time = f"fits into the time: training blocks needs {3 * LEAST_TRIAL:.0f} s after it"
            return f"only {best.name} " + ("could be trained" if self.left_out else time)
        ahead = best.val_top1 - second.val_top1
        sure = "outside" if ahead > math.hypot(best.interval, second.interval) else "within"
        return (
            f"{best.name} has the highest validation top-1, {best.val_top1:.1f} %. It is {ahead:.1f} points ahead of "
            f"{second.name}, {sure} the 95 % interval of the difference"
        )


def _at(config: Config, rate: float) -> Config:
    return configuration.replace(config, train__lr=rate, train__min_lr=min(config.train.min_lr, rate))
