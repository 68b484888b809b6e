"""Recompute the cost figures printed in the BSR paper (arXiv 2405.10951), each by the rule that produced it.

`tables` has the printed figures and `settings` the networks behind them. `bsr_rule`, `backrazor_rule` and
`autograd_rule` are the accounting rules. `rebuild` applies them, and `page` formats the result. Training uses none of
this.
"""
