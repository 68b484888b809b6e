"""Provide a tiny finished run with evaluations and a moving average of the weights."""

from pathlib import Path

import pytest
from tiny_runs import LATE, make_config

import moe_bsr
from moe_bsr.config import Config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("tasks"), **LATE, train__ema_decay=0.7, train__eval_every=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    moe_bsr.train(config, folder)
    return folder
