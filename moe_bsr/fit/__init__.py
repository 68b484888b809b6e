"""The best model for a time and a memory: a ladder of runs, each a run like any other."""

from moe_bsr.fit.ladder import Budget, Ladder

__all__ = ["Budget", "Ladder"]
