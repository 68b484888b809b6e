"""The state of a training run: everything that a resumed one needs, how it is saved, and how it comes back."""

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
from moe_bsr.training.optim import MovingAverage, state_of


@dataclass(slots=True)
class Best:
    """The evaluation whose weights are reported.

    Attributes:
        mean_top1: over the tasks, on the validation split; None if these weights were not evaluated on it.
        scores: by task; None likewise.
    """

    step: int
    mean_top1: float | None
    scores: dict[str, dict[str, Any]] | None = None


@dataclass(slots=True)
class Lost:
    """The best evaluation of a run, whose checkpoint is lost. reason: what is wrong with it."""

    best: Best
    reason: str


class TrainState:
    """What changes while a run trains.

    Attributes:
        step: updates done. seconds: spent in them. best: None before the first evaluation.
        length: how many updates it is to have. stale: evaluations in a row that raised no best.
        pending_evaluation: whether the evaluation due at this step is not yet done.
        untold_scores: of the evaluation at this step, of which the callbacks have not been told.
        lost: the best evaluation, if its weights could not be read again.
        skipped: images that could not be read, by task and split: name -> why.
        saved_step: of the newest checkpoint; -1 before the first.
    """

    def __init__(
        self,
        model: MultitaskViT,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None = None,
        callbacks: Iterable[Callback] = (),
        selection: str = "best",
        saved_weights: str = "trainable",
        skipped: dict[str, dict[str, dict[str, str]]] | None = None,
    ) -> None:
        """
        Args:
            selection: `train.checkpoint_selection`. saved_weights: `train.save`. skipped: filled by somebody else.
        Raises:
            ValueError: two callbacks of one name.
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
        self.skipped = {} if skipped is None else skipped
        self.saved_step = -1

    def add_evaluation(self, scores: dict[str, dict[str, Any]]) -> None:
        """Take the scores of all tasks on the validation split for the best so far, if they are; a tie is not."""
        mean = sum(s["top1"] for s in scores.values()) / len(scores)
        if self.selection == "last" or self.best is None or mean > self.best.mean_top1:
            self.best, self.stale = Best(self.step, mean, scores), 0
        else:
            self.stale += 1
        self.pending_evaluation, self.untold_scores = False, scores

    def add_skipped(self, skipped: dict[str, dict[str, dict[str, str]]]) -> None:
        """Know of more images that could not be read: those of an earlier process, or of another one."""
        for task, splits in skipped.items():
            for split, images in splits.items():
                self.skipped.setdefault(task, {}).setdefault(split, {}).update(images)

    def plan(self, steps: int, minutes: float | None = None) -> None:
        """Let the run have so many updates. Where it was to have others, it takes up patience anew.

        Args:
            minutes: that these updates were measured to take.
        """
        earlier = self.length.earlier
        if self.length.steps not in (0, steps):
            earlier, self.stale = [*earlier, (self.step, self.length.steps)], 0
        self.length = Length(steps, minutes, earlier)

    # --- as values ---

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Tensors under "weights", "optimizer" and, if there is one, "average"; JSON values under "progress"."""
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
        """Take over what `state_dict` returned; the callbacks' files go back to that moment too."""
        self.model.load_state_dict(state["weights"], strict=False)  # the unchanged backbone is not among them
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
        """Take over what the first process has, from its memory: the others need not see its disk.

        Raises:
            RankLost: see `distributed`.
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
        """By the file they are saved in."""
        weights = self.model.state_dict()
        if self.saved_weights == "trainable":
            unchanged = self.model.unchanged_backbone_names()
            weights = {name: value for name, value in weights.items() if name not in unchanged}
        tensors = {"weights": weights, "optimizer": self._moments()}
        if self.average is not None:
            tensors["average"] = self.average.average
        return tensors

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's state by the parameter's name and its own: heads.pets.weight/exp_avg."""
        names = {
            parameter: name
            for group in self.optimizer.param_groups
            for parameter, name in zip(group["params"], group["names"], strict=True)
        }
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
        """Bytes of each file of a checkpoint, by name, once every parameter has its moments."""
        sizes = {name: sum(tensor.nbytes for tensor in group.values()) for name, group in self._tensors().items()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        moments = [tensor for p in trained for tensor in state_of(self.optimizer, p).values()]
        return sizes | {"optimizer": sum(tensor.nbytes for tensor in moments)}

    def begin(self) -> None:
        """Start at the first step: the callbacks forget what an earlier run left in the folder."""
        self.callbacks.restore({})

    def resume(self, folder: Path, tasks: Iterable[str], runtime: Runtime) -> list[str]:
        """Go on from the newest sound checkpoint of a run folder, or begin if there is none.

        Returns:
            Notes for a person: what was resumed from, and why it may not be bit-exact.
        Raises:
            CheckpointError: none is sound, or none fits.
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
        except ValueError as error:  # of an essential callback
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
        """Refuse a checkpoint that no trainer of this run can have written."""
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
        """Put the best evaluation's weights into the model; if they were lost the last ones stay, with a warning."""
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
            warnings.warn(f"{error}; the last weights are reported in place of the best", stacklevel=2)
            self.lost, self.best = Lost(self.best, str(error)), Best(self.step, None)
            return
        self.model.load_state_dict(tensors["weights"], strict=False)
        self._load_average(tensors)
