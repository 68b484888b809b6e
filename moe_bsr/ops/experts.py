"""Compute a mixture of experts: dispatch, two layers per expert, combine; in a loop or with grouped products.

Tokens are gathered into rows grouped by expert, run through their expert's two layers, and summed with their gates.
No token is dropped, and an expert may have any number of rows, also none. Names end in their shape:

    T tokens of the micro-batch (images x tokens), D width, E experts, K = top_k, F hidden width,
    R rows of the experts' batch, grouped by expert: T * K and padding; r rows of one expert
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.ops.keep import ACTIVATION_INPUTS, LINEAR_INPUTS, keep, keep_alike, reruns_products
from moe_bsr.ops.linear import activation_backward, compute_dtype, empty_output, product

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # (E, F, D), (E, F), (E, D, F), (E, D)


def mixture(
    x_TD: Tensor,
    gates_TK: Tensor,
    chosen_TK: Tensor,
    weights: Weights,
    act: nn.Module,
    backend: str = "auto",
    needs_output: bool = True,
) -> Tensor:
    """Return the gate-weighted sum of each token's chosen two-layer experts, (T, D) in the compute dtype.

    Args:
        gates_TK: float32. chosen_TK: int64, K different experts for each token.
        backend: loop | grouped | auto: grouped products on GPUs in bf16, else the loop.
        needs_output: False if only the graph is needed; the loop then skips the second layer and returns zeros.
    """
    x_TD = x_TD.to(compute_dtype(x_TD))
    if ops.is_reference():
        return mixture_reference(x_TD, gates_TK, chosen_TK, weights, act)
    experts = len(weights[0])
    grouped = is_aligned(weights, x_TD.dtype) and is_grouped(backend, x_TD.is_cuda, x_TD.dtype == torch.bfloat16)
    padding = row_padding(chosen_TK.numel(), experts, x_TD.device.type == "cpu" and x_TD.dtype == torch.bfloat16)
    row_of_assignment, token_of_row, rows_E = sort_by_expert(chosen_TK, experts, padding)
    if grouped:
        x_RD = _Dispatch.apply(x_TD, row_of_assignment, token_of_row)
        return _Combine.apply(_grouped_experts(x_RD, rows_E, weights, act), gates_TK, row_of_assignment)
    rows = rows_per_expert(rows_E, chosen_TK.numel(), padding)
    keeps_hidden = torch.is_grad_enabled() and not reruns_products()
    return _ExpertLoop.apply(
        x_TD, gates_TK, row_of_assignment, token_of_row, rows, keeps_hidden, needs_output, act, *weights
    )


def mixture_reference(x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor, weights: Weights, act: nn.Module) -> Tensor:
    """Run every expert on every token. Experts that were not chosen have gate 0."""
    w1, b1, w2, b2 = weights
    gates_TE = gates_TK.new_zeros(x_TD.shape[0], len(w1)).scatter(1, chosen_TK, gates_TK)
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert, gate_T in enumerate(gates_TE.unbind(1)):
        first, second = (None if b is None else b[expert].to(x_TD.dtype) for b in (b1, b2))
        hidden = act(F.linear(x_TD, w1[expert].to(x_TD.dtype), first))
        y_TD = y_TD + gate_T.unsqueeze(1) * F.linear(hidden, w2[expert].to(x_TD.dtype), second)
    return y_TD.to(x_TD.dtype)


def is_grouped(backend: str, on_gpu: bool, bf16: bool) -> bool:
    """Return whether `moe.backend` means grouped products. On GPUs `grouped_mm` guarantees only bf16."""
    return backend == "grouped" or (backend == "auto" and on_gpu and bf16)


def is_aligned(weights: Weights, dtype: torch.dtype) -> bool:
    """Return whether the rows of the experts' matrices are multiples of 16 bytes, as `grouped_mm` requires."""
    return all(size * dtype.itemsize % 16 == 0 for size in weights[0].shape[1:])


