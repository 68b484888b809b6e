"""Flatten events into numbers by name, for loggers without a notion of tasks and splits.

train/<task>/loss, train/<task>/accuracy, ...   of one update
val/<task>/top1, val/mean/top1, ...             of an evaluation, and the mean over the tasks
"""

from statistics import fmean

from moe_bsr.training.callback import EvalEvent, StepEvent

SCORES = ("top1", "top5", "mean_class_accuracy", "ece", "loss")


def of_step(step: StepEvent) -> dict[str, float]:
    """Return the metrics of one task in an update."""
    numbers = step.metrics | {"epochs": step.progress[step.task]["epochs"]}
    return {f"train/{step.task}/{name}": value for name, value in numbers.items() if value is not None}


def of_evaluation(evaluation: EvalEvent) -> dict[str, float]:
    """Return the scores of all tasks, and their means."""
    scores, split = evaluation.scores, evaluation.split
    found = {f"{split}/{task}/{name}": of_task[name] for task, of_task in scores.items() for name in SCORES}
    return found | {f"{split}/mean/{name}": fmean(each[name] for each in scores.values()) for name in SCORES}
