"""The tracer on functions whose allocations are known to the byte, and against the allocator's own events."""

import pytest
import torch
from tiny_models import normal
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from moe_bsr.benchmark import measure
from moe_bsr.cost import operators, rules
from moe_bsr.cost.trace import Tracer, fake_tensors

CPU, ROWS, WIDTH = torch.device("cpu"), 64, 32
SIZE = 4 * ROWS * WIDTH  # bytes of one float32 activation


def traced(run, *shapes: tuple[int, ...], device: str = "cpu", requires_grad: bool = True) -> Tracer:
    """Trace `run(*tensors)` as the phase "run"."""
    target = torch.device(device)
    with fake_tensors():
        tensors = [torch.empty(shape, device=target, requires_grad=requires_grad) for shape in shapes]
        with Tracer(target) as tracer:
            tracer.phase = "run"
            kept = run(*tensors)  # stays alive until the trace is taken
            tracer.left = sum(a.bytes for a in tracer.alive)
            del kept
    return tracer


def test_saved_tensors_and_the_result_stay_alive():
    chain = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())])

    def run(x: Tensor) -> Tensor:
        for layer in chain:
            x = x @ torch.empty(WIDTH, WIDTH) if isinstance(layer, nn.Linear) else layer(x)
        return x

    # 3 GELU inputs, the result, and the products' 3 matrices. The products' own inputs are not saved.
    assert traced(run, (ROWS, WIDTH)).left == 4 * SIZE + 3 * 4 * WIDTH * WIDTH


def test_memory_freed_early_counts_only_in_the_peak():
    tracer = traced(lambda x: x.exp().sum(), (ROWS, WIDTH), requires_grad=False)
    assert (tracer.left, tracer.trace.peak("run"), tracer.trace.peak("other")) == (4, SIZE + 4, 0)


def test_a_view_takes_no_memory_but_keeps_its_whole_base_alive():
    assert traced(lambda x: x.exp()[:1].view(-1), (ROWS, WIDTH)).left == SIZE


def test_gpu_allocations_are_multiples_of_512_bytes():
    assert traced(lambda x: x + 1, (3, 5), device="cuda").left == 512


def test_host_tensors_do_not_count_as_gpu_memory():
    assert traced(lambda x: (x + 1).cpu(), (ROWS, WIDTH), device="cuda", requires_grad=False).left == 0


TOYS = {
    "sum of two branches": lambda x: (x.exp() + x.sin()).sum(),
    "one tensor used thrice": lambda x: (lambda y: (y * y + y).sum())(x.exp()),
    "softmax": lambda x: x.softmax(-1).square().sum(),
    "norm": lambda x: F.layer_norm(x, (WIDTH,)).square().sum(),
    "transposed": lambda x: (x.t().contiguous() @ x).square().sum(),
    "cut and joined": lambda x: torch.cat([x[:7], x[7:].exp()]).sum(),
    "looked up": lambda x: x[torch.tensor([3, 1, 1])].square().sum(),
    "narrow": lambda x: (x.bfloat16() * 2).float().sum(),
}


@pytest.mark.parametrize("name", TOYS)
def test_forward_and_backward_agree_with_the_allocator(name):
    """Peak and remaining memory agree, gradients included: autograd adds two gradients in place."""
    run = TOYS[name]

    def step(x: Tensor) -> Tensor:
        loss = run(x)
        loss.backward()
        return x.grad

    x = normal(ROWS, WIDTH).requires_grad_()
    measured = measure.trace({"run": lambda: step(x)}, CPU)
    tracer = traced(step, (ROWS, WIDTH))
    assert tracer.trace.peak("run") == pytest.approx(measured.peak("run"), abs=64)
    assert tracer.left == SIZE


def test_flops_are_counted_by_phase():
    def run(x: Tensor, w: Tensor) -> None:
        F.linear(x, w).sum().backward()

    tracer = traced(run, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert tracer.trace.phase_flops("run") == 3 * 2 * ROWS * WIDTH * WIDTH


def test_fake_tensors_have_distinct_addresses():
    """Packed storages identify tensors by address."""
    with fake_tensors():
        a, b = torch.empty(4, 4), torch.empty(4, 4)
        assert len({a.data_ptr(), b.data_ptr(), a[1:].data_ptr()}) == 3
        assert a.view(-1).data_ptr() == a.data_ptr()


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    return a * b


CALLS = {
    "add": (torch.add, (5, 7), (5, 7)),
    "broadcast": (broadcast, (5, 7, 3), (7, 3)),
    "mm": (torch.mm, (5, 7), (7, 3)),
    "bmm": (torch.bmm, (2, 5, 7), (2, 7, 3)),
    "sum": (lambda a: a.sum((0, 2)), (5, 7, 3)),
    "mean": (lambda a: a.mean(-1, keepdim=True), (5, 7)),
    "cat": (lambda a, b: torch.cat([a, b], 1), (5, 7), (5, 2)),
    "index": (lambda a: a[torch.zeros(4, 2, dtype=torch.int64)], (5, 7)),
    "topk": (lambda a: torch.topk(a, 3), (5, 7)),
    "layer norm": (lambda a, w: F.layer_norm(a, w.shape, w), (5, 7), (7,)),
    "permuted": (lambda a: a.permute(1, 0, 2) * 2, (5, 7, 3)),
    "to": (lambda a: a.to(torch.int8), (5, 7)),
    "new": (lambda a: a.new_zeros(3, 2), (5, 7)),
}


@pytest.mark.parametrize("name", CALLS)
def test_size_rules_match_the_operators(name):
    """The second call has other sizes, and uses the rule that was learned from the first."""
    run, *shapes = CALLS[name]
    for times in (1, 2):
        sizes = [tuple(times * n for n in shape) for shape in shapes]
        real = run(*(torch.zeros(size) for size in sizes))
        with fake_tensors():
            fake = [torch.empty(size) for size in sizes]
            with Tracer(CPU):
                result = run(*fake)
        for expected, found in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, result)), strict=True):
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_joining_tensors_of_two_types_gives_the_wider_one():
    """It also does after a rule was learned from a join of equal types."""
    with fake_tensors():
        for size, other in ((4, torch.bfloat16), (6, torch.float32)):
            parts = [operators.empty((size, 3), dtype, CPU) for dtype in (torch.bfloat16, other)]
            joined, *_ = operators.run(torch.ops.aten.cat.default, (parts,), {})
            assert joined.dtype == other


def test_a_wrong_rule_is_not_used(monkeypatch):
    monkeypatch.setitem(rules.RULES, torch.ops.aten.relu.default, lambda x: [(1,)])
    monkeypatch.setattr(operators, "_kinds", {})
    monkeypatch.setattr(operators, "_effects", {})
    assert [traced(torch.relu, (n, WIDTH), requires_grad=False).left for n in (8, 9)] == [32 * WIDTH, 36 * WIDTH]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_empty_makes_fake_tensors_as_torch_does(device):
    with fake_tensors():
        first, second = (operators.empty((2, 3), torch.bfloat16, torch.device(device)) for _ in range(2))
        with torch._C._DisableTorchDispatch():
            memory = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
        usual = FakeTensor(operators.FAKE, memory, torch.device(device))
        for made in (first, second):
            assert vars(made) == vars(usual) and type(made) is FakeTensor
            assert torch._C._dispatch_keys(made) == torch._C._dispatch_keys(usual)
            assert (made.device, made.shape, made.stride()) == (usual.device, usual.shape, usual.stride())
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
