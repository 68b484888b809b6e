"""Count the patches kept and the experts used in an evaluation of one task."""

from torch import Tensor

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.model.block import Record

USED_SHARE = 0.01  # an expert with at least this share of the assignments counts as used


class TokenAndExpertUsage:
    """Counts of tokens and experts for the images of one task. A GPU is not synchronized before `summary`."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._entering: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}
        self._routing: dict[int, RoutingStatistics] = {}

    def add(self, records: dict[int, Record]) -> None:
        """Add the records of one forward pass in evaluation mode."""
        for block, record in records.items():
            if (dropped := record.dropped) is not None:
                self._entering[block] = self._entering.get(block, 0) + dropped.origin_in.numel()
                kept = (dropped.origin >= 0).sum()
                if block in self._kept:
                    self._kept[block] += kept  # in place: no small tensor per batch, see `Predictions.empty`
                else:
                    self._kept[block] = kept
            if (routing := record.routing) is not None:
                if block not in self._routing:
                    self._routing[block] = RoutingStatistics([self.task], routing.probabilities.shape[-1])
                self._routing[block].add(self.task, routing)

    def merge(self, other: "TokenAndExpertUsage") -> None:
        """Add the counts of another instance, for other images of the same task."""
        for block, count in other._entering.items():
            self._entering[block] = self._entering.get(block, 0) + count
            self._kept[block] = self._kept.get(block, 0) + other._kept[block]
        for block, routing in other._routing.items():
            if block in self._routing:
                self._routing[block].merge(routing)
            else:
                self._routing[block] = routing

    def to_cpu(self) -> None:
        """Move the counts to the CPU, to send them to another process."""
        self._kept = {block: count.cpu() for block, count in self._kept.items()}
        for routing in self._routing.values():
            routing.to_cpu()

    def summary(self) -> dict:
        """Return the totals. Block indices are strings, as in JSON.

        tokens_kept: mean share of the image's patches that are left after the last drop block, without fused tokens.
        With merging, the number of tokens left relative to the patches.
        tokens_kept_after: the same after each drop block.
        expert_share: each expert's share of the assignments, by MoE block.
        experts_used: number of experts with at least 1 % of the assignments (with more than 50 experts: at least half
        of an equal share).
        """
        kept = {
            str(block): int(count) / self._entering[min(self._entering)] for block, count in sorted(self._kept.items())
        }
        shares = {str(block): routing.shares("count")[0] for block, routing in sorted(self._routing.items())}
        return {
            "tokens_kept": list(kept.values())[-1] if kept else 1.0,
            "tokens_kept_after": kept,
            "experts_used": {
                block: int((share >= min(USED_SHARE, 0.5 / len(share))).sum()) for block, share in shares.items()
            },
            "expert_share": {block: share.tolist() for block, share in shares.items()},
        }
