"""Compute the output sizes of common operators from the sizes of their arguments.

The rules are only a shortcut. `operators` compares a rule with `FakeTensorMode` whenever it meets arguments of new
dtypes or layouts, and does not use it for them if it is wrong. It learns the layouts of the results at the same time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Sizes = list[tuple[int, ...] | None]


def _broadcast(*tensors: Any) -> Sizes:
    return [tuple(torch.broadcast_shapes(*(t.shape for t in tensors if isinstance(t, Tensor))))]


def _same(x: Tensor, *_: Any) -> Sizes:
    return [tuple(x.shape)]


def _reduced(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *_: Any) -> Sizes:
    if isinstance(dims, int):
        dims = [dims]
    places = {d % x.ndim for d in dims} if dims else set(range(x.ndim))
    sizes = [1 if i in places else n for i, n in enumerate(x.shape)]
    return [tuple(n for i, n in enumerate(sizes) if keepdim or i not in places)]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Sizes:
    sizes = list(tensors[0].shape)
    sizes[dim] = sum(t.shape[dim] for t in tensors)
    return [tuple(sizes)]


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Sizes | None:
    if any(i is None or i.dtype != torch.int64 for i in indices):
        return None
    return [(*torch.broadcast_shapes(*(i.shape for i in indices)), *x.shape[len(indices) :])]


def _index_select(x: Tensor, dim: int, index: Tensor) -> Sizes:
    sizes = list(x.shape)
    sizes[dim] = len(index)
    return [tuple(sizes)]


def _topk(x: Tensor, k: int, dim: int = -1, *_: Any) -> Sizes:
    sizes = list(x.shape)
    sizes[dim] = k
    return [tuple(sizes), tuple(sizes)]


def _layer_norm(x: Tensor, normalized: Sequence[int], *_: Any) -> Sizes:
    rows = (*x.shape[: x.ndim - len(normalized)], *(1 for _ in normalized))
    return [tuple(x.shape), rows, rows]


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> Sizes:
    sizes = (tuple(x.shape), tuple(normalized), tuple(normalized))
    return [size if wanted else None for size, wanted in zip(sizes, mask, strict=True)]


def _sized(size: Sequence[int], *_: Any) -> Sizes:
    return [tuple(size)]


def _new_sized(x: Tensor, size: Sequence[int], *_: Any) -> Sizes:
    return [tuple(size)]


RULES: dict[Any, Callable[..., Sizes | None]] = {
    aten.mm.default: lambda a, b: [(a.shape[0], b.shape[1])],
    aten.bmm.default: lambda a, b: [(a.shape[0], a.shape[1], b.shape[2])],
    aten.addmm.default: lambda c, a, b: [(a.shape[0], b.shape[1])],
    torch.ops.mkldnn._linear_pointwise.default: lambda x, weight, *_: [(*x.shape[:-1], weight.shape[0])],
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._softmax.default: _same,
    aten._log_softmax.default: _same,
    aten._softmax_backward_data.default: _same,
    aten._log_softmax_backward_data.default: _same,
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.amax.default: _reduced,
    aten.var.correction: lambda x, dims=None, **_: _reduced(x, dims),
    aten.sum.default: lambda x, **_: [()],
    aten.cat.default: _cat,
    aten.stack.default: lambda tensors, dim=0: (
        [(*tensors[0].shape[:dim], len(tensors), *tensors[0].shape[dim:])] if dim >= 0 else None
    ),
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.embedding.default: lambda weight, index, *_: [(*index.shape, *weight.shape[1:])],
    aten.gather.default: lambda x, dim, index, **_: [tuple(index.shape)],
    aten.scatter.src: _same,
    aten.scatter.value: _same,
    aten.index_put.default: _same,
    aten.cumsum.default: _same,
    aten.sort.default: lambda x, *_: [tuple(x.shape)] * 2,
    aten.sort.stable: lambda x, **_: [tuple(x.shape)] * 2,
    aten.topk.default: _topk,
    aten.searchsorted.Tensor: lambda sequence, x, **_: [tuple(x.shape)],
    aten._scaled_dot_product_flash_attention_for_cpu.default: lambda q, *_, **__: [tuple(q.shape), tuple(q.shape[:3])],
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda grad, q, k, v, *_, **__: [
        tuple(q.shape),
        tuple(k.shape),
        tuple(v.shape),
    ],
    aten.floor_divide.default: lambda a, b: _broadcast(a, b),
    aten.scatter_add.default: _same,
    aten.slice_backward.default: _new_sized,
    aten.select_backward.default: _new_sized,
    aten.nll_loss_forward.default: lambda x, target, weight, reduction, _: [(), ()] if reduction else None,
    aten.nll_loss_backward.default: lambda grad, x, *_: [tuple(x.shape)],
    aten.clone.default: _same,
    aten._to_copy.default: _same,
    aten.empty.memory_format: _sized,
    aten.zeros.default: _sized,
    aten.ones.default: _sized,
    aten.full.default: _sized,
    aten.randn.generator: _sized,
    aten.new_empty.default: _new_sized,
    aten.new_zeros.default: _new_sized,
    aten.new_full.default: _new_sized,
    aten.empty_like.default: _same,
    aten.zeros_like.default: _same,
    aten.ones_like.default: _same,
    aten.full_like.default: _same,
}


def sizes(func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Sizes | None:
    """Return the sizes of an operator's outputs, or None if there is no rule.

    An output that the operator returns as None has None in place of its size.

    Args:
        tensors: all tensors among the arguments.
    """
    rule = RULES.get(func)
    if rule is None:
        if torch.Tag.pointwise not in func.tags:
            return None
        rule = _broadcast
        args, kwargs = tensors, {}
    try:
        return rule(*args, **({} if rule in _WITHOUT_NAMES else kwargs))
    except TypeError:  # a form of call that the rule does not cover
        return None


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any) -> Sizes:
    if a.ndim == 2 and b.ndim == 2:
        return [(len(offsets), a.shape[0], b.shape[1])]
    return [(*a.shape[:-1], b.shape[-1])]


# Operators that `FakeTensorMode` refuses although their kernels work: grouped products of float32.
OWN: dict[Any, Callable[..., Sizes]] = {torch.ops.aten._grouped_mm.default: _grouped}

_WITHOUT_NAMES = {_broadcast, _same, _sized, _new_sized, _reduced}  # keyword arguments have no influence on the sizes


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's dimensions from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda i: -strides[i]))


def strides(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions lie in memory in this order, outermost first."""
    result, step = [0] * len(size), 1
    for dimension in reversed(order):
        result[dimension] = step
        step *= max(size[dimension], 1)
    return tuple(result)


def contiguous(size: Sequence[int]) -> tuple[int, ...]:
    return strides(size, range(len(size)))
