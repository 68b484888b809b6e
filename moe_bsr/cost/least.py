"""Bound the peak memory of a step from below by tracing one block, to reject plans that do not fit early."""

from moe_bsr.config import Config
from moe_bsr.cost.sections import Run
from moe_bsr.cost.step import Step, as_trained, device_of
from moe_bsr.model.multitask import MultitaskViT


def least_beside_gradients(model: MultitaskViT, config: Config, *, batch: int, precision: str) -> int:
    """Return a lower bound of the peak in bytes, without weights, optimizer state and gradients.

    The bound holds for an update of several micro-batches. In its last micro-batch all gradients already exist when
    the first block of the gradient path runs its backward pass. Tensors that cross the block's border do not count.

    Args:
        model, config, batch, precision: as for `predict`.
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
