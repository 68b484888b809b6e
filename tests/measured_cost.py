"""The cost that is predicted of a tiny run is the one that its update takes."""

import pytest

from moe_bsr.benchmark.measure import measure
from moe_bsr.config import Config
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import training_step


def assert_predicted_is_measured(config: Config) -> None:
    """Peaks are held by the tests of `cost/`, on models large enough that kernels' scratch does not decide."""
    classes = dict.fromkeys(config.task_names(), 10)
    model, task = build(config, classes), config.task_names()[0]
    predicted = predict(model, config, batch=8, precision="fp32", task=task)
    measured = measure(training_step(model, config, prepare(config.runtime), batch=8, task=task))
    assert predicted.parameters == measured.parameters + measured.buffers
    assert (predicted.gradients, predicted.optimizer) == (measured.gradients, measured.optimizer)
    assert predicted.kept == pytest.approx(measured.kept, rel=0.02)
