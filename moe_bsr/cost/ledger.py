"""The ledger: bytes alive during a training step, as each part states that it makes and frees tensors.

Beside its forward every part has a function ending in `_bytes` that retells what the forward allocates,
keeps and frees, from shapes and types alone, and returns the output and a function that retells the
backward. Played through in order they give the bytes kept for backward and the peak of a step without
running anything. Gradients of parameters are not in the ledger: they are counted exactly elsewhere.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

from moe_bsr.runtime import cpu_features as cpu

ROW = 4  # float32 statistics
INDEX = 8  # int64


class Held:
    """A tensor: its bytes, whether Python still holds it, by how many operations it is saved."""

    __slots__ = ("bytes", "packable", "held", "saves", "packed")

    def __init__(self, size: int, packable: bool) -> None:
        self.bytes, self.packable = size, packable
        self.held, self.saves, self.packed = True, 0, 0


Backward = Callable[[Held], Held | None]


class Ledger:
    """Attributes:
    size: bytes of an element in the compute dtype. threads: of the kernels' scratch memory.
    shares: of a mixture layer, its largest expert's group over an equal one, where that is known.
    tokens: how many there are at this point (a packed tensor has one scale for all of them).
    grad: whether a graph is being built. valued: whether the values of blocks' outputs are wanted.
    live, peak: bytes. kept: by section and kind.
    pack: (bytes of a tensor, its columns' scales) -> bytes packed, or None.
    """

    def __init__(self, size: int, threads: int, shares: dict | None = None) -> None:
        self.size, self.threads, self.shares = size, threads, shares or {}
        self.grad, self.needs_output, self.section, self.tokens = False, True, "", 1
        self.pack: Callable[[Held], tuple[int, int]] | None = None
        self.live = self.peak = self.decided = 0
        self.kept: dict[str, Counter] = {}

    def make(self, size: int, packable: bool = True) -> Held:
        self._add(size)
        return Held(size, packable)

    def scratch(self, size: int) -> None:
        """Memory of a kernel or a temporary, gone at once."""
        self._add(size)
        self.live -= size

    def product_scratch(self, rows: int, inputs: int, outputs: int) -> int:
        """Bytes for (rows, inputs) x (inputs, outputs), in bf16. With matrix tiles oneDNN lays the weight out anew,
        with vector instructions parts of it (fitted), and with neither it accumulates in a float32 result."""
        if self.size == 4:
            return 0
        if cpu.bf16_instructions() == "amx_bf16":
            return inputs * outputs * self.size
        if cpu.bf16_instructions() == "avx512_bf16":
            return 45_000 + 100 * inputs
        return rows * outputs * ROW

    def weight_gradient_scratch(self, rows: int, inputs: int, outputs: int) -> int:
        """The same for (outputs, rows) x (rows, inputs), whose operands lie transposed: with bf16
        instructions fitted to measurements; it stops at 1.6 MB."""
        if self.size == 4:
            return 0
        width = min(inputs, outputs)
        if cpu.bf16_instructions() == "amx_bf16":
            return min(2 * rows * width + 600 * width + 60_000, 1_600_000)
        if cpu.bf16_instructions() == "avx512_bf16":
            return min(min(rows, 544) * (6 * width + 100), 1_600_000)
        return inputs * outputs * ROW

    def save(self, tensor: Held, kind: str) -> None:
        """An operation keeps the tensor for its backward (nothing happens without a graph)."""
        if not self.grad:
            return
        kept = self.kept.setdefault(self.section, Counter())
        if tensor.saves == 0:
            if self.pack is not None and tensor.packable:
                tensor.packed, temporary = self.pack(tensor)
                self.scratch(temporary)
                self._add(tensor.packed)
            kept[kind] += tensor.packed or tensor.bytes
        tensor.saves += 1

    def free(self, *tensors: Held | None) -> None:
        """Python lets go of tensors; saved ones stay, unless it is a packed form that is saved."""
        for tensor in tensors:
            if tensor is not None and tensor.held:
                tensor.held = False
                if tensor.saves == 0 or tensor.packed:
                    self.live -= tensor.bytes

    def restore(self, tensor: Held) -> None:
        """A backward operation gets what was saved: as it is, or made again from its packed form."""
        if tensor.packed:
            self._add(tensor.bytes)

    def release(self, tensor: Held) -> None:
        """That operation is done."""
        if not self.grad and tensor.saves == 0:
            return
        if tensor.packed:
            self.live -= tensor.bytes
        tensor.saves -= 1
        if tensor.saves == 0:
            self.live -= tensor.packed if tensor.packed else (0 if tensor.held else tensor.bytes)
            tensor.packed = 0 if tensor.held else tensor.packed

    @contextmanager
    def mode(self, grad: bool, pack: Callable | None = None, needs_output: bool = True):
        before, (self.grad, self.pack, self.needs_output) = (
            (self.grad, self.pack, self.needs_output),
            (grad, pack, needs_output),
        )
        try:
            yield
        finally:
            self.grad, self.pack, self.needs_output = before

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def norm_bytes(ledger: Ledger, norm, x: Held, rows: int, width: int, needs_x: bool) -> tuple[Held, Backward]:
    """A LayerNorm keeps its input (a frozen one too, on the gradient path) and two statistics a row."""
    trains = any(p.requires_grad for p in norm.parameters())
    y = ledger.make(rows * width * ledger.size)
    statistics = ledger.make(2 * rows * ROW, packable=False)
    saved = trains or needs_x
    if saved:
        ledger.save(x, "norm inputs")
        ledger.save(statistics, "norm statistics")
    ledger.free(statistics)

    def backward(grad: Held) -> Held | None:
        ledger.restore(x)
        out = ledger.make(rows * width * ledger.size) if needs_x else None
        ledger.scratch(ledger.threads * 2 * width * ledger.size if trains else 0)
        if saved:
            ledger.release(x)
            ledger.release(statistics)
        ledger.free(grad)
        return out

    return y, backward


def add_bytes(ledger: Ledger, first: Held, second: Held | None) -> Held:
    """Two gradients of one tensor: the second is added to the first in place."""
    ledger.free(second)
    return first
