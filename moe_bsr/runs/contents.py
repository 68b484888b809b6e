"""Check that a checkpoint's content fits the run: types, names, shapes and finite numbers.

The hashes only detect accidental changes. They do not show that the checkpoint was written for this model, and
somebody who changes a file on purpose can change its hash too.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.config.train import MOST_STEPS
from moe_bsr.runs.checkpoint import STATE, CheckpointError


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_length(value: Any) -> bool:
    """Check the state of `training.length`: planned steps, the minutes they stand for, and earlier plans."""
    if not isinstance(value, dict) or value.keys() != {"steps", "minutes", "earlier"}:
        return False
    minutes, earlier = value["minutes"], value["earlier"]
    if not isinstance(earlier, list) or not all(isinstance(each, list) and len(each) == 2 for each in earlier):
        return False
    plans = [*earlier, [value["steps"], value["steps"]]]
    return (
        (minutes is None or is_number(minutes))
        and all(is_step(step) and is_step(steps) and step <= steps <= MOST_STEPS for step, steps in plans)
        and all(one[0] <= next[0] for one, next in itertools.pairwise(plans))
    )


STATE_KEYS: dict[str, Callable[[Any], bool]] = {
    "step": is_step,
    "pending_evaluation": lambda value: type(value) is bool,
    "seconds": lambda value: is_number(value) and value >= 0,
    "best_step": _or_null(is_step),
    "best_mean_top1": _or_null(is_number),
    "best_scores": _or_null(is_table),
    "untold_scores": _or_null(is_table),
    "stale": is_step,
    "length": _is_length,
    "moments": is_step,
    "skipped": lambda value: is_table(value) and all(is_table(splits) for splits in value.values()),
    "callbacks": is_table,
}


SCORED = ("top1", "top1_low", "top1_high", "top5", "mean_class_accuracy", "ece", "chance", "loss", "n")


def check_state(folder: Path, state: Any, tasks: list[str]) -> None:
    """Check that a trainer of these tasks can have written this state at the step of this folder.

    Raises:
        CheckpointError: it cannot. The message names the file and the key.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint refused: {folder / STATE} has no keys and values")
    wrong = [key for key, check in STATE_KEYS.items() if key not in state or not check(state[key])]
    if not wrong and str(state["step"]) != folder.name:
        wrong = ["step"]
    if not wrong and state["best_step"] is not None and not 0 < state["best_step"] <= state["step"]:
        wrong = ["best_step"]
    if not wrong and state["best_step"] is not None and state["best_mean_top1"] is None:
        wrong = ["best_mean_top1"]
    for key in ("best_scores", "untold_scores"):
        if not wrong and state[key] is not None and not _are_scores(state[key], tasks):
            wrong = [key]
    if wrong:
        found = f"{wrong[0]} = {str(state[wrong[0]])!a:.60}" if wrong[0] in state else f"no {wrong[0]}"
        raise CheckpointError(f"checkpoint refused: {folder / STATE} has {found}, which no trainer wrote there")


def _are_scores(scores: dict[str, dict[str, Any]], tasks: list[str]) -> bool:
    return list(scores) == tasks and all(is_number(each.get(name)) for each in scores.values() for name in SCORED)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters (with their requires_grad) and buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_tensors(
    file: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], exact_types: bool = False
) -> None:
    """Check that each tensor has the shape and dtype of the tensor of its name in `like`, and finite numbers.

    Names that are not in `like` are not checked.

    Args:
        file: named in errors.
        exact_types: whether the dtypes must be equal. If not, frozen parameters may be float32 or bfloat16, because
            they are stored in the dtype they are computed in.
    Raises:
        CheckpointError: naming the file and the tensor.
    """
    for name, value in tensors.items():
        if (expected := like.get(name)) is None:
            continue
        trained = exact_types or (isinstance(expected, nn.Parameter) and expected.requires_grad)
        narrowed = not trained and value.dtype in (torch.float32, torch.bfloat16) and expected.is_floating_point()
        if value.shape != expected.shape or (value.dtype != expected.dtype and not narrowed):
            raise CheckpointError(
                f"{file} does not fit the model: {name} is {_form(value)} where the model has {_form(expected)}"
            )
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{file}: {name} has numbers that are not finite; the weights are broken, use an earlier checkpoint"
            )


def check_average(folder: Path, average: Mapping[str, Tensor] | None, model: nn.Module, expected: bool) -> None:
    """Check that there is a moving average of the trained parameters if and only if one is expected.

    Args:
        expected: whether the configuration asks for one (train.ema_decay).
    Raises:
        CheckpointError: naming the file.
    """
    file = folder / "average.safetensors"
    if (average is not None) != expected:
        found = "no moving average" if expected else "a moving average"
        raise CheckpointError(f"{folder} does not fit the run: it has {found}, unlike train.ema_decay")
    if average is not None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if other := sorted(trained.keys() ^ average.keys()):
            raise CheckpointError(f"{file} does not fit the model: not the trained parameters ({other[0]})")
        check_tensors(file, average, trained)


def check_moments(file: Path, moments: Mapping[str, Tensor], like: Mapping[str, Tensor], count: int) -> None:
    """Check that the optimizer's state is complete: each parameter that has any state has all of its tensors.

    Args:
        moments: by parameter and name, such as heads.pets.weight/exp_avg.
        like: all tensors that there can be, with their shapes and dtypes.
        count: number of tensors that were saved.
    Raises:
        CheckpointError: naming the file.
    """
    keys: dict[str, set[str]] = {}
    for name in moments:
        parameter, _, key = name.rpartition("/")
        if name not in like:
            raise CheckpointError(f"{file} does not fit the model: unexpected {name}")
        keys.setdefault(parameter, set()).add(key)
    check_tensors(file, moments, like, exact_types=True)
    if len({frozenset(each) for each in keys.values()}) > 1 or len(moments) != count:
        raise CheckpointError(f"{file}: {len(moments)} tensors of the optimizer where {count} were saved")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
