"""Compare the predicted cost of a tiny run with the measured cost."""

import pytest
import torch

from moe_bsr.benchmark.measure import held, kept_for_backward
from moe_bsr.config import Config
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import training_step


def assert_predicted_is_measured(config: Config) -> None:
    """Compare all but the peak. `benchmark/test_cost_check.py` does that where kernels need little scratch memory."""
    classes = dict.fromkeys(config.task_names(), 10)
    model, task = build(config, classes), config.task_names()[0]
    predicted = predict(model, config, batch=8, precision="fp32", task=task)
    step = training_step(model, config, prepare(config.runtime), batch=8, task=task)
    step.run()  # creates the optimizer's state
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    assert predicted.parameters == held([*model.parameters(), *model.buffers()])
    assert predicted.gradients == sum(p.numel() * p.element_size() for p in step.trained)
    assert predicted.optimizer == held(value for value in state if isinstance(value, torch.Tensor))
    kept = sum(allocation.bytes for allocation in kept_for_backward(step)[0])
    assert predicted.kept == pytest.approx(kept, rel=0.02)
