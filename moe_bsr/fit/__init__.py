"""Find the best model for a time and a memory, by a search over ordinary training runs."""

from moe_bsr.fit.search import Budget, Search

__all__ = ["Budget", "Search"]
