"""Provide one tiny run for the commands that read a run."""

from pathlib import Path

import cheap
import pytest
from tiny_runs import make_config

import moe_bsr


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """Train `shapes` and `fractals` for 4 updates and return the run folder. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    with cheap.undrawn(), cheap.light():
        moe_bsr.train(make_config(folder, train__steps=4), folder / "run")
    return folder / "run"
