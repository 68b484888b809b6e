"""Find the matrix products of a step, and time each of them alone at its best.

The sum of these times is a lower bound for any implementation with the same products. The rest of a step's time is
elementwise work, copies and call overhead. Fused attention counts as the products that it replaces.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from moe_bsr.benchmark.kineto import quiet_kineto
from moe_bsr.ops import linear
from moe_bsr.training.update import TrainingStep


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products of (m, k) and (k, n)."""

    batch: int
    m: int
    k: int
    n: int
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


def step_products(step: TrainingStep) -> Counter[Product]:
    """Return the products of one step, forward and backward, and how often each is computed."""
    step.run()
    with quiet_kineto(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step.run()
    return Counter(_products(profiler.profiler.kineto_results.experimental_event_tree()))


def _products(events: list) -> Iterator[Product]:
    for event in events:
        if event.tag == _EventType.TorchOp and event.name in SHAPES:
            inputs = event.extra_fields.inputs
            sizes = [tuple(i.sizes) if hasattr(i, "sizes") else () for i in inputs]
            dtype = str(next(i.dtype for i in inputs if hasattr(i, "sizes"))).removeprefix("torch.")
            for batch, m, k, n in SHAPES[event.name](sizes):
                if batch * m * k * n:
                    yield Product(batch, m, k, n, dtype)
        else:
            yield from _products(event.children)


def _mm(a: tuple, b: tuple) -> list[tuple]:
    return [(1, a[0], a[1], b[1])]


def _bmm(a: tuple, b: tuple) -> list[tuple]:
    return [(a[0], a[1], a[2], b[2])]


def _linear(x: tuple, weight: tuple) -> list[tuple]:
    return [(1, math.prod(x[:-1]), weight[1], weight[0])]


def _grouped(a: tuple, b: tuple) -> list[tuple]:
    if len(b) == 3:  # each row times the matrix of its expert
        return [(1, a[0], a[1], b[2])]
    return [(1, a[0], a[1], b[1])]  # the experts' weight gradients


def _convolution(x: tuple, weight: tuple) -> list[tuple]:
    """The product that replaces a patch embedding. Its patches do not overlap."""
    patches = x[0] * (x[2] // weight[2]) * (x[3] // weight[3])
    return [(1, patches, math.prod(weight[1:]), weight[0])]


def _attention(q: tuple, products: int) -> list[tuple]:
    batch, n, d = q[0] * q[1], q[2], q[3]
    return ([(batch, n, d, n), (batch, n, n, d)] * 3)[:products]


# Operators that multiply matrices, and the products (batch, m, k, n) they compute, from the sizes of their arguments.
SHAPES: dict[str, Any] = {
    "aten::mm": lambda s: _mm(s[0], s[1]),
    "aten::addmm": lambda s: _mm(s[1], s[2]),
    "aten::bmm": lambda s: _bmm(s[0], s[1]),
    "aten::baddbmm": lambda s: _bmm(s[1], s[2]),
    "aten::_addmm_activation": lambda s: _mm(s[1], s[2]),
    "aten::_grouped_mm": lambda s: _grouped(s[0], s[1]),
    "mkldnn::_linear_pointwise": lambda s: _linear(s[0], s[1]),
    "aten::mkldnn_convolution": lambda s: _convolution(s[0], s[1]),
    "aten::cudnn_convolution": lambda s: _convolution(s[0], s[1]),
    # Only the weight's gradient: the images need none.
    "aten::convolution_backward": lambda s: _convolution(s[1], s[2]),
}
# Fused attention by kernel: two products in the forward pass. The backward pass recomputes the map: five products.
for _kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    SHAPES[f"aten::_scaled_dot_product_{_kernel}"] = lambda s: _attention(s[0], 2)  # s[0], s[1]: the queries
    SHAPES[f"aten::_scaled_dot_product_{_kernel}_backward"] = lambda s: _attention(s[1], 5)


def time_products(products: Iterable[Product], device: torch.device, budget: float = 0.1) -> dict[Product, float]:
    """Return the shortest time of each product in seconds, over layouts of its operands and available kernels.

    Args:
        budget: seconds to spend on each combination of product, layout and kernel.
    """
    return {product: _best(product, device, budget) for product in products}


def _best(product: Product, device: torch.device, budget: float) -> float:
    dtype = getattr(torch, product.dtype)
    draws = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        value = torch.randn(product.batch, *shape, generator=draws, device=device).to(dtype)
        return value.transpose(1, 2) if transposed else value

    best = math.inf
    for left, right in ((False, False), (False, True), (True, False)):
        a, b = matrix(product.m, product.k, left), matrix(product.k, product.n, right)
        if product.batch == 1:
            a, b = a[0], b[0]
        out = torch.matmul(a, b)
        kernels = [partial(torch.matmul, a, b, out=out)]
        if product.batch == 1:
            kernels.append(partial(linear.product, a, b.t(), repeats=True))
        for kernel in kernels:
            began, runs = time.perf_counter(), 0
            while runs < 3 or time.perf_counter() - began < budget:
                start = time.perf_counter()
                kernel()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best = min(best, time.perf_counter() - start)
                runs += 1
    return best
