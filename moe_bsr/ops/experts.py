"""The experts of a mixture: dispatch | experts | combine, in a loop or as grouped products.

Tokens are gathered into rows grouped by expert, run through their expert's two layers, and summed with
their gates. Nothing is dropped, and any number of rows for an expert is right, none included. Shapes:

    T tokens of the micro-batch (images x tokens), D width, E experts, K = top_k, F hidden width,
    R rows of the experts' batch, grouped by expert: T * K and padding
"""

from collections.abc import Iterator, Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr.config import MoEConfig, require
from moe_bsr.ops.linear import activation_backward, compute_dtype, no_values, product
from moe_bsr.runtime.rng import generator


def row_padding(assignments: int, experts: int, narrow: bool) -> int:
    """To a multiple of what the loop pads each expert's rows: 1, or with `narrow`, bf16 on a CPU, 16 or 64.

    There every new matrix shape costs oneDNN a compilation, ten times the product of 800 rows itself;
    padded row counts soon repeat. Small groups have few counts anyway, and the most to lose by padding.
    """
    if not narrow:
        return 1
    return 64 if assignments > 512 * experts else 16


def plan_rows(chosen: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each assignment goes in the experts' batch, whose rows are grouped by expert.

    Args:
        chosen: (T, K) int64 experts. multiple: each expert's rows are padded to a multiple of this.
    Returns:
        slot (T * K,) row of each assignment; token (R,) token of each row (0 in padding); rows of each
        expert (E,), padding included.
    """
    ordered, order = chosen.flatten().sort(stable=True)
    # Not `bincount`, nor without padding a sum that Python reads: a GPU need not be waited for.
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ordered.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padded = (counts + multiple - 1) // multiple * multiple
    shift = (padded.cumsum(0) - padded) - (ends - counts)
    row = torch.arange(len(ordered), device=ordered.device) + shift[ordered]
    slot = torch.empty_like(order).scatter(0, order, row)
    size = len(ordered) if multiple == 1 else int(padded.sum())
    token = torch.zeros(size, dtype=torch.int64, device=ordered.device).scatter(0, row, order // chosen.shape[1])
    return slot, token, padded


def is_grouped(engine: str, on_gpu: bool, bf16: bool) -> bool:
    """Whether `moe.backend` means grouped products: on GPUs `grouped_mm` promises bf16 alone."""
    return engine == "grouped" or (engine == "auto" and on_gpu and bf16)


class Dispatch(torch.autograd.Function):
    """Rows of the experts' batch from the tokens. (T, D) -> (R, D).

    The backward gathers each token's K rows and adds them: the same sum in the same order every time,
    where the backward of plain indexing adds atomically in any order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, slot: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.tokens = len(x)
        return x[token]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slot,) = ctx.saved_tensors
        return grad[slot].view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class Combine(torch.autograd.Function):
    """Gate-weighted sum of each token's K expert outputs. (R, D), (T, K) -> (T, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, gates: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, slot)
        by_token = rows[slot].view(*gates.shape, -1)
        return (gates.to(rows.dtype).unsqueeze(1) @ by_token).squeeze(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, gates, slot = ctx.saved_tensors
        grad = grad.to(rows.dtype)
        grad_rows = torch.zeros_like(rows)
        grad_rows[slot] = (gates.to(rows.dtype).unsqueeze(2) * grad.unsqueeze(1)).flatten(0, 1)
        by_token = rows[slot].view(*gates.shape, -1)
        grad_gates = (by_token @ grad.unsqueeze(2)).squeeze(2).to(gates.dtype)
        return grad_rows, grad_gates, None


class ExpertLoop(torch.autograd.Function):
    """Dispatch, experts and combine, one expert after the other. (T, D), (T, K) -> (T, D).

    It keeps the tokens and each row's hidden values before the activation. Of everything else only one
    expert's part is ever alive: its rows are gathered, its master weights cast, and what it puts out is
    added to its tokens at once, in float32. The gate of a row has the gradient <grad W2, act(h)> + <grad, b2>,
    so that the experts' outputs need not be kept for it.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gates: Tensor,
        slot: Tensor,
        token: Tensor,
        counts: list[int],
        keeps: bool,
        needs_output: bool,
        act: nn.Module,
        *parameters: Tensor | None,
    ) -> Tensor:
        gate, y, hidden = _of_rows(gates, slot, token), _wide_zeros(x) if needs_output else None, []
        for expert, rows in _parts(counts):
            before = _add_expert(y, x, gate[rows], token[rows], act, *_one(parameters, expert))
            if keeps:
                hidden.append(before)
            del before  # it would live beside the next expert's
        ctx.save_for_backward(x, gates.unsqueeze(2), slot, token, *parameters, *hidden)
        ctx.counts, ctx.act = counts, act
        return y.to(x.dtype) if needs_output else no_values(x, x.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gates, slot, token, *parameters = ctx.saved_tensors
        parameters, hidden, gates = parameters[:4], parameters[4:], gates.squeeze(2)
        grad, gate = grad.to(x.dtype), _of_rows(gates, slot, token)
        grads = [None if p is None else torch.empty_like(p) for p in parameters]
        grad_x, grad_gate = _wide_zeros(x), torch.empty_like(gate)
        for expert, count in enumerate(ctx.counts):
            if not count:
                for of_unused in _one(grads, expert):
                    if of_unused is not None:
                        of_unused.zero_()
        for (expert, rows), before in zip(_parts(ctx.counts), hidden, strict=True):
            grad_gate[rows] = _expert_backward(
                grad_x,
                _one(grads, expert),
                grad,
                x,
                gate[rows],
                token[rows],
                before,
                ctx.act,
                *_one(parameters, expert),
            )
        grad_gates = grad_gate.flatten().index_select(0, slot).view_as(gates)
        return grad_x.to(x.dtype), grad_gates, None, None, None, None, None, None, *grads


def _add_expert(
    y: Tensor | None,
    x: Tensor,
    gate: Tensor,
    token: Tensor,
    act: nn.Module,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> Tensor:
    """Add one expert's gated outputs to y (T, D), if there is one; returns its rows' hidden values before the
    activation."""
    before = product(x.index_select(0, token), *_cast(x, w1, b1))
    if y is not None:
        y.index_add_(0, token, gate * product(act(before), *_cast(x, w2, b2)))
    return before


def _expert_backward(
    grad_x: Tensor,
    grads: list[Tensor | None],
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    token: Tensor,
    before: Tensor,
    act: nn.Module,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> Tensor:
    """Write one expert's parameters' gradients into `grads`, add its rows' to grad_x (T, D) in float32.

    Returns the gates' gradients, one of each row (rows, 1). Gates are multiplied where rows are narrow.
    """
    of_w1, of_b1, of_w2, of_b2 = grads
    after, out = act(before), grad.index_select(0, token)
    back = out @ _cast(x, w2)[0]
    of_gate = 0.0 if b2 is None else out @ _cast(x, b2)[0].unsqueeze(1)
    out.mul_(gate)
    _product_into(of_w2, out.t(), after)
    if of_b2 is not None:
        of_b2.copy_(out.sum(0))
    del out
    by_unit = torch.mul(after, back, out=None if after is before else after)
    of_gate = of_gate + by_unit.sum(1, keepdim=True)  # asked for float32, it would copy all of bf16 first
    del after, by_unit
    back = activation_backward(act, before, back)
    _product_into(of_w1, back.t(), x.index_select(0, token).mul_(gate))
    if of_b1 is not None:
        of_b1.copy_((gate.t().to(back.dtype) @ back).squeeze(0))
    grad_x.index_add_(0, token, gate * (back @ _cast(x, w1)[0]))
    return of_gate


def _of_rows(gates: Tensor, slot: Tensor, token: Tensor) -> Tensor:
    """(T, K) gates as (R, 1), 0 in padding."""
    return gates.new_zeros(len(token)).scatter(0, slot, gates.flatten()).unsqueeze(1)


def _product_into(place: Tensor, a: Tensor, b: Tensor) -> None:
    """place = a b; in float32 without a copy."""
    if place.dtype == a.dtype:
        torch.mm(a, b, out=place)
    else:
        place.copy_(a @ b)


def _wide_zeros(x: Tensor) -> Tensor:
    """What rows are added up in: float32 or wider."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _parts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _one(stacked: Sequence[Tensor | None], expert: int) -> list[Tensor | None]:
    return [None if whole is None else whole[expert] for whole in stacked]


def _cast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.to(x.dtype) for p in parameters]


class Experts(nn.Module):
    """E independent two-layer MLPs, their parameters stacked."""

    def __init__(self, mlp: Mlp, config: MoEConfig, seed: tuple) -> None:
        """Upcycle a pretrained FFN into experts (see `MoE.__init__` for what each copy holds)."""
        super().__init__()
        hidden, width = mlp.fc1.weight.shape
        fitting = [ratio for ratio in range(1, hidden // width + 1) if hidden % (ratio * width) == 0]
        require(
            config.mlp_ratio in fitting,
            "moe.mlp_ratio",
            config.mlp_ratio,
            f"ratio x width = {config.mlp_ratio * width} must divide the FFN's hidden width {hidden}; "
            + (
                f"here {' or '.join(map(str, fitting))}"
                if fitting
                else "no ratio does here, so leave plan.moe_blocks empty"
            ),
        )
        slices = hidden // (config.mlp_ratio * width)
        draws = generator(*seed)
        units = [torch.arange(e % slices, hidden, slices) for e in range(config.num_experts)]
        stacked = {
            "fc1_weight": [mlp.fc1.weight[u] for u in units],
            "fc1_bias": None if mlp.fc1.bias is None else [mlp.fc1.bias[u] for u in units],
            "fc2_weight": [slices * mlp.fc2.weight[:, u] for u in units],
            "fc2_bias": None if mlp.fc2.bias is None else [mlp.fc2.bias] * config.num_experts,
        }
        for name, copies in stacked.items():
            value = None if copies is None else torch.stack([c.detach() for c in copies])
            if value is not None and config.init_noise:
                noise = torch.randn(value.shape, generator=draws).to(value.device)
                value = value + config.init_noise * value.std() * noise
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.act = mlp.act
        self.engine = config.backend

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor, needs_output: bool = True) -> Tensor:
        """Gate-weighted sum of each token's chosen experts: (T, D), (T, K) float32, (T, K) int64 -> (T, D).

        Args:
            valued: False leaves the values out where that saves work, and keeps what the backward pass needs.
        """
        x = x.to(compute_dtype(x))
        parameters = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        aligned = all(size * x.element_size() % 16 == 0 for size in self.fc1_weight.shape[1:])
        if self.engine == "grouped":
            require(
                aligned,
                "moe.backend",
                "grouped",
                f"experts of {tuple(self.fc1_weight.shape[1:])} in {x.dtype} are no multiples of 16 bytes; use loop",
            )
        grouped = aligned and is_grouped(self.engine, x.is_cuda, x.dtype == torch.bfloat16)
        narrow = x.device.type == "cpu" and x.dtype == torch.bfloat16
        slot, token, counts = plan_rows(
            chosen, len(self.fc1_weight), row_padding(chosen.numel(), len(self.fc1_weight), narrow)
        )
        if not grouped:
            return ExpertLoop.apply(
                x, gates, slot, token, counts.tolist(), torch.is_grad_enabled(), needs_output, self.act, *parameters
            )
        return Combine.apply(self._grouped(Dispatch.apply(x, slot, token), counts), gates, slot)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        expert = torch.repeat_interleave(counts, output_size=len(rows))

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.grouped_mm(x, weight.to(x.dtype).transpose(-2, -1), offs=ends)
            # Looked up in float32: the backward adds up thousands of rows in the bias's own type.
            return y if bias is None else y + F.embedding(expert, bias).to(x.dtype)

        hidden = self.act(linear(rows, self.fc1_weight, self.fc1_bias))
        return linear(hidden, self.fc2_weight, self.fc2_bias)