def row_padding(assignments: int, experts: int, bf16_on_cpu: bool) -> int:
    """Return the number to a multiple of which each expert's rows are padded: 1, or in bf16 on a CPU 16 or 64.

    There oneDNN compiles a kernel for every new matrix shape, which takes ten times as long as a product of 800 rows.
    Padded row counts soon repeat. Small groups have few different counts anyway, and padding costs them the most.
    """
    if not bf16_on_cpu:
        return 1
    return 64 if assignments > 512 * experts else 16


RowsOfExperts = Callable[[int, int, int], list[int]]
_assumed: ContextVar[RowsOfExperts | None] = ContextVar("rows of experts", default=None)


@contextmanager
def assume_rows(rows: RowsOfExperts) -> Iterator[None]:
    """Context for fake tensors, whose counts cannot be read: `rows` gives each expert's number of rows instead.

    Args:
        rows: (assignments, experts, padding) -> rows of each expert. They sum to the assignments and the padding.
    """
    token = _assumed.set(rows)
    try:
        yield
    finally:
        _assumed.reset(token)


def rows_per_expert(rows_E: Tensor, assignments: int, padding: int) -> list[int]:
    """Return the number of rows of each expert as Python integers. This waits for a GPU."""
    assumed = _assumed.get()
    return rows_E.tolist() if assumed is None else assumed(assignments, len(rows_E), padding)


