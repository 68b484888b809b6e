"""The memory meter and the predicted cost on a CUDA device."""

import pytest
import torch
from tiny_runs import make_config

from moe_bsr.benchmark import cost_check
from moe_bsr.benchmark.measure import trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIZE = 4 * 512 * 1024


def test_released_memory_is_recorded():
    x = torch.randn(512, 1024, device="cuda")
    kept = []
    seen = trace(
        {"scratch": lambda: (x + 1).exp().sum(), "keep": lambda: kept.append(x + 1), "free": kept.clear}, x.device
    )
    assert [len(seen.alive[phase]) for phase in ("scratch", "keep", "free")] == [0, 1, 0]
    assert seen.alive["keep"][0].bytes >= SIZE
    assert 2 * SIZE <= seen.peak("scratch") < 3 * SIZE > seen.peak("keep") >= SIZE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", ["full", "last", "last-k", "bsr"])
def test_predicted_cost_matches_measured_cost(tmp_path, plan, precision):
    """Some MB are not predicted: cuBLAS's workspace, and the rest of blocks that the allocator does not split."""
    config = make_config(
        tmp_path,
        runtime__device="cuda",
        runtime__precision=precision,
        **{f"plan__{key}": value for key, value in cost_check.plans(6)[plan].items()},
    )
    compared = cost_check.compare(*cost_check.run(config, {"shapes": 10, "fractals": 12}, batch=64))
    for quantity in ("parameters", "gradients", "optimizer"):
        assert compared[quantity]["difference"] == 0.0
    for quantity, allowed in (("kept", 0.02), ("peak", 0.03)):
        row = compared[quantity]
        assert -4 * 2**20 <= row["predicted"] - row["measured"] <= allowed * row["measured"]
