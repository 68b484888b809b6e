"""The training program in a subprocess: a signal stops it with everything saved. `tests/selftest` kills it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bsr.api import train
from moe_bsr.selftest import kills, tiny

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"


@pytest.mark.usefixtures("bare")
def test_sigterm_saves_and_resume_finishes_the_same_run(tmp_path):
    short = {"train__steps": 4, "train__eval_every": None, "train__pictures": False, "plan__moe_blocks": [5]}
    config, file = tiny.write_config(tmp_path, **short)
    train(config, tmp_path / "whole", callbacks=[])

    run = tmp_path / "stopped"
    program = [sys.executable, TRAIN, file, "--resume", "--run", run]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        output = process.stdout.read().decode()
    if process.returncode != 0:  # it may have passed its last update
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "--resume" in output
        assert json.loads((run / "report.json").read_text())["status"] == "interrupted"
        assert train(config, run, resume=True, callbacks=[])["status"] == "finished"
    differing = kills.differing(run, kills.outcome(tmp_path / "whole"))
    assert differing == []  # compared above, so that a failure does not print megabytes