def sort_by_expert(chosen_TK: Tensor, experts: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assign each (token, expert) pair a row of the experts' batch, whose rows are grouped by expert.

    Args:
        padding: each expert's rows are padded to a multiple of this.
    Returns:
        row_of_assignment (T * K,); token_of_row (R,), 0 in padding; rows_E (E,), padding included.
    """
    ordered, order = chosen_TK.flatten().sort(stable=True)
    # `bincount` would wait for a GPU. So would the sum below, which is therefore computed only if there is padding.
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ordered.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    rows_E = (counts + padding - 1) // padding * padding
    shift = (rows_E.cumsum(0) - rows_E) - (ends - counts)
    row = torch.arange(len(ordered), device=ordered.device) + shift[ordered]
    row_of_assignment = torch.empty_like(order).scatter(0, order, row)
    size = len(ordered) if padding == 1 else sum(rows_per_expert(rows_E, len(ordered), padding))
    token = order // chosen_TK.shape[1]
    token_of_row = torch.zeros(size, dtype=torch.int64, device=ordered.device).scatter(0, row, token)
    return row_of_assignment, token_of_row, rows_E


class _ExpertLoop(torch.autograd.Function):
    """Dispatch, experts and combine, one expert after the other. (T, D), (T, K) -> (T, D).

    Saved for backward: tokens, gates, weights, and unless they are recomputed the hidden values of each row before the
    activation. Everything else exists for one expert at a time: its rows are gathered, its master weights cast, and its
    output is added to its tokens at once, in float32. The gradient of a row's gate is <grad W2, act(h)> + <grad, b2>,
    so the experts' outputs need not be saved.
    """

    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        gates_TK: Tensor,
        row_of_assignment: Tensor,
        token_of_row: Tensor,
        rows: list[int],
        keeps_hidden: bool,
        needs_output: bool,
        act: nn.Module,
        *weights: Tensor | None,
    ) -> Tensor:
        dtype = x_TD.dtype
        gate_R1 = _gate_of_rows(gates_TK, row_of_assignment, token_of_row)
        y_TD = _float32_zeros(x_TD) if needs_output else None
        hidden = []
        for expert, part in _used_experts(rows):
            w1, b1, w2, b2 = (None if w is None else w[expert] for w in weights)
            token_r = token_of_row[part]
            h_rF = product(x_TD.index_select(0, token_r), *_cast(dtype, w1, b1))
            if y_TD is not None:
                y_TD.index_add_(0, token_r, gate_R1[part] * product(act(h_rF), *_cast(dtype, w2, b2)))
            if keeps_hidden:
                hidden.append(h_rF)
            del h_rF  # before the next expert's is allocated
        keep(LINEAR_INPUTS, x_TD)
        keep_alike(ACTIVATION_INPUTS, hidden)
        # Gates are saved as a column (T, K, 1), which no storage compresses.
        ctx.save_for_backward(x_TD, gates_TK.unsqueeze(2), row_of_assignment, token_of_row, *weights, *hidden)
        ctx.rows, ctx.act = rows, act
        return empty_output(x_TD, x_TD.shape[1]) if y_TD is None else y_TD.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        x_TD, gates_TK1, row_of_assignment, token_of_row, *rest = ctx.saved_tensors
        weights, hidden, gates_TK = rest[:4], rest[4:], gates_TK1.squeeze(2)
        act, dtype = ctx.act, x_TD.dtype
        grad_TD = grad_TD.to(dtype)
        gate_R1 = _gate_of_rows(gates_TK, row_of_assignment, token_of_row)
        needed = ctx.needs_input_grad[8:]  # frozen experts pass gradients on to their input and gates
        grads = [torch.empty_like(w) if needs else None for w, needs in zip(weights, needed, strict=True)]
        grad_x_TD, grad_gate_R1 = _float32_zeros(x_TD), torch.empty_like(gate_R1)
        for expert, count in enumerate(ctx.rows):
            if not count:
                for grad in grads:
                    if grad is not None:
                        grad[expert].zero_()
        for place, (expert, part) in enumerate(_used_experts(ctx.rows)):
            grad_w1, grad_b1, grad_w2, grad_b2 = (None if g is None else g[expert] for g in grads)
            w1, b1, w2, b2 = (None if w is None else w[expert] for w in weights)
            token_r, gate_r1 = token_of_row[part], gate_R1[part]
            h_rF = hidden[place] if hidden else product(x_TD.index_select(0, token_r), *_cast(dtype, w1, b1))
            # Second layer. First the gradients without gates, from which that of the gates follows. Then the gates
            # are multiplied into rows of width D, which are narrower than those of width F.
            act_rF, grad_out_rD = act(h_rF), grad_TD.index_select(0, token_r)
            grad_act_rF = grad_out_rD @ w2.to(dtype)
            grad_gate_r1 = 0.0 if b2 is None else grad_out_rD @ b2.to(dtype).unsqueeze(1)
            grad_out_rD.mul_(gate_r1)
            if grad_w2 is not None:
                _product_into(grad_w2, grad_out_rD.t(), act_rF)
            if grad_b2 is not None:
                grad_b2.copy_(grad_out_rD.sum(0))
            del grad_out_rD
            # <grad W2, act(h)>, in the activation's memory unless the activation returned its input. The sum has the
            # dtype of its operand: for a float32 result, torch would first copy all of it.
            by_unit_rF = torch.mul(act_rF, grad_act_rF, out=None if act_rF is h_rF else act_rF)
            grad_gate_R1[part] = grad_gate_r1 + by_unit_rF.sum(1, keepdim=True)
            del act_rF, by_unit_rF
            # First layer.
            grad_h_rF = activation_backward(act, h_rF, grad_act_rF)
            if grad_w1 is not None:
                _product_into(grad_w1, grad_h_rF.t(), x_TD.index_select(0, token_r).mul_(gate_r1))
            if grad_b1 is not None:
                grad_b1.copy_((gate_r1.t().to(dtype) @ grad_h_rF).squeeze(0))
            grad_x_TD.index_add_(0, token_r, gate_r1 * (grad_h_rF @ w1.to(dtype)))
            del grad_act_rF, grad_h_rF  # before the next expert's are allocated
        grad_gates_TK = grad_gate_R1.flatten().index_select(0, row_of_assignment).view_as(gates_TK)
        return grad_x_TD.to(dtype), grad_gates_TK, None, None, None, None, None, None, *grads


def _gate_of_rows(gates_TK: Tensor, row_of_assignment: Tensor, token_of_row: Tensor) -> Tensor:
    """Return the gate of each row, (R, 1), 0 in padding."""
    return gates_TK.new_zeros(len(token_of_row)).scatter(0, row_of_assignment, gates_TK.flatten()).unsqueeze(1)


def _float32_zeros(x: Tensor) -> Tensor:
    """Return zeros of the shape of x in float32 or wider, in which rows are added up."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _used_experts(rows: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, slice of its rows) for each expert that has any."""
    first = 0
    for expert, count in enumerate(rows):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _cast(dtype: torch.dtype, *weights: Tensor | None) -> list[Tensor | None]:
    return [None if w is None else w.to(dtype) for w in weights]


def _product_into(place: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a b into `place`, without a copy if the dtypes agree."""
    if place.dtype == a.dtype:
        torch.mm(a, b, out=place)
    else:
        place.copy_(a @ b)


def _grouped_experts(x_RD: Tensor, rows_E: Tensor, weights: Weights, act: nn.Module) -> Tensor:
    """Run all experts at once, each on its rows: (R, D) -> (R, D)."""
    w1, b1, w2, b2 = weights
    ends_E = rows_E.cumsum(0).to(torch.int32)
    expert_R = torch.repeat_interleave(rows_E, output_size=len(x_RD))

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(x, weight.to(x.dtype).transpose(-2, -1), offs=ends_E)
        return y if bias is None else y + _BiasOfRows.apply(bias, expert_R, x.dtype)

    return layer(act(layer(x_RD, w1, b1)), w2, b2)


class _BiasOfRows(torch.autograd.Function):
    """(E, F) biases -> the bias of each row, (R, F), in `dtype`.

    The backward pass sums each expert's rows by a product with one-hot marks, which adds in the same order every time.
    The backward pass of plain indexing adds atomically, in any order.
    """

    @staticmethod
    def forward(ctx, bias_EF: Tensor, expert_R: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(expert_R)
        ctx.experts, ctx.dtype = len(bias_EF), bias_EF.dtype
        return bias_EF.to(dtype).index_select(0, expert_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RF: Tensor):
        (expert_R,) = ctx.saved_tensors
        marks_RE = F.one_hot(expert_R, ctx.experts).to(grad_RF.dtype)
        return (marks_RE.t() @ grad_RF).to(ctx.dtype), None, None


class _Dispatch(torch.autograd.Function):
    """Gather the rows of the experts' batch from the tokens. (T, D) -> (R, D).

    The backward pass gathers each token's K rows and adds them, in the same order every time. The backward pass of
    plain indexing adds atomically, in any order.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, row_of_assignment: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_assignment)
        ctx.tokens = len(x_TD)
        return x_TD[token_of_row]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):
        (row_of_assignment,) = ctx.saved_tensors
        return grad_RD[row_of_assignment].view(ctx.tokens, -1, grad_RD.shape[1]).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Gate-weighted sum of each token's K expert outputs. (R, D), (T, K) -> (T, D)."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, gates_TK: Tensor, row_of_assignment: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gates_TK.unsqueeze(2), row_of_assignment)  # columns, which no storage compresses
        y_TKD = y_RD[row_of_assignment].view(*gates_TK.shape, -1)
        return (gates_TK.to(y_RD.dtype).unsqueeze(1) @ y_TKD).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        y_RD, gates_TK1, row_of_assignment = ctx.saved_tensors
        grad_TD, gates_TK = grad_TD.to(y_RD.dtype), gates_TK1.squeeze(2)
        grad_RD = torch.zeros_like(y_RD)
        grad_RD[row_of_assignment] = (gates_TK.to(y_RD.dtype).unsqueeze(2) * grad_TD.unsqueeze(1)).flatten(0, 1)
        y_TKD = y_RD[row_of_assignment].view(*gates_TK.shape, -1)
        grad_gates_TK = (y_TKD @ grad_TD.unsqueeze(2)).squeeze(2).to(gates_TK.dtype)
        return grad_RD, grad_gates_TK, None
