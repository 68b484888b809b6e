"""Climbs: a probe, then trials of what else could train in the time that is left, then the best of them for the rest.

Every rung is a run in a folder of its own and begins from the weights of the one before. All have the same splits, so
that their validation accuracies compare. A budget counts everything from opening the images on but the one test.
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
from moe_bsr.config import Config, ConfigError
from moe_bsr.evaluation.metrics import half_width
from moe_bsr.fit import room, rungs
from moe_bsr.fit.measure import measure
from moe_bsr.model.backbones import require_tokens
from moe_bsr.model.multitask import build
from moe_bsr.runs.folder import open_task
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.provenance import command, commit, environment
from moe_bsr.training.callback import Callback
from moe_bsr.training.failures import NonFiniteLoss
from moe_bsr.training.feature_cache import FeatureCache

FOR_VALIDATION = 0.03  # of the time, that one evaluation of all tasks may take
LEAST_VALIDATION = 20  # images of a task
FOR_PROBE = 0.85  # of the time at most: an image not seen yet brings more than training blocks on those seen
FOR_FEATURES = 0.75  # of the probe's, to see images; the rest is to solve
FOR_START = 0.1  # of what is left then
FOR_TRIAL = 0.08  # the same, for each of them
RATES = (1 / 3, 3.0)  # of the learning rate of the best trial, which are tried as well
LEAST_TRIAL = 20.0  # seconds; what is shorter decides nothing


@dataclass(frozen=True, slots=True)
class Budget:
    """Attributes:
    minutes: for everything but the test. memory: bytes of the whole process; None: what the machine has free.
    """

    minutes: float
    memory: int | None = None


@dataclass(slots=True)
class Rung:
    """What a rung came to.

    Attributes:
        val_top1: mean over the tasks, percent. interval: half of its 95 % interval.
        seconds: of everything. training: of training alone. planned: what that was given at most.
        peak_mb: of the process, measured. predicted_mb: what was predicted for it.
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


