"""Break configurations, task files and overrides at random. Each must be refused clearly, or train correctly.

    for mutant in mutants(seed=0, count=500):
        verdict = judge(mutant, try_mutant(mutant, folder, main))

A clear refusal has status 2 and one line of at most 700 characters that names the key or the file. All random choices
come from the seed, so a mutant can be made again from its number.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_bsr.selftest import sandbox
from moe_bsr.selftest.mutation import change
from moe_bsr.selftest.sandbox import Main, Outcome

GOOD = ("refused", "accepted", "stopped")
REFUSED, FAILED = 2, 1

CONFIG = """# two small tasks, two updates
tasks: [shapes.yaml, petals.yaml]
seed: 3
mode: multitask
storage: exact
adapter: null
backbone:
  name: test_vit
  weights: random
  image_size: 32
plan:
  train_blocks: [1, 3, 5]
  drop_blocks: [1, 3]
  keep_rate: 0.5
  moe_blocks: [3, 5]
tokens: {fuse: raw, rank_by: probabilities}
moe:
  num_experts: 4
  top_k: 2
  mlp_ratio: 3
  router: per_task
  gate_noise: 0.5
  balance_loss: per_task
  balance_loss_weight: 0.01
data:
  root: .
  val_fraction: 0.1
  crop_scale: [0.5, 1.0]
  image_cache_mb: 64
  prefetch: 0
sampler: {kind: temperature, temperature: 2.0}
train:
  steps: 2
  batch_size: 4
  grad_accumulation_steps: 2
  optimizer: adamw
  lr: 1.0e-3
  weight_decay: 0.05
  layer_decay: 0.9
  warmup_fraction: 0.1
  grad_clip_norm: 1.0
  label_smoothing: 0.1
  ema_decay: 0.9
  task_weights: {shapes: 2.0}
  evaluate_test: false
  pictures: false
runtime: {device: cpu, precision: fp32, threads: 1}
"""
TASK = """title: {title}
source: generated
family: {family}
classes: {classes}
train: {train}
test: {classes}
seed: 0
crop_scale: [0.5, 1.0]
flip: true
license: generated
"""
FILES = {
    "config.yaml": CONFIG,
    "shapes.yaml": TASK.format(title="Shapes", family="shapes", classes=10, train=30),
    "petals.yaml": TASK.format(title="Petals", family="petals", classes=24, train=60),
}


class Mutant(NamedTuple):
    """Broken configuration with its task files and overrides.

    Attributes:
        description: what was changed.
        files: content by file name.
        words: names of the keys and files that were changed. A refusal must contain one of them.
    """

    description: str
    files: dict[str, bytes]
    overrides: list[str]
    words: tuple[str, ...] = ()


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Yield `count` mutants with one to three changes each, the same ones for the same seed."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        files = {name: text.encode() for name, text in FILES.items()}
        overrides: list[str] = []
        told, words = [], []
        for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
            description, touched = change(draw, files, overrides)
            told.append(description)
            words += touched
        yield Mutant(f"seed {seed}, number {number}: {'; '.join(told)}", files, overrides, tuple(words))


def campaign(
    folder: Path, count: int, seed: int, main: Main, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Try `count` mutants in a dry run. If it accepts one whose number is a multiple of 10, train that.

    Returns:
        Plain values: tried, failed, ended {verdict: number}, trained, and each failure in words.
    """
    ended: dict[str, int] = {}
    failures, trained = [], 0
    for number, mutant in enumerate(mutants(seed, count)):
        verdict = judge(mutant, try_mutant(mutant, folder, main))
        if verdict == "accepted" and number % 10 == 0:
            trained += 1
            verdict = judge(mutant, try_mutant(mutant, folder, main, train=True))
        ended[verdict] = ended.get(verdict, 0) + 1
        if verdict not in GOOD:
            failures.append({"mutant": mutant.description, "wrong": verdict})
            progress(f"{mutant.description}: {verdict}")
    return {
        "tried": count,
        "failed": len(failures),
        "seed": seed,
        "ended": ended,
        "trained": trained,
        "failures": failures,
    }


def try_mutant(mutant: Mutant, folder: Path, main: Main, train: bool = False) -> Outcome:
    """Run `moe-bsr train` on a mutant, in an empty folder below `folder`; as a dry run unless `train`."""
    place = folder / "mutant"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, content in mutant.files.items():
        (place / name).write_bytes(content)
    arguments = ["train", "config.yaml", *mutant.overrides, "--run", "run", *([] if train else ["--dry-run"])]
    return sandbox.run(lambda: main(arguments), folder=place)


def judge(mutant: Mutant, outcome: Outcome) -> str:
    """Return one of `GOOD`, or what is wrong with the outcome."""
    if outcome.trouble:
        return outcome.trouble
    if not outcome.refused:
        return "accepted"
    if outcome.status not in (REFUSED, FAILED):
        return f"status {outcome.status}"
    if wrong := outcome.unclear(*mutant.words):
        return wrong
    return "refused" if outcome.status == REFUSED else "stopped"
