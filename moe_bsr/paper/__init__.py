"""The cost figures that the BSR paper prints (arXiv 2405.10951), and each of them rebuilt by a rule.

`tables` holds what is printed, `settings` the networks that are meant, `bsr_rule`, `backrazor_rule` and
`autograd_rule` the accounts, `rebuild` applies them, `page` makes pages of it. No training run uses any of this.
"""