class Ladder:
    """The runs of one `fit`.

    Attributes:
        rungs: those that are finished, in their order.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        budget: Budget,
        say: Callable[[str], None] = lambda line: None,
        callbacks: list[Callback] | None = None,
    ) -> None:
        """
        Args:
            config: its tasks, backbone and plan; its length is not used. folder: for the runs, empty or new.
            say: told what is decided, a line each. callbacks: of every run, as of `api.train`.
        Raises:
            ConfigError: the folder holds something, or the configuration has a model for each task.
        """
        require_tokens(config.backbone, "fit")
        if config.mode != "multitask":
            raise ConfigError(f"mode = {config.mode!r}: fit looks for one model of all tasks; multitask")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; name another folder for the runs")
        settings = {"evaluate_test": False, "pictures": False, "eval_every": None, "patience": None, "init_from": None}
        train = dataclasses.replace(config.train, **settings, steps=1000, epochs=None, minutes=None)
        self.config = dataclasses.replace(config, train=train)
        self.folder, self.budget, self.say, self.callbacks = folder, budget, say, callbacks
        self.runtime = prepare(config.runtime)
        self.shared: FeatureCache | None = None  # of the probe and of late
        self.began, self.rungs, self.overhead = time.monotonic(), [], 0.0  # of a run: seconds beside its updates
        self.interrupted, self.left_out = 0, False

    # --- the climb ---

    def climb(self) -> dict[str, Any]:
        """Run the rungs; returns what `fit.json` holds.

        Raises:
            ConfigError: nothing fits into the memory. Otherwise as `api.train`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.runtime.in_effect():
            self.speed, self.memory = measure(self.config, self.runtime, self.budget.memory, self.left())
        self.overhead = self.speed.opening  # until a run has shown more
        self._limit_validation()
        speed, config = self.speed, self.config
        shape = (speed.depth, speed.has_class_token)
        seconds = FOR_PROBE * self.left()
        few = self._with_fewer_images(config, FOR_FEATURES * (seconds - self.overhead))
        late = self._share_features(rungs.late(few, *shape))
        probe = rungs.with_features_of(rungs.probe(few, *shape), late)
        if self._go("probe", probe, seconds, shares=True) and self.left() >= 3 * LEAST_TRIAL:
            self._train_the_best(late)
        return self._conclude()

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return 60 * self.budget.minutes - (time.monotonic() - self.began)

    def _train_the_best(self, late: Config) -> None:
        """Try each plan for a while, then the best one's learning rate, then give that the time that is left."""
        rest = self.left()
        trial = FOR_TRIAL * rest
        arms, own = {"late": (late, "probe", True)}, rungs.own_rungs(self.config)
        if trial < LEAST_TRIAL or not own:
            self._go("late", late, self.left(), "probe", shares=True)
            return
        if not self._go("start", rungs.start(self.config), FOR_START * rest):
            return
        if self._of("start"):
            arms |= {name: (config, "start", False) for name, config in own.items()}
        for name, (config, start, shares) in arms.items():
            if not self._go(f"trial_{name}", config, trial, start, shares):
                return
        tried = {name: rung.val_top1 for name in arms if (rung := self._of(f"trial_{name}"))}
        if not tried:
            return
        chosen = max(tried, key=tried.__getitem__)
        config, start, shares = arms[chosen]
        rate, best, most = config.train.lr, f"trial_{chosen}", tried[chosen]
        for factor in RATES:
            name = f"trial_{chosen}_{rate * factor:.0e}"
            if not self._go(name, _at(config, rate * factor), trial, start, shares):
                return
            if (rung := self._of(name)) and rung.val_top1 > most:
                best, most, config = name, rung.val_top1, _at(config, rate * factor)
        self.say(f"{chosen} did best in the trials ({best}); it goes on from there for the time that is left")
        if not shares:
            self.shared = None  # its memory is free again
        self._go(chosen, config, self.left(), best, shares)

    def _go(
        self,
        name: str,
        config: Config,
        seconds: float,
        start: str | None = None,
        shares: bool = False,
    ) -> bool:
        """Run a rung within so many seconds, all in all, if it fits; whether the climb goes on.

        Args:
            start: the rung whose weights it begins from. shares: whether it reads the features that are kept.
        """
        began, solved = time.monotonic(), config.train.optimizer == "lbfgs"
        minutes = max(0.5, min(seconds, self.left()) - 1.1 * self.overhead) / 60
        origin = None if start is None else str(self.folder / start)
        train = dataclasses.replace(config.train, steps=None, minutes=minutes, init_from=origin)
        try:
            fitted = self._fitted(dataclasses.replace(config, train=train), shares)
        except ConfigError as error:
            if not self.rungs:
                raise
            self.say(f"{name} is left out: {error}")
            self.left_out = True
            return True
        config, told = fitted.config, f"storage {fitted.config.storage}"
        if not solved:
            told += f", micro-batches of {config.train.batch_size // config.train.grad_accumulation_steps}"
        of_whole = f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
        self.say(f"{name}: {of_whole}, {told}, {fitted.bytes / 2**20:.0f} MB predicted for the process")
        try:
            report = api.train(
                config, self.folder / name, callbacks=self.callbacks, features=self.shared if shares else None
            )
        except NonFiniteLoss as error:  # at this learning rate; a rung that is out
            self.say(f"{name}: {error}")
            self.rungs.append(self._diverged(name, time.monotonic() - began, minutes, config))
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
        self.rungs.append(
            Rung(
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
        self.say(f"{name}: {mean:.2f} % on validation, {took:.0f} s in all, {self.left():.0f} s left")
        return True

    def _fitted(self, config: Config, shares: bool) -> room.Fitted:
        """In what form it fits: beside the features that are kept for others, or in their place."""

        def within(memory: room.Memory) -> room.Fitted:
            return room.fitted(config, self.speed.classes, memory, self.runtime.precision, self.speed.decoded)

        if self.shared is not None and not shares:
            try:
                return within(dataclasses.replace(self.memory, base=self.memory.base + self.shared.bytes))
            except ConfigError:
                self.say("the features kept for late are given up for memory; it computes them again")
                self.shared = None
        return within(self.memory)

    def _diverged(self, name: str, took: float, minutes: float, config: Config) -> Rung:
        nothing = dict.fromkeys(self.speed.classes, 0.0)
        settings = {"lr": config.train.lr, "storage": config.storage, "init_from": config.train.init_from}
        place = str(self.folder / name)
        return Rung(name, place, 0.0, 0.0, nothing, took, took, 60 * minutes, 0, self.runtime.peak_mb(), 0.0, settings)

    def _of(self, name: str) -> Rung | None:
        """None where it was left out."""
        return next((rung for rung in self.rungs if rung.name == name), None)

    # --- what is known before ---

    def _limit_validation(self) -> None:
        """As many validation images as one evaluation may take of the time."""
        speed, asked = self.speed, self.config.data.val_images
        seconds = FOR_VALIDATION * 60 * self.budget.minutes
        count = max(LEAST_VALIDATION, int(seconds / speed.forward / len(speed.classes)))
        count = count if asked is None else min(asked, count)
        self.config = configuration.replace(self.config, data__val_images=count)
        images = sum(speed.images.values())
        self.say(
            f"{1000 * speed.forward:.1f} ms for the backbone on an image, {images} training images: "
            f"{images * speed.forward:.0f} s to see each once; validation on {count} images of a task at most"
        )

    def _with_fewer_images(self, config: Config, seconds: float) -> Config:
        """As many training images of each task as the backbone sees in so long, those of the validation beside them."""
        speed, asked = self.speed, config.data.train_images
        validation = config.data.val_images * len(speed.classes)
        room_for = max(len(speed.classes), int(seconds / speed.forward) - validation)
        count, sizes = 0, sorted(speed.images.values())
        for place, size in enumerate(sizes):
            count = max(count, (room_for - sum(sizes[:place])) // (len(sizes) - place))
            if count <= size:
                break
        least = max(speed.classes.values())
        if max(count, least) >= sizes[-1] or (asked is not None and asked <= count):
            return config
        if count < least:
            self.say(f"the time is too short for one image of each class; it takes {least} of each task nevertheless")
        else:
            self.say(f"in {seconds:.0f} s it sees {count} images of each task: probe and late train on these")
        return configuration.replace(config, data__train_images=max(least, count))

    def _share_features(self, late: Config) -> Config:
        """Have what the frozen blocks make of the images of `late` kept from the probe on, if there is room for it."""
        tasks = {name: open_task(late, file) for name, file in late.task_files().items()}
        sizes = {name: len(data.train) for name, data in tasks.items()}
        itemsize = 2 if self.runtime.precision == "bf16" else 4
        try:
            left, speed = self._fitted(late, shares=True).left, self.speed
        except ConfigError:  # its rung says so
            return late
        kept = room.with_feature_cache(late, left, sum(sizes.values()), speed.tokens, speed.width, itemsize)
        if kept.data.feature_cache_mb:
            with self.runtime.in_effect(), self.runtime.autocast():
                model = self.runtime.place(build(kept, speed.classes))
                self.shared = FeatureCache(model, sizes, kept.data)
        return kept

    # --- what came of it ---

    def _conclude(self) -> dict[str, Any]:
        best = max(self.rungs, key=lambda rung: rung.val_top1, default=None)
        result = {
            "command": command(),
            "commit": commit(),
            "environment": environment(self.runtime),
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
            "rungs": [dataclasses.asdict(rung) for rung in self.rungs],
        }
        write_whole(self.folder / "fit.json", json.dumps(result, indent=1))
        return result

    def _reason(self, best: Rung) -> str:
        """Why this one, in a sentence."""
        others = sorted((r for r in self.rungs if r is not best and r.name != "start"), key=lambda r: -r.val_top1)
        if not others:
            return f"{best.name} is all " + ("that fits into the memory" if self.left_out else "there was time for")
        second = others[0]
        ahead = best.val_top1 - second.val_top1
        sure = "outside" if ahead > math.hypot(best.interval, second.interval) else "within"
        return (
            f"{best.name} has the highest validation top-1, {best.val_top1:.1f} %: {ahead:.1f} points more than "
            f"{second.name}, {sure} the 95 % interval of {len(best.tasks)} tasks' validation images"
        )


def _at(config: Config, rate: float) -> Config:
    return configuration.replace(config, train__lr=rate, train__min_lr=min(config.train.min_lr, rate))
