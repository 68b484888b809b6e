"""One tiny trained run for the commands that read a run."""

from pathlib import Path

import pytest
from tiny_runs import make_config

import moe_bsr


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, undrawn) -> Path:
    """A finished run of the tasks shapes and fractals, in 4 updates; only to be read."""
    folder = tmp_path_factory.mktemp("tiny")
    moe_bsr.train(make_config(folder, train__steps=4), folder / "run")
    return folder / "run"
