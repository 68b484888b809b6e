"""Routing statistics of one MoE block: what its router did, summed up as counts, and what they tell.

Only sums are kept, so that a training step costs little and any number of tokens the same memory:

    T tasks, E experts, K experts chosen for each token
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from moe_bsr.model.moe import Routing

DEAD = 0.01  # of an equal share: who gets less is as good as never chosen


class RoutingStatistics:
    """Sums over all tokens that entered one MoE block.

    Attributes:
        tasks: their names, in the order of the rows.
        experts: E.

    The sums (see `total`):
        tokens: (T,) int64. counts: (T, E) int64 how often an expert was among the chosen.
        gates: (T, E) float64 sums of the kept gates. probabilities: (T, E) float64 sums of the softmax.
        entropy: (T,) float64 sums of the entropies of single tokens' softmax, in nats.
    """

    def __init__(self, tasks: list[str], experts: int) -> None:
        self.tasks, self.experts = list(tasks), experts
        rows = len(tasks)
        self._sums = {
            "tokens": torch.zeros(rows, dtype=torch.int64),
            "counts": torch.zeros(rows, experts, dtype=torch.int64),
            "gates": torch.zeros(rows, experts, dtype=torch.float64),
            "probabilities": torch.zeros(rows, experts, dtype=torch.float64),
            "entropy": torch.zeros(rows, dtype=torch.float64),
        }

    def total(self, name: str) -> np.ndarray:
        """One of the sums: tokens, counts, gates, probabilities or entropy."""
        return self._sums[name].cpu().numpy()

    @torch.no_grad()
    def add(self, task: str, routing: Routing) -> None:
        """Count one forward pass of images of one task. Nothing is fetched from a GPU."""
        row, sums = self.tasks.index(task), self._sums
        probabilities = routing.probabilities.detach().flatten(0, -2)
        device = probabilities.device
        if sums["counts"].device != device:
            self._sums = sums = {name: value.to(device) for name, value in sums.items()}
        # Marks of who is chosen, summed exactly in float32 up to 2^24 tokens.
        used = (routing.gates.detach().flatten(0, -2) > 0).to(probabilities.dtype)
        marks = torch.zeros_like(probabilities).scatter_(1, routing.experts.flatten(0, -2), used)
        sums["tokens"][row] += len(marks)
        sums["counts"][row] += marks.sum(0, dtype=torch.float32).long()
        sums["gates"][row] += routing.importance.detach()
        sums["probabilities"][row] += probabilities.sum(0)
        # A third of the time of torch.special.entr; the bound keeps 0 log 0 at 0.
        sums["entropy"][row] -= (probabilities * probabilities.clamp_min(1e-30).log()).sum()

    def merge(self, other: RoutingStatistics) -> None:
        """Add what another one counted of the same tasks and experts."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums[name].to(value.device) + value

    def to_cpu(self) -> None:
        """Keep the sums there, for whoever sends them to another process."""
        self._sums = {name: value.cpu() for name, value in self._sums.items()}

    @property
    def seen(self) -> np.ndarray:
        """(T,) bool: tasks with any tokens."""
        return self.total("tokens") > 0

    @property
    def top_k(self) -> float:
        """K; NaN before any token."""
        return float(_ratio(self.total("counts").sum(), self.total("tokens").sum()))

    def shares(self, of: Literal["count", "gate"] = "count") -> np.ndarray:
        """(T, E) share of each expert in its task's choices or gate weight: rows sum to 1.

        The row of a task never seen is NaN.
        """
        sums = {"count": self.total("counts"), "gate": self.total("gates")}[of]
        return _ratio(sums, sums.sum(1, keepdims=True))

    def load(self) -> np.ndarray:
        """(E,) share of each expert in all choices, of all tasks together; NaN before any token."""
        return _ratio(self.total("counts").sum(0), self.total("counts").sum())

    def distances(self) -> np.ndarray:
        """(T, T) Jensen-Shannon distance between two tasks' count shares: 0 the same, 1 no expert in common.

        The square root of the divergence in bits. NaN where a task was never seen.
        """
        rows = self.shares("count")
        own = entropy_bits(rows)
        both = entropy_bits((rows[:, None] + rows[None]) / 2)
        distance = np.sqrt(np.clip(both - (own[:, None] + own[None]) / 2, 0, 1))
        distance[np.diag_indices(len(rows))] = np.where(self.seen, 0.0, np.nan)
        return distance

    def used(self) -> float:
        """As how many experts used alike the load is spread: 2 to the power of its entropy; NaN before any token."""
        return 2 ** float(entropy_bits(self.load()))

    def mutual_information(self) -> float:
        """Between task and expert, every seen task alike: bits / log2(min(tasks seen, E)), in [0, 1].

        0: all tasks use the experts alike. 1: the expert tells the task, or the task the expert where
        experts are fewer. NaN with one task or one expert, where there is nothing to tell.
        """
        rows = self.shares("count")[self.seen]
        most = min(len(rows), self.experts)
        if most < 2:
            return float("nan")
        bits = entropy_bits(rows.mean(0)) - entropy_bits(rows).mean()
        return float(np.clip(bits / np.log2(most), 0, 1))

    def numbers(self) -> dict[str, float]:
        """The block in a few numbers, over the tokens of all tasks; NaN where nothing can be said.

        load_cv: standard deviation over mean of how often the experts were chosen. mean_entropy: of the
        mean of the tokens' softmax, / log E (1: balanced). token_entropy: mean of the single tokens', / log
        E (0: the router is sure). dead_experts: with less than 1 % of an equal share. largest_share: of all
        choices. mutual_information: see there.
        """
        load = self.load()
        nats = np.log(self.experts) if self.experts > 1 else np.nan
        mean = _ratio(self.total("probabilities").sum(0), self.total("probabilities").sum())
        return {
            "load_cv": float(load.std() / load.mean()),
            "mean_entropy": float(entropy_bits(mean) * np.log(2) / nats),
            "token_entropy": float(_ratio(self.total("entropy").sum(), self.total("tokens").sum()) / nats),
            "dead_experts": float((load < DEAD / self.experts).sum()) if self.seen.any() else float("nan"),
            "largest_share": float(load.max()),
            "mutual_information": self.mutual_information(),
        }

    def reading(self) -> str:
        """The numbers in words: how many experts carry the load, and whether tasks go different ways."""
        if not self.seen.any():
            return "no tokens yet"
        if self.experts == 1:
            return "one expert: nothing to route"
        used, k = self.used(), self.top_k
        if used <= 1.25 * k < self.experts:
            balance = "collapsed"
        else:
            balance = "even" if used > 0.9 * self.experts else "uneven"
        words = f"{balance}: the load is that of {used:.1f} of {self.experts} experts used alike"
        told = self.mutual_information()
        if not np.isnan(told):
            way = "share them" if told < 0.1 else "partly differ" if told < 0.5 else "use different ones"
            words += f"; tasks {way}"
        return words

    def state(self) -> dict[str, Any]:
        """JSON values for `from_state`; floats survive exactly."""
        return {
            "tasks": self.tasks,
            "experts": self.experts,
            **{name: value.tolist() for name, value in self._sums.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RoutingStatistics:
        found = cls(state["tasks"], state["experts"])
        found._sums = {
            name: torch.tensor(state[name], dtype=value.dtype).view(value.shape) for name, value in found._sums.items()
        }
        return found


def entropy_bits(shares: np.ndarray) -> np.ndarray:
    """Entropy of distributions (..., E) in bits; NaN where they are."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    whole = np.asarray(whole, float)
    return part / np.where(whole > 0, whole, np.nan)
