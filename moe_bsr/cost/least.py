"""What a block's backward pass takes at least: enough to see that a step does not fit, without tracing the others."""

from moe_bsr.config import Config
from moe_bsr.cost.sections import Run
from moe_bsr.cost.step import Step, as_trained, device_of
from moe_bsr.model.multitask import MultitaskViT


def least_beside_gradients(model: MultitaskViT, config: Config, *, batch: int, precision: str) -> int:
    """A lower bound of the bytes alive in an update of several micro-batches, beside weights, state and all gradients.

    In the last micro-batch every gradient is there already when the first block of the gradient path has its backward
    pass. What crosses that block's borders does not count.

    Args:
        As of `predict`.
    """
    if not config.train.differentiates or config.train.step_in_backward or model.path_start >= len(model.plan):
        return 0
    task = max(model.trained_tasks, key=lambda name: model.heads[name].out_features)
    with as_trained(model, device_of(config), precision):
        step = Step(model, config, batch, precision, {}, True)
        step.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        section = step.places(task, model.path_start + 1)[-1].section
    live = most = 0
    for phase in ("forward", "handover", "backward"):
        for run in section.phases[phase]:
            if isinstance(run, Run):
                most = max(most, live + run.rise_without) if phase == "backward" else most
                live += run.net_without
    return most
