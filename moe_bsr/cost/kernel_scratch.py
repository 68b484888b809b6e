"""Predict the scratch memory that kernels allocate while they run, which a torch dispatch mode cannot see.

The table `FITS` has one row per kernel and kind of CPU. The sizes were measured with torch's profiler, which reports
what a kernel requests from torch's allocator. The rows are fits, accurate to about ten percent. The few large ones
(patch convolutions, bf16 products without bf16 instructions, packed keys and values of flash attention) are exact
where they were measured. A kernel without a row counts as 0 bytes. There are no rows for GPU kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from moe_bsr.runtime import cpu_features as cpu

AMX, VECTORS, AVX512, AVX2 = "amx_bf16", "avx512_bf16", "avx512", "avx2"
SPR = "Xeon (Sapphire Rapids), torch 2.11.0, 2026-11-26"
SPR_OLD = "Xeon with AMX, torch 2.15.0, 2026-11-21"
ZEN4 = "Zen 4, torch 2.14.1, 2026-11-24"
ZEN3 = "Zen 3, torch 2.14.1, 2026-11-26"


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted scratch memory of some kernels for one dtype.

    Attributes:
        kernels: names of the operators. cpus: kinds of CPU (`cpu_kind`) to which the fit applies; empty: all.
        size: (threads, arguments, result) -> bytes. measured: CPU, torch version and date of the measurement.
    """

    kernels: tuple[str, ...]
    dtype: torch.dtype
    cpus: tuple[str, ...]
    size: Callable[[int, Sequence[Any], Any], float]
    measured: str


def cpu_kind() -> str:
    """Return the CPU feature by which oneDNN chooses its kernels: bf16 tiles, bf16 vectors, AVX-512 or AVX2."""
    return cpu.bf16_instructions() or (AVX512 if "avx512bw" in cpu.flags() else AVX2)


def on(device: torch.device, threads: int) -> Callable[[str, Sequence[Any], Any], int]:
    """Return a function (operator name, arguments, result) -> scratch bytes for this device."""
    if device.type != "cpu":
        return nothing
    return partial(_bytes, _fits(cpu_kind()), threads)


def nothing(name: str, args: Sequence[Any], result: Any) -> int:
    """Return 0, for devices without fits and for predictions that leave scratch memory out."""
    return 0


def _fits(kind: str) -> dict[tuple[str, torch.dtype], Fit]:
    return {(kernel, fit.dtype): fit for fit in FITS if not fit.cpus or kind in fit.cpus for kernel in fit.kernels}


def _bytes(fits: dict[tuple[str, torch.dtype], Fit], threads: int, name: str, args: Sequence[Any], result: Any) -> int:
    tensor = next((a for a in args if isinstance(a, Tensor)), None)
    fit = None if tensor is None else fits.get((name, tensor.dtype))
    return 0 if fit is None else int(fit.size(threads, args, result))


