"""State of a training run: everything needed to resume it, and how it is saved and restored."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs import checkpoint, contents
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.distributed import Alone
from moe_bsr.training.callback import Callback, Callbacks
from moe_bsr.training.length import Length
from moe_bsr.training.optim import MovingAverage, names_of, state_of


@dataclass(slots=True)
class Best:
    """Evaluation whose weights are reported.

    Attributes:
        step: number of updates of these weights.
        mean_top1: mean over the tasks on the validation split; None if these weights were not evaluated.
        scores: scores by task; None likewise.
    """

    step: int
    mean_top1: float | None
    scores: dict[str, dict[str, Any]] | None = None


@dataclass(slots=True)
class Lost:
    """Best evaluation of a run whose checkpoint cannot be read. reason: the error."""

    best: Best
    reason: str


class TrainState:
    """Everything that changes while a run trains.

    Attributes:
        step: number of updates done. seconds: time spent in them.
        best: best evaluation so far; None before the first.
        length: planned number of updates. stale: evaluations in a row without a new best.
        pending_evaluation: whether the evaluation due at this step is not done yet.
        untold_scores: scores of the evaluation at this step, until the callbacks have received them.
        lost: the best evaluation, if its weights could not be read again.
        skipped: unreadable images by task and split: name -> reason.
        saved_step: step of the newest checkpoint; -1 before the first.
    """

    def __init__(
        self,
        model: MultitaskViT,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None,
        callbacks: Iterable[Callback],
        selection: str,
        saved_weights: str,
        skipped: dict[str, dict[str, dict[str, str]]],
    ) -> None:
        """
        Args:
            selection: `train.checkpoint_selection`. saved_weights: `train.save`.
            skipped: unreadable images, a dictionary that the transforms fill.
        Raises:
            ValueError: two callbacks have the same name.
        """
        self.model, self.optimizer, self.average = model, optimizer, average
        self.callbacks = Callbacks(callbacks)
        self.selection, self.saved_weights = selection, saved_weights
        self.step, self.seconds = 0, 0.0
        self.length = Length()
        self.stale = 0
        self.best: Best | None = None
        self.pending_evaluation = False
        self.untold_scores: dict[str, dict[str, Any]] | None = None
        self.lost: Lost | None = None
        self.skipped = skipped
        self.saved_step = -1

    def add_evaluation(self, scores: dict[str, dict[str, Any]]) -> None:
        """Record validation scores of all tasks. They become `best` if their mean top-1 is higher; a tie is not."""
        mean = sum(s["top1"] for s in scores.values()) / len(scores)
        if self.selection == "last" or self.best is None or mean > self.best.mean_top1:
            self.best, self.stale = Best(self.step, mean, scores), 0
        else:
            self.stale += 1
        self.pending_evaluation, self.untold_scores = False, scores

    def add_skipped(self, skipped: dict[str, dict[str, dict[str, str]]]) -> None:
        """Add unreadable images found by an earlier process, or by another one."""
        for task, splits in skipped.items():
            for split, images in splits.items():
                self.skipped.setdefault(task, {}).setdefault(split, {}).update(images)

    def plan(self, steps: int, minutes: float | None = None) -> None:
        """Set the planned number of updates. If it changes, patience starts anew.

        Args:
            minutes: the `train.minutes` that this number was measured for.
        """
        earlier = self.length.earlier
        if self.length.steps not in (0, steps):
            earlier, self.stale = [*earlier, (self.step, self.length.steps)], 0
        self.length = Length(steps, minutes, earlier)

    # --- as dictionaries ---

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return tensors under "weights", "optimizer" and, with a moving average, "average"; JSON under "progress"."""
        state = self._tensors()
        state["progress"] = {
            "step": self.step,
            "pending_evaluation": self.pending_evaluation,
            "seconds": self.seconds,
            "length": self.length.values(),
            "stale": self.stale,
            "best_step": self.best and self.best.step,
            "best_mean_top1": self.best and self.best.mean_top1,
            "best_scores": self.best and self.best.scores,
            "untold_scores": self.untold_scores,
            "moments": len(state["optimizer"]),
            "skipped": self.skipped,
            "callbacks": self.callbacks.state(),
        }
        return state

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` returned, and reset the callbacks' files to that point."""
        self.model.load_state_dict(state["weights"], strict=False)  # an unchanged backbone is not saved
        self._load_average(state)
        parameters = dict(self.model.named_parameters())
        for name, value in state["optimizer"].items():
            name, _, key = name.rpartition("/")
            self.optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
        progress = state["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.length, self.stale = Length.of(progress["length"]), progress["stale"]
        self.pending_evaluation, self.untold_scores = progress["pending_evaluation"], progress["untold_scores"]
        self.add_skipped(progress["skipped"])
        if self.average is not None:
            self.average.updates = self.step
        if progress["best_step"] is not None:
            self.best = Best(progress["best_step"], progress["best_mean_top1"], progress["best_scores"])
        self.callbacks.restore(progress["callbacks"])

    def follow_first(self, ranks: Alone) -> None:
        """Copy the state of the first process over the network: the other processes need not see its disk.

        Raises:
            RankLost: another process was lost.
        """
        if ranks.world == 1:
            return
        state = self.state_dict()
        values = ranks.share({"progress": state.pop("progress"), "replaced": self.model.replaced})
        progress, self.model.replaced = values["progress"], values["replaced"]
        tensors = {f"{group}/{name}": value for group, values in state.items() for name, value in values.items()}
        shared = ranks.share_tensors(tensors)
        if not ranks.first:
            groups: dict[str, dict[str, Tensor]] = {name: {} for name in state}
            for name, value in shared.items():
                group, _, name = name.partition("/")
                groups[group][name] = value
            self.load_state_dict({**groups, "progress": progress})

    def _tensors(self) -> dict[str, dict[str, Any]]:
        """Return the tensors to save, by file."""
        weights = self.model.state_dict()
        if self.saved_weights == "trainable":
            unchanged = self.model.unchanged_backbone_names()
            weights = {name: value for name, value in weights.items() if name not in unchanged}
        tensors = {"weights": weights, "optimizer": self._moments()}
        if self.average is not None:
            tensors["average"] = self.average.average
        return tensors

    def _moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state tensors by parameter name and key, such as heads.pets.weight/exp_avg."""
        names = names_of(self.optimizer)
        return {
            f"{names[parameter]}/{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def _load_average(self, state: dict[str, dict[str, Tensor]]) -> None:
        if self.average is not None:
            for name, value in self.average.average.items():
                value.copy_(state["average"][name])

    # --- on disk ---

    def save(self, folder: Path) -> None:
        """Write a checkpoint into the run folder.

        Raises:
            OSError: it could not be written.
        """
        tensors = self.state_dict()
        progress = tensors.pop("progress")
        if self.saved_step == self.step and self.step in checkpoint.steps(folder):
            checkpoint.save_state(folder, self.step, progress)  # an evaluation changes no tensor
        else:
            checkpoint.save(folder, self.step, tensors, progress)
        self.saved_step = self.step

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each checkpoint file, by name, once every parameter has its optimizer state."""
        sizes = {name: sum(tensor.nbytes for tensor in group.values()) for name, group in self._tensors().items()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        moments = [tensor for p in trained for tensor in state_of(self.optimizer, p).values()]
        return sizes | {"optimizer": sum(tensor.nbytes for tensor in moments)}

    def begin(self) -> None:
        """Start at the first step. The callbacks discard the files of an earlier run in the folder."""
        self.callbacks.restore({})

    def resume(self, folder: Path, tasks: Iterable[str], runtime: Runtime) -> list[str]:
        """Resume from the newest intact checkpoint of a run folder, or begin if there is none.

        Returns:
            Notes for the user: the checkpoint, and why the run may not be bit-exact.
        Raises:
            CheckpointError: no checkpoint is intact, or the newest does not fit the run.
        """
        checkpoint.recover(folder)
        if not checkpoint.steps(folder):
            self.begin()
            there = (folder / "config.yaml").is_file()
            return [f"no checkpoint to resume from in {folder}: starting at the first step"] if there else []
        notes: list[str] = []
        place = checkpoint.latest(folder, warn=notes.append)
        tensors, progress = checkpoint.read(place, verified=True)
        resolved = {"processes": 1} | run.read_config(folder)[1]
        self._check(place, tensors, progress, list(tasks))
        run.restore_weights(self.model, tensors["weights"], resolved["backbone_sha256"], place)
        try:
            self.load_state_dict({**tensors, "progress": progress})
        except ValueError as error:  # an essential callback refused its state
            raise checkpoint.CheckpointError(f"checkpoint refused: {place / checkpoint.STATE}: {error}") from error
        self.saved_step = self.step
        notes.append(f"resumed from {place}")
        now = run.environment(runtime)
        changed = [
            f"{key} was {resolved.get(key)}, now {value}" for key, value in now.items() if resolved.get(key) != value
        ]
        if changed:
            notes.append(f"not bit-exact with the run so far: {'; '.join(changed)}")
        return notes

    def _check(self, place: Path, tensors: dict[str, dict[str, Tensor]], progress: Any, tasks: list[str]) -> None:
        """Check that a checkpoint fits this run.

        Raises:
            CheckpointError: it does not.
        """
        contents.check_state(place, progress, tasks)
        if "optimizer" not in tensors:
            raise checkpoint.CheckpointError(
                f"{place} does not fit the run: it has no optimizer.safetensors, so training does not go on from it; "
                "start another run from its weights (train.init_from)"
            )
        contents.check_tensors(place / "weights.safetensors", tensors["weights"], contents.model_tensors(self.model))
        moments = {
            f"{name}/{key}": value
            for name, p in self.model.named_parameters()
            if p.requires_grad
            for key, value in state_of(self.optimizer, p).items()
        }
        contents.check_moments(place / "optimizer.safetensors", tensors["optimizer"], moments, progress["moments"])
        contents.check_average(place, tensors.get("average"), self.model, self.average is not None)

    def load_best(self, folder: Path) -> None:
        """Load the weights of the best evaluation. If they cannot be read, keep the last weights and warn."""
        if self.best.step == self.step:
            return
        place = folder / "checkpoint" / str(self.best.step)
        try:
            tensors, _ = checkpoint.read(place)
            contents.check_tensors(
                place / "weights.safetensors", tensors["weights"], contents.model_tensors(self.model)
            )
            contents.check_average(place, tensors.get("average"), self.model, self.average is not None)
        except checkpoint.CheckpointError as error:
            warnings.warn(f"{error}; the last weights are reported instead of the best", stacklevel=2)
            self.lost, self.best = Lost(self.best, str(error)), Best(self.step, None)
            return
        self.model.load_state_dict(tensors["weights"], strict=False)
        self._load_average(tensors)
