"""Two processes with one GPU each, on NCCL, against one process with two micro-batches."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_groups
from tiny_runs import make_config

from moe_bsr.api import train
from moe_bsr.config import Config

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
    pytest.mark.usefixtures("bare"),
]


def config_of(folder: Path, exchange: str = "fp32") -> Config:
    changes = {"runtime__device": "cuda", "train__steps": 3, "train__grad_accumulation_steps": 2}
    return make_config(folder, moe__balance_loss="across_tasks", train__exchange=exchange, **changes)


def two(folder: Path, rank: int) -> list[float]:
    return [
        train(config_of(folder, exchange), folder / exchange, callbacks=[])["exchanged_mb_per_update"]
        for exchange in ("fp32", "bf16")
    ]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_exchanges_train_as_one_process_does(tmp_path):
    train(config_of(tmp_path), tmp_path / "one", callbacks=[])
    first, other = run_groups(__file__, tmp_path, {"two": 2})["two"]
    assert [first.status, other.status] == [0, 0], first.said + other.said
    full, half = first.result
    assert half == pytest.approx(full / 2)
    for exchange, tolerance in {"fp32": 1e-3, "bf16": 2e-2}.items():
        assert losses(tmp_path / exchange) == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
