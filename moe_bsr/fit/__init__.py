"""Find the best model for a time and a memory, by a ladder of ordinary training runs."""

from moe_bsr.fit.ladder import Budget, Ladder

__all__ = ["Budget", "Ladder"]
