"""Killed and resumed = uninterrupted, bit for bit; stopped by a signal = saved and resumable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CAMPAIGN = Path(__file__).parents[1] / "kill_campaign.py"


def test_killed_at_random_and_in_every_stage_of_a_checkpoint_write():
    # Operations 61 to 76 of the run are one checkpoint write, with the removal of an old one.
    done = subprocess.run(
        [sys.executable, CAMPAIGN, "--kills", "5", "--stages", "61", "77"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 5 and result["stages"] == 16 and not result["differing"]


def test_sigterm_saves_and_resume_finishes_the_same_run(tmp_path):
    import kill_campaign as campaign

    config = campaign.configuration.replace(campaign.make_config(tmp_path), train__eval_every=None)
    file = tmp_path / "config.yaml"
    file.write_text(campaign.configuration.dump(config))
    command = [sys.executable, CAMPAIGN.parent.parent / "tools" / "train.py", file, "--resume", "--run"]
    whole = subprocess.run([*command, tmp_path / "whole"], capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr

    run = tmp_path / "stopped"
    with subprocess.Popen([*command, run], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        output = process.stdout.read().decode()
    if process.returncode != 0:  # it may have been past its last update
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "--resume" in output
        assert json.loads((run / "report.json").read_text())["status"] == "interrupted"
        subprocess.run([*command, run], check=True, capture_output=True)
    assert not campaign.differing(run, campaign.outcome(tmp_path / "whole"))
