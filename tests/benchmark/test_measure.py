"""The memory meter on small functions whose allocations are known to the byte, and its consistency."""

import pytest
import torch
from saved_tensors import saved_storages
from tiny_models import CLASSES, make_model, make_vit, normal, plain_autograd
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import held, mark, measure, trace
from moe_bsr.config import Config, PlanConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import training_step

CPU = torch.device("cpu")
ROWS, WIDTH = 64, 32
SIZE = 4 * ROWS * WIDTH  # bytes of one float32 activation


@pytest.fixture
def chain() -> nn.Sequential:
    """Return three linear layers with GELUs. Autograd saves the input of each layer and of each GELU."""
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())])


def alive_after(run) -> int:
    kept = []
    return sum(a.bytes for a in trace({"run": lambda: kept.append(run())}, CPU).alive["run"])


def test_a_chain_keeps_saved_tensors_and_its_result(chain):
    x = normal(ROWS, WIDTH)
    assert alive_after(lambda: chain(x)) == 6 * SIZE  # 3 GELU inputs, 2 linear inputs, the result


@pytest.mark.parametrize("random_state", [0, 5056])
def test_a_checkpointed_chain_keeps_its_result_and_perhaps_the_random_state(chain, random_state):
    x = normal(ROWS, WIDTH).requires_grad_()
    kept = alive_after(lambda: checkpoint(chain, x, use_reentrant=False, preserve_rng_state=random_state > 0))
    assert kept == SIZE + random_state


def test_a_tensor_saved_twice_counts_once():
    x = normal(ROWS, WIDTH).requires_grad_()

    def run():
        y = x.exp()  # saved by exp and, twice, by the product
        return y * y

    assert alive_after(run) == 2 * SIZE
    assert held(saved_storages(run, [x])) == SIZE


def test_saved_storages_leave_out_excluded_tensors(chain):
    x = normal(ROWS, WIDTH)
    assert held(saved_storages(lambda: chain(x), [x, *chain.parameters()])) == 5 * SIZE


def test_memory_freed_within_a_phase_counts_in_its_peak():
    x = normal(ROWS, WIDTH)
    seen = trace({"scratch": lambda: x.exp().sum(), "nothing": lambda: None, "less": lambda: x[:8].exp()}, CPU)
    assert seen.peak("scratch") == SIZE + 4  # the sum is computed while its input is alive
    assert (seen.alive["scratch"], seen.peak("nothing"), seen.peak("less")) == ([], 0, SIZE // 8)
    assert seen.peak() == SIZE + 4


def test_memory_left_by_one_phase_counts_in_the_next():
    left = []
    x = normal(ROWS, WIDTH)
    seen = trace({"make": lambda: left.append(x.exp()), "free": left.clear, "after": lambda: x.exp()}, CPU)
    assert [seen.peak(phase) for phase in ("make", "free", "after")] == [SIZE, SIZE, SIZE]
    assert seen.alive["free"] == []


def test_gradients_can_be_excluded_even_if_their_memory_was_used_before():
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    x = normal(ROWS, WIDTH)
    weight = 4 * WIDTH * WIDTH
    kept = []

    def forward():
        torch.empty(WIDTH, WIDTH)  # an allocator may reuse this memory for the gradient
        kept.append(layer(x).sum())

    seen = trace({"forward": forward, "backward": lambda: kept.pop().backward()}, CPU)
    gradient = [a for a in seen.alive["backward"] if a.pointer == layer.weight.grad.data_ptr()]
    assert [a.bytes for a in gradient] == [weight]
    assert seen.peak("forward", gradient) == seen.peak("forward") == max(weight, SIZE + 4)
    assert seen.peak("backward") - weight <= seen.peak("backward", gradient) < seen.peak("backward")


def test_sections_and_operators_are_named():
    kept = []

    def run():
        kept.append(torch.zeros(5))
        mark("second")
        kept.append(F.softmax(torch.zeros(7), 0))

    alive = trace({"one": run}, CPU).alive["one"]
    assert [(a.bytes, a.phase, a.section) for a in alive] == [(20, "one", ""), (28, "one", "second")]
    assert alive[1].maker == "aten::softmax"


@pytest.fixture(params=["exact", "recompute"])
def measured(request):
    """Return a tiny model with dropping and experts, its configuration, and the measured step of 6 images."""
    config = Config(storage=request.param, plan=PlanConfig(train_blocks=[1, 3], drop_blocks=[1, 2], moe_blocks=[3]))
    config = configuration.replace(
        config,
        moe__num_experts=4,
        moe__top_k=2,
        runtime__device="cpu",
        runtime__precision="fp32",
        runtime__threads=1,
        train__batch_size=6,
    )
    model = MultitaskViT(make_vit(), config, CLASSES)
    return model, config, measure(training_step(model, config, prepare(config.runtime), batch=6))


def test_parameters_gradients_and_optimizer_state_are_counted_to_the_byte(measured):
    model, _, seen = measured
    heads = sum(p.numel() for name, head in model.heads.items() if name != "one" for p in head.parameters())
    routers = sum(
        r.numel()
        for m in model.vit.blocks
        if hasattr(m.mlp, "router")
        for name, r in m.mlp.router.weight.items()
        if name != "one"
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - heads - routers
    tensors = sum(1 for p in model.parameters() if p.requires_grad) - 4 - 2  # other tasks' heads and routers
    assert seen.parameters == 4 * sum(p.numel() for p in model.parameters())
    assert seen.gradients == 4 * trained
    assert seen.optimizer == 4 * (2 * trained + tensors)  # AdamW: two moments and a step count each


def test_kept_bytes_of_blocks_add_up_and_blocks_before_the_path_keep_only_its_input(measured):
    _, _, seen = measured
    assert sum(seen.kept_by_block.values()) == seen.kept
    path_input = 4 * 6 * 17 * 16
    assert seen.kept_by_block["block 0"] == path_input
    assert seen.transients["forward"] >= seen.kept + seen.records
    assert all(0 <= seen.peaks[phase] - seen.transients[phase] <= seen.gradients for phase in seen.peaks)


def test_the_allocator_and_the_hooks_agree_under_plain_autograd():
    """Besides saved tensors, only the result, the loss and the scale factors in its graph are alive."""
    config = configuration.replace(
        Config(),
        plan__train_blocks=[1, 3],
        plan__drop_blocks=[],
        plan__moe_blocks=[],
        runtime__device="cpu",
        runtime__precision="fp32",
    )
    model = MultitaskViT(make_vit(), config, CLASSES)
    images = normal(6, 3, 16, 16)

    def run():
        return F.cross_entropy(model(images, "one").logits, torch.zeros(6, dtype=torch.int64))

    with plain_autograd():
        seen = measure(training_step(model, config, prepare(config.runtime), batch=6))
        hooks = held(saved_storages(run, [images, *model.parameters()]))
    assert hooks == pytest.approx(seen.kept, abs=64 + 6 * 8)


def test_recomputation_keeps_less():
    kept = {}
    for storage in ("exact", "recompute"):
        config = configuration.replace(
            Config(),
            storage=storage,
            plan__train_blocks=[1, 3],
            plan__drop_blocks=[1],
            plan__moe_blocks=[],
            runtime__device="cpu",
            runtime__precision="fp32",
        )
        model = make_model(storage=storage, drop_blocks=(1,))
        kept[storage] = measure(training_step(model, config, prepare(config.runtime), batch=6)).kept
    assert kept["recompute"] < 0.2 * kept["exact"]