def _operands(args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return the two matrices of a matrix product, without its bias."""
    first, second, *rest = args
    return (second, rest[0]) if rest and isinstance(rest[0], Tensor) and first.ndim < 2 else (first, second)


def _relaid_rows(threads: int, args: Sequence[Any], result: Any) -> float:
    """oneDNN's float32 product copies rows of the first operand panel by panel, unless the weight is transposed."""
    x, weight, *_ = args
    inputs = x.shape[-1]
    return 640 * threads + 256 if not weight.is_contiguous() else threads * (256 * min(inputs, 1024) + 768) + 128


def _wide_rows(threads: int, args: Sequence[Any], result: Any) -> float:
    """The same as `_relaid_rows` with AVX-512, where products with few rows use a kernel without copies."""
    x, weight, *_ = args
    inputs, rows = x.shape[-1], x.numel() // x.shape[-1]
    if not weight.is_contiguous() or rows < 256 and inputs < 384:
        return 0
    return threads * (256 * min(inputs, 512 if inputs < 1024 else 1024) + 768) + 128


def _is_weight_gradient(args: Sequence[Any]) -> bool:
    a, _ = _operands(args)
    return a.ndim == 2 and not a.is_contiguous()


def _tiles(threads: int, args: Sequence[Any], result: Any) -> float:
    """bf16 products with matrix tiles. Depending on torch's version, each thread copies some rows of the first operand,
    or the weight is copied into another layout. For a weight's gradient both operands are copied, up to a limit."""
    a, b = _operands(args)
    if _is_weight_gradient(args):
        rows, width = a.shape[1], min(a.shape[0], b.shape[1])
        return min(2 * rows * width + 600 * width + 60_000, 800_000 * threads)
    if torch.__version__ < "2.12":  # measured with 2.11.0 and 2.15.0
        return threads * (128 * a.shape[-1] + 4_800)
    return 2 * b.numel()


def _vectors(threads: int, args: Sequence[Any], result: Any) -> float:
    """bf16 products with vector instructions copy parts of the operands into another layout."""
    a, b = _operands(args)
    if _is_weight_gradient(args):
        rows, width = a.shape[1], min(a.shape[0], b.shape[1])
        return min(min(rows, 544) * (6 * width + 100), 1_600_000)
    return 45_000 + 100 * a.shape[-1]


def _wide_result(threads: int, args: Sequence[Any], result: Any) -> float:
    """Without bf16 instructions, the product is accumulated in a float32 copy of the result."""
    return 4 * result.numel()


def _batched_tiles(threads: int, args: Sequence[Any], result: Any) -> float:
    a, _ = args
    return threads * (128 * a.shape[2] + 9_500 if a.is_contiguous() else 700 * a.shape[2] + 20_000)


def _batched_wide(threads: int, args: Sequence[Any], result: Any) -> float:
    """Each thread holds the float32 result of the one product of the batch that it computes."""
    return threads * 4 * prod(result.shape[1:])


def _attention(threads: int, args: Sequence[Any], result: Any) -> float:
    """Flash attention on a CPU: one block of the attention map and of the output per thread; in bf16 a second map."""
    q = args[0]
    tokens, width, keys = q.shape[2], q.shape[3], min(args[1].shape[2], 512)
    block = _query_block(tokens)
    size = threads * block * (keys + 2 + width) * 4
    return size if q.dtype == torch.float32 else size + threads * block * keys * 2


def _packed_attention(threads: int, args: Sequence[Any], result: Any) -> float:
    """With matrix tiles, flash attention also packs keys and values, except for short sequences."""
    q, k, v, *_ = args
    size = _attention(threads, args, result)
    block, keys = _query_block(q.shape[2]), min(k.shape[2], 512)
    return size if q.shape[2] < 64 else size + threads * block * keys * 2 + 2 * (k.numel() + v.numel())


def _attention_backward(threads: int, args: Sequence[Any], result: Any) -> float:
    """Two blocks of the attention map per thread, in bf16 with a copy of each, and one sum per query."""
    q = args[1]
    block, keys = _query_block(q.shape[2]), min(args[2].shape[2], 512)
    size = threads * block * keys * 8 + 4 * block
    return size if q.dtype == torch.float32 else size + threads * block * keys * 4


def _query_block(tokens: int) -> int:
    return min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)


def _patches(threads: int, args: Sequence[Any], result: Any) -> float:
    """Patch embedding: the weight and then the result in oneDNN's layout, one after the other."""
    return max(args[1].numel(), result.numel()) * result.element_size()


def _patches_backward(threads: int, args: Sequence[Any], result: Any) -> float:
    """Gradient of the patch embedding's weight: for patches of 16 pixels, each thread pads a copy of it and an image.

    The output's gradient is usually a transposed view and is copied first.
    """
    grad, images, weight, *_ = args
    copy = 0 if grad.is_contiguous() else 4 * grad.numel()
    if weight.shape[-1] != 16 or weight.shape[0] % 16:
        return copy + 4 * grad.numel()
    return copy + threads * 4 * (4 * weight.numel() + prod(images.shape[1:])) + 256


