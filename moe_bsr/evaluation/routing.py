"""Routing statistics of one MoE block: sums over its router's decisions, and measures computed from them.

Only sums are stored. So a training step costs little, and memory does not depend on the number of tokens.
T is the number of tasks, E the number of experts, and K the number of experts chosen for each token.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from moe_bsr.model.moe import Routing

DEAD = 0.01  # an expert with less than this part of an equal share (1 / E) counts as dead


class RoutingStatistics:
    """Sums over all tokens that entered one MoE block.

    Attributes:
        tasks: names of the tasks, in the order of the rows.
        experts: number of experts, E.

    The sums (see `total`):
        tokens: (T,) int64 number of tokens. counts: (T, E) int64 how often an expert was chosen.
        gates: (T, E) float64 sums of the chosen experts' gates. probabilities: (T, E) float64 sums of the softmax.
        entropy: (T,) float64 sums of the entropy of each token's softmax, in nats.
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
        """Return one of the sums: tokens, counts, gates, probabilities or entropy."""
        return self._sums[name].cpu().numpy()

    @torch.no_grad()
    def add(self, task: str, routing: Routing) -> None:
        """Add one forward pass of images of one task, without synchronizing a GPU."""
        row, sums = self.tasks.index(task), self._sums
        probabilities = routing.probabilities.detach().flatten(0, -2)
        device = probabilities.device
        if sums["counts"].device != device:
            self._sums = sums = {name: value.to(device) for name, value in sums.items()}
        # 1 for chosen experts; float32 sums them exactly up to 2^24 tokens.
        used = (routing.gates.detach().flatten(0, -2) > 0).to(probabilities.dtype)
        marks = torch.zeros_like(probabilities).scatter_(1, routing.experts.flatten(0, -2), used)
        sums["tokens"][row] += len(marks)
        sums["counts"][row] += marks.sum(0, dtype=torch.float32).long()
        sums["gates"][row] += routing.importance.detach()
        sums["probabilities"][row] += probabilities.sum(0)
        # A third of the time of torch.special.entr. The clamp makes 0 log 0 = 0.
        sums["entropy"][row] -= (probabilities * probabilities.clamp_min(1e-30).log()).sum()

    def merge(self, other: RoutingStatistics) -> None:
        """Add the sums of another instance with the same tasks and experts."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums[name].to(value.device) + value

    def to_cpu(self) -> None:
        """Move the sums to the CPU, to send them to another process."""
        self._sums = {name: value.cpu() for name, value in self._sums.items()}

    @property
    def seen(self) -> np.ndarray:
        """(T,) bool: which tasks have tokens."""
        return self.total("tokens") > 0

    @property
    def top_k(self) -> float:
        """K, the experts per token; NaN before the first token."""
        return float(_ratio(self.total("counts").sum(), self.total("tokens").sum()))

    def shares(self, of: Literal["count", "gate"] = "count") -> np.ndarray:
        """Return (T, E) shares of the experts in each task's assignments or gate weight. Rows sum to 1.

        The row of a task without tokens is NaN.
        """
        sums = {"count": self.total("counts"), "gate": self.total("gates")}[of]
        return _ratio(sums, sums.sum(1, keepdims=True))

    def load(self) -> np.ndarray:
        """Return (E,) shares of the experts in the assignments of all tasks together; NaN before the first token."""
        return _ratio(self.total("counts").sum(0), self.total("counts").sum())

    def distances(self) -> np.ndarray:
        """Return (T, T) Jensen-Shannon distances between the tasks' count shares: 0 if equal, 1 with no common expert.

        It is the square root of the divergence in bits, and NaN for tasks without tokens.
        """
        rows = self.shares("count")
        own = entropy_bits(rows)
        both = entropy_bits((rows[:, None] + rows[None]) / 2)
        distance = np.sqrt(np.clip(both - (own[:, None] + own[None]) / 2, 0, 1))
        distance[np.diag_indices(len(rows))] = np.where(self.seen, 0.0, np.nan)
        return distance

    def used(self) -> float:
        """Return the effective number of experts, 2 to the power of the load's entropy; NaN before the first token."""
        return 2 ** float(entropy_bits(self.load()))

    def mutual_information(self) -> float:
        """Return the normalized mutual information between task and expert: bits / log2(min(tasks, E)), in [0, 1].

        All tasks with tokens have equal weight. 0: all tasks use the experts alike. 1: the expert determines the task,
        or, with fewer experts than tasks, the task determines the expert. NaN with one task or one expert.
        """
        rows = self.shares("count")[self.seen]
        most = min(len(rows), self.experts)
        if most < 2:
            return float("nan")
        bits = entropy_bits(rows.mean(0)) - entropy_bits(rows).mean()
        return float(np.clip(bits / np.log2(most), 0, 1))

    def numbers(self) -> dict[str, float]:
        """Return a few numbers over the tokens of all tasks; NaN if undefined.

        load_cv: coefficient of variation (standard deviation / mean) of the experts' load.
        mean_entropy: entropy of the mean softmax / log E (1: balanced).
        token_entropy: mean entropy of a token's softmax / log E (0: the router is certain).
        dead_experts: number of experts with less than 1 % of an equal share. largest_share: the largest load.
        mutual_information: see the method.
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
        """Describe in words how many experts are used, and whether the tasks use different ones."""
        if not self.seen.any():
            return "no tokens yet"
        if self.experts == 1:
            return "one expert: nothing to route"
        used, k = self.used(), self.top_k
        if used <= 1.25 * k < self.experts:
            balance = "collapsed"
        else:
            balance = "even" if used > 0.9 * self.experts else "uneven"
        words = f"{balance}: the load is effectively spread over {used:.1f} of {self.experts} experts"
        information = self.mutual_information()
        if not np.isnan(information):
            way = "share them" if information < 0.1 else "partly differ" if information < 0.5 else "use different ones"
            words += f"; tasks {way}"
        return words

    def state(self) -> dict[str, Any]:
        """Return JSON values for `from_state`; floats are restored exactly."""
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
    """Return the entropy of distributions (..., E) in bits; NaN for NaN."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole; NaN if the whole is 0."""
    whole = np.asarray(whole, float)
    return part / np.where(whole > 0, whole, np.nan)
