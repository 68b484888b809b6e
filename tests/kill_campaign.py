"""Kill a training run with SIGKILL again and again; what comes out must be bit for bit the uninterrupted run.

    python tests/kill_campaign.py --kills 200 --seed 1        a long campaign, by hand; JSON on stdout

Two kinds of kills: at a random moment of the run, and before every single disk operation of one checkpoint
write. Every run is a forked process of this one, so that nothing is imported twice. The configuration has
everything that could make a resume differ: unequal tasks, augmentation, gate noise, a moving average,
accumulation, clipping, and a balance loss with running statistics.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from moe_bsr import config as configuration
from moe_bsr.api import train
from moe_bsr.callbacks import expert_views, mistakes
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import files

STEPS = 9
TASK = """title: {name}
source: generated
family: {name}
classes: {classes}
train: {train}
test: {classes}
seed: 0
crop_scale: [0.5, 1.0]
flip: true
license: generated
"""


def make_config(folder: Path) -> configuration.Config:
    tasks = []
    for name, classes, train_images in (("shapes", 10, 60), ("petals", 24, 130)):
        file = folder / f"{name}.yaml"
        file.write_text(TASK.format(name=name, classes=classes, train=train_images))
        tasks.append(str(file))
    return configuration.from_dict(
        {
            "tasks": tasks,
            "backbone": {"name": "test_vit", "weights": "random", "image_size": 64},
            "plan": {"train_blocks": [1, 3, 5], "drop_blocks": [1, 3], "moe_blocks": [3, 5]},
            "moe": {"num_experts": 4, "top_k": 2, "mlp_ratio": 3, "gate_noise": 1.0, "balance_loss": "across_tasks"},
            "sampler": {"kind": "temperature"},
            "train": {
                "steps": STEPS,
                "batch_size": 8,
                "grad_accumulation_steps": 2,
                "ema_decay": 0.9,
                "grad_clip_norm": 0.5,
                "lr": 3e-3,
                "eval_every": 5,
                "checkpoint_every": 3,
                "evaluate_test": False,
            },
            "runtime": {"precision": "fp32", "threads": 1, "device": "cpu"},
        }
    )


def start(config: configuration.Config, run: Path, before_start=lambda: None) -> int:
    """Train (resuming) in a forked process; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                without_drawing()
                before_start()
                train(config, run, resume=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def without_drawing(replace=setattr) -> None:
    """Pictures take several times as long as these runs train, and nothing that is compared depends on them."""
    replace(expert_views, "drawing_due", lambda *arguments: False)
    replace(mistakes.MistakeViews, "on_end", lambda self, report: None)


def wait(pid: int) -> bool:
    """Whether the process ended by itself."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def kill_at_operation(number: int):
    """In this process: SIGKILL before the `number`-th disk operation of checkpoint writing."""
    count = 0

    def counted(operation):
        def run(*arguments, **keywords):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return operation(*arguments, **keywords)

        return run

    for owner, name in (
        (checkpoint, "save_file"),
        (files, "sync"),
        (checkpoint.shutil, "rmtree"),
        (Path, "rename"),
        (Path, "write_text"),
        (Path, "mkdir"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def outcome(run: Path) -> dict[str, bytes]:
    """Everything that has to agree: the last checkpoint's tensors and the metrics, as bytes."""
    last = run / "checkpoint" / str(STEPS)
    files = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    return files | {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}


def differing(run: Path, expected: dict[str, bytes]) -> list[str]:
    got = outcome(run)
    return sorted(name for name in expected.keys() | got.keys() if got.get(name) != expected.get(name))


def campaign(folder: Path, kills: int, seed: int, stages: range) -> dict:
    config, chance = make_config(folder), random.Random(seed)
    began = time.monotonic()
    assert wait(start(config, folder / "reference")), "the uninterrupted run failed"
    seconds = time.monotonic() - began
    expected = outcome(folder / "reference")

    run, killed, runs, wrong = folder / "timed", 0, 1, []
    while killed < kills:
        pid = start(config, run)
        time.sleep(chance.uniform(0, 1.1 * seconds))
        os.kill(pid, signal.SIGKILL)
        killed += 1
        if wait(pid):
            wrong += differing(run, expected)
            shutil.rmtree(run)
            runs += 1
    assert wait(start(config, run))
    wrong += differing(run, expected)

    run, done = folder / "stages", False
    for number in stages:
        done = wait(start(config, run, lambda number=number: kill_at_operation(number)))
        wrong += differing(run, expected) if done or wait(start(config, run)) else ["resume failed"]
        shutil.rmtree(run)
        if done:  # a whole run has fewer operations
            break
    return {
        "kills": killed,
        "runs": runs,
        "stages": number - stages.start + (not done),
        "seconds_uninterrupted": round(seconds, 2),
        "differing": sorted(set(wrong)),
        "torch": str(torch.__version__),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages",
        type=int,
        nargs=2,
        default=(0, 10_000),
        metavar=("FIRST", "END"),
        help="disk operations to kill before (default all)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), arguments.kills, arguments.seed, range(*arguments.stages))
    print(json.dumps(result))
    return bool(result["differing"])


if __name__ == "__main__":
    sys.exit(main())