def _convolution(threads: int, args: Sequence[Any], result: Any) -> float:
    """The weight and the larger of input and result in oneDNN's layout. Inputs of three channels are not copied."""
    x, weight, _, stride, padding, *_ = args
    if _is_patches(weight, stride, padding) or x.shape[1] < 8:
        return _patches(threads, args, result)
    return 0 if _is_product(weight, stride) else weight.nbytes + max(x.nbytes, result.nbytes)


def _convolution_backward(threads: int, args: Sequence[Any], result: Any) -> float:
    """First the input's gradient, then the weight's. Each needs both operands in oneDNN's layout.

    An input that was expanded from one value, because only its shape is needed, is materialized nevertheless.
    """
    grad, x, weight, _, stride, padding, *_, wanted = args
    if _is_patches(weight, stride, padding):
        return _patches_backward(threads, args, result)
    size, y, w = prod(x.shape) * x.element_size(), grad.nbytes, weight.nbytes
    filled = size if 0 in x.stride() else 0
    if _is_product(weight, stride):
        return filled
    of_input = (max(2 * size, w + size + 2 * y) if max(stride) > 1 else max(w + y, size)) * wanted[0]
    return max(of_input + filled - w * wanted[1], max(size + y, w) * wanted[1])


def _is_patches(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    return max(stride) > 1 and tuple(weight.shape[2:]) == tuple(stride) and not any(padding)


def _is_product(weight: Tensor, stride: Sequence[int]) -> bool:
    return weight.shape[2] == weight.shape[3] == max(stride) == 1


def _layer_norm_backward(threads: int, args: Sequence[Any], result: Any) -> float:
    """Partial sums of the gradients of weight and bias, if either trains."""
    mask = args[7]
    return 2 * threads * prod(args[2]) * args[1].element_size() if mask[1] or mask[2] else 0


def _stable_sort(threads: int, args: Sequence[Any], result: Any) -> float:
    """A copy of the row that is being sorted, of its values or its positions."""
    return args[0].shape[-1] * (args[0].element_size() if args[0].ndim > 1 else 8)


FITS = [
    Fit(("_linear_pointwise",), torch.float32, (AVX2,), _relaid_rows, ZEN3),
    Fit(("_linear_pointwise",), torch.float32, (AMX, VECTORS, AVX512), _wide_rows, SPR),
    Fit(("_linear_pointwise", "addmm", "mm"), torch.bfloat16, (AMX,), _tiles, f"{SPR}; {SPR_OLD}"),
    Fit(("_linear_pointwise", "addmm", "mm"), torch.bfloat16, (VECTORS,), _vectors, ZEN4),
    Fit(("_linear_pointwise", "addmm", "mm"), torch.bfloat16, (AVX512,), _wide_result, SPR),
    Fit(("bmm",), torch.bfloat16, (AMX, VECTORS), _batched_tiles, SPR),
    Fit(("bmm",), torch.bfloat16, (AVX512,), _batched_wide, SPR),
    *(
        Fit(("_scaled_dot_product_flash_attention_for_cpu_backward",), dtype, (), _attention_backward, f"{ZEN3}; {SPR}")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Fit(("_scaled_dot_product_flash_attention_for_cpu",), torch.float32, (), _attention, f"{ZEN3}; {SPR}"),
    Fit(("_scaled_dot_product_flash_attention_for_cpu",), torch.bfloat16, (VECTORS, AVX512, AVX2), _attention, ZEN3),
    Fit(("_scaled_dot_product_flash_attention_for_cpu",), torch.bfloat16, (AMX,), _packed_attention, SPR),
    Fit(("convolution",), torch.float32, (), _convolution, f"{ZEN3}; patches: {SPR}"),
    Fit(("convolution",), torch.bfloat16, (), _patches, f"{ZEN3}; {SPR}"),
    Fit(("convolution_backward",), torch.float32, (), _convolution_backward, f"{ZEN3}; patches: {SPR}"),
    *(
        Fit(("native_layer_norm_backward",), dtype, (), _layer_norm_backward, f"{ZEN3}; {SPR}")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(Fit(("sort",), dtype, (), _stable_sort, f"{ZEN3}; {SPR}") for dtype in (torch.float32, torch.int64)),
]
