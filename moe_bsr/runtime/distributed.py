"""Communication between the processes that train one model together (data parallelism).

torchrun starts the processes. All hold the same weights and take the same updates. Each computes its share of an
update's micro-batches, and the gradients that exist are summed before they are clipped. DistributedDataParallel is not
used, since it would send zeros for the other tasks' heads. `Alone` has the same methods for one process, so callers
need not distinguish.

A process that fails tells the others why and leaves. Their next exchange then raises `RankLost`.
"""

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_bsr.config import ConfigError
from moe_bsr.runtime import heard
from moe_bsr.runtime.exchange import sum_all
from moe_bsr.runtime.interrupt import STOPPING, Interrupted, RankLost, StopSignals
from moe_bsr.runtime.rendezvous import TIMEOUT, join

Value = TypeVar("Value")
PATIENCE = 1.0  # seconds to wait until a lost process of this machine has ended
ENDED = "ended"  # key in the store: which process ended the run, and why


class Alone:
    """Communication of a single process: every exchange returns its own value.

    Attributes:
        rank: number of this process. world: number of processes. local: number of processes on this machine.
        first: whether this is rank 0, which writes, prints and decides.
    """

    rank, world, local = 0, 1, 1
    first = True

    def __init__(self) -> None:
        self.listen(StopSignals())

    def listen(self, stop: StopSignals) -> None:
        """Watch these signals from now on."""
        self.stop = stop

    @property
    def signal(self) -> int:
        """Number of the signal on which all processes stop, 0 if there was none."""
        return self.stop.number

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Context for work that changes no state and ends with `gather`.

        A signal raises Interrupted: at once in a single process, in `gather` in one of several.
        """
        return self.stop.at_once()

    @property
    def leaving(self) -> bool:
        """Whether work inside `at_once` may be skipped, because the next `gather` will raise Interrupted."""
        return False

    def mine(self, count: int) -> range:
        """Return which of `count` equal pieces belong to this process. In rank order they cover all pieces."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def by_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` in the first process only, and return its result in all of them."""
        return work()

    def share(self, value: Value) -> Value:
        """Return the first process's value in all of them (broadcast)."""
        return value

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors in all of them. The other processes may pass an empty dict."""
        return tensors

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, by rank.

        Raises:
            Interrupted: a signal reached one of the processes. It is raised in all of them.
        """
        return [value]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows (n, ...) of all processes to (world x n, ...), by rank. All pass the same shape."""
        return rows

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum float64 values over all processes. The same exchange agrees on `signal`."""
        return values

    def sum_gradients(self, parameters: list[torch.nn.Parameter], names: dict[torch.nn.Parameter, str]) -> None:
        """Replace the gradients of these parameters by their sums over all processes.

        Args:
            parameters: the same in all processes, in the same order.
            names: name of each parameter.
        """

    def require_same(self, values: dict[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            ConfigError: a process has another value than the first. The message names both.
        """

    def numbers(self) -> dict[str, float]:
        """Return exchanged_mb: gradients this process sent in one update, in 10**6 bytes. Called once per update."""
        return {}

    def report(self) -> dict[str, float]:
        """Return exchanged_mb_per_update for the report: the mean over this process's updates."""
        return {}

    def about(self) -> list[str]:
        """Return lines that describe the processes, for the start of a run."""
        return []


class Ranks(Alone):
    """Communication of one of several processes. All processes must call the same methods in the same order."""

    def __init__(self, device: torch.device, exchange: str) -> None:
        """Join the default process group, and create it if there is none.

        Args:
            exchange: dtype in which gradients are sent, "fp32" or "bf16" (see `sum_all`).
        Raises:
            ConfigError: the launcher's environment variables are missing, or the other processes cannot be reached.
        """
        self.exchange = exchange
        self._store, self._owns_group = None, not dist.is_initialized()
        if self._owns_group:
            self._store = join(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.first = self.rank == 0
        if not self.first:
            heard.be_silent()
        self._bytes, self._agreed = 0, set[str]()
        super().__init__()
        self._members: list[tuple[str, str, int]] = []
        self._members = self.gather((os.environ.get("GROUP_RANK", "0"), platform.node(), os.getpid()))

    def listen(self, stop: StopSignals) -> None:
        super().listen(stop)
        self._signal, self._sent, self._updates = 0, 0.0, 0

    @property
    def signal(self) -> int:
        return self._signal

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # if one process raised alone, the others would wait for it

    @property
    def leaving(self) -> bool:
        return self.stop.number > 0

    def by_first(self, work: Callable[[], Value]) -> Value:
        return self.share(work() if self.first else None)  # type: ignore[return-value]  # the broadcast replaces None

    def share(self, value: Value) -> Value:
        values = [value]
        with self._together():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = self.share({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        shared = {}
        for name, (shape, dtype) in shapes.items():
            sent = tensors[name].detach().cpu().contiguous() if self.first else torch.empty(shape, dtype=dtype)
            with self._together():
                dist.broadcast(sent.view(-1).view(torch.uint8), src=0)
            shared[name] = sent
        return tensors if self.first else shared

    def gather(self, value: Value) -> list[Value]:
        answers: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(answers, (self.stop.number, value))
        self._signal = self._signal or next((number for number, _ in answers if number), 0)
        if self._signal:
            raise Interrupted
        return [value for _, value in answers]

    def gather_rows(self, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(self.world * len(rows), *rows.shape[1:])
        with self._together():
            dist.all_gather(list(gathered.chunk(self.world)), rows.contiguous())
        return gathered

    def total(self, values: np.ndarray) -> np.ndarray:
        signals = [float(self.stop.number == number) for number in STOPPING]
        numbers = torch.tensor([*values.tolist(), *signals], dtype=torch.float64)
        with self._together():
            dist.all_reduce(numbers)
        seen = numbers[len(values) :].tolist()
        self._signal = self._signal or next((int(n) for n, count in zip(STOPPING, seen, strict=True) if count), 0)
        return numbers[: len(values)].numpy()

    def sum_gradients(self, parameters: list[torch.nn.Parameter], names: dict[torch.nn.Parameter, str]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # A sum of unequal sizes aborts the process or mixes up tensors. Each task has its own set of gradients, which
        # must be the same in all ranks. Each set is checked once.
        about = "\n".join(f"{names[p]} {tuple(p.shape)}" for p in parameters)
        if (digest := hashlib.sha256(about.encode()).hexdigest()) not in self._agreed:
            self._agreed.add(digest)
            self.require_same({"set of gradients": digest})
        with self._together():
            self._bytes += sum_all(gradients, self.exchange)

    def require_same(self, values: dict[str, Any]) -> None:
        answers: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(answers, values)
        for rank, theirs in enumerate(answers):
            for key, value in answers[0].items():
                if theirs[key] != value:
                    raise ConfigError(
                        f"{self._named(rank)} has another {key} than rank 0: {theirs[key]!s:.60} instead of "
                        f"{value!s:.60}; all processes need the same files and the same installation"
                    )

    def numbers(self) -> dict[str, float]:
        sent, self._bytes = self._bytes / 1e6, 0
        self._sent, self._updates = self._sent + sent, self._updates + 1
        return {"exchanged_mb": sent}

    def report(self) -> dict[str, float]:
        return {"exchanged_mb_per_update": self._sent / self._updates} if self._updates else {}

    def about(self) -> list[str]:
        return [
            f"{self.world} processes, {self.local} on this machine ({dist.get_backend()}); gradients are exchanged in "
            f"{self.exchange}; a process that does not answer for {TIMEOUT.seconds // 60} minutes ends the run"
        ]

    # --- end of the run ---

    def leave(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, and leave the group."""
        if self._store is not None and not isinstance(error, RankLost):
            with contextlib.suppress(RuntimeError):
                self._store.set(
                    ENDED, f"{self._named(self.rank)}: {' '.join(str(error).split()) or type(error).__name__}"
                )
        self.close()

    def close(self) -> None:
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(self._why(error)) from error

    def _why(self, error: RuntimeError) -> str:
        """Return which process was lost and why, as far as that can be found out."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the process that holds the store may be gone
                if self._store.check([ENDED]):
                    return self._store.get(ENDED).decode()
        gone = self._gone_here()
        if self._here()[:1] == [self.rank]:  # rank 0, which prints, may be gone: one process of each machine prints
            heard.speak()
        if gone:
            return f"{' and '.join(map(self._named, gone))} is gone"
        said = " ".join(str(error).split())
        return f"a process is gone, or did not answer for {TIMEOUT.seconds // 60} minutes ({said:.120})"

    def _gone_here(self) -> list[int]:
        """Return the ranks of this machine that have ended.

        Waits up to `PATIENCE`, because a process's connections close before the process ends.
        """
        until = time.monotonic() + PATIENCE
        while not (gone := self._here(alive=False)) and time.monotonic() < until:
            time.sleep(0.02)
        return gone

    def _here(self, alive: bool = True) -> list[int]:
        """Return the ranks of this machine that run, or with `alive=False` those that have ended."""
        node = self._members[self.rank][0] if self._members else None
        return [r for r, (other, _, pid) in enumerate(self._members) if other == node and _is_alive(pid) == alive]

    def _named(self, rank: int) -> str:
        if not self._members:
            return f"rank {rank}"
        _, host, pid = self._members[rank]
        return f"rank {rank} (process {pid} on {host})"


def started_together() -> bool:
    """Return whether this process is one of several: started by a launcher, or in a process group."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)


@contextlib.contextmanager
def joined(device: torch.device, exchange: str = "fp32") -> Iterator[Alone]:
    """Context in which this process communicates with those it was started with. An error in one ends all of them.

    An existing process group is used and left open.

    Args:
        exchange: dtype in which gradients are sent, "fp32" or "bf16".
    """
    if not started_together():
        yield Alone()
        return
    ranks = Ranks(device, exchange)
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        raise
    ranks.close()


def _is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs. True if there is no /proc to tell."""
    if not Path("/proc/self/stat").exists():
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
