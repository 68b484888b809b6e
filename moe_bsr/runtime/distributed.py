"""Several processes that train one model together: which of them this is, and what they tell each other.

torchrun starts them. All hold the same weights and take the same updates. Each has its share of an update's
micro-batches, and the gradients that exist are summed before they are clipped: no wrapper, which would send zeros for
the other tasks' heads. `Alone` is the same for one process, so nobody has to ask how many there are.

Whoever fails says so and leaves. The others learn it in their next exchange, which raises `RankLost`.
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
PATIENCE = 1.0  # seconds in which a process of this machine that was lost is seen to be gone
ENDED = "ended"  # key of the store: who ended the run, and why


class Alone:
    """One process, and what it would exchange with others.

    Attributes:
        rank: its number. world: how many there are. local: how many on this machine.
        first: whether this one writes, prints and decides.
    """

    rank, world, local = 0, 1, 1
    first = True

    def __init__(self) -> None:
        self.listen(StopSignals())

    def listen(self, stop: StopSignals) -> None:
        """Watch these signals from here on."""
        self.stop = stop

    @property
    def signal(self) -> int:
        """The signal on which all stop, 0 as long as there is none."""
        return self.stop.number

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """For work that changes no state and ends with `gather`: a signal makes that raise Interrupted, or before."""
        return self.stop.at_once()

    @property
    def leaving(self) -> bool:
        """Whether such work need not go on, for `gather` will raise."""
        return False

    def mine(self, count: int) -> range:
        """Which of so many equal pieces are this process's: all ranks' in their order are all of them."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def by_first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, in all of them; no other runs it."""
        return work()

    def share(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        return value

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, in all of them; others may give none."""
        return tensors

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank.

        Raises:
            Interrupted: in all of them, where a signal reached one.
        """
        return [value]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n, ...) of each process, of one shape, to (world x n, ...), by rank."""
        return rows

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all processes of float64 values. All agree here on whether a signal came."""
        return values

    def sum_gradients(self, parameters: list[torch.nn.Parameter], names: dict[torch.nn.Parameter, str]) -> None:
        """Put the sum over all processes into the gradients of these parameters, which all of them have."""

    def require_same(self, values: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: a process has another value than the first; the message names both.
        """

    def numbers(self) -> dict[str, float]:
        """What exchanging took since this was last asked: exchanged_mb, 10**6 bytes of gradients of each process."""
        return {}

    def report(self) -> dict[str, float]:
        """The same for the report: exchanged_mb_per_update, the mean of the updates of this process."""
        return {}

    def about(self) -> list[str]:
        """A line for a person who starts the run."""
        return []


class Ranks(Alone):
    """This process among several. Every method is called by all of them, in the same order."""

    def __init__(self, device: torch.device, exchange: str) -> None:
        """
        Args:
            exchange: how gradients travel, see `sum_all`.
        Raises:
            ConfigError: there is no launcher's environment, or the others cannot be reached.
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
        return contextlib.nullcontext()  # one that raised alone would leave the others waiting

    @property
    def leaving(self) -> bool:
        return self.stop.number > 0

    def by_first(self, work: Callable[[], Value]) -> Value:
        return self.share(work() if self.first else None)  # type: ignore[return-value]  # replaced by the first's

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
        # Sums of unequal sizes abort the process, or mix tensors. The sets of the tasks differ, but not by rank.
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
                        f"{self._named(rank)} has another {key} than rank 0: {theirs[key]!s:.60}, not {value!s:.60}; "
                        "all processes need the same files and the same installation"
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

    # --- the end ---

    def leave(self, error: BaseException) -> None:
        """Tell the others why this process ends, and leave them."""
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
        """Who was lost and why, as far as can be known."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # it is in a process that is gone
                if self._store.check([ENDED]):
                    return self._store.get(ENDED).decode()
        gone = self._gone_here()
        if self._here()[:1] == [self.rank]:  # the first may be gone, here or elsewhere
            heard.speak()
        if gone:
            return f"{' and '.join(map(self._named, gone))} is gone"
        said = " ".join(str(error).split())
        return f"a process is gone, or did not answer for {TIMEOUT.seconds // 60} minutes ({said:.120})"

    def _gone_here(self) -> list[int]:
        """Ranks of this machine that have ended; waits a little, for a process' connections end before it does."""
        until = time.monotonic() + PATIENCE
        while not (gone := self._here(alive=False)) and time.monotonic() < until:
            time.sleep(0.02)
        return gone

    def _here(self, alive: bool = True) -> list[int]:
        """Ranks of this machine that run, or do not."""
        node = self._members[self.rank][0] if self._members else None
        return [r for r, (other, _, pid) in enumerate(self._members) if other == node and _is_alive(pid) == alive]

    def _named(self, rank: int) -> str:
        if not self._members:
            return f"rank {rank}"
        _, host, pid = self._members[rank]
        return f"rank {rank} (process {pid} on {host})"


def started_together() -> bool:
    """Whether a launcher started this process with others, or it has joined some."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)


@contextlib.contextmanager
def joined(device: torch.device, exchange: str = "fp32") -> Iterator[Alone]:
    """This process among those it was started with; inside, what ends one of them ends all.

    A process group that is there already is used and left as it is.
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
    """Whether a process of this machine runs; where there is no /proc, yes."""
    if not Path("/proc/self/stat").exists():
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
