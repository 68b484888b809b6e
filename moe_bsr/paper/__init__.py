"""The cost figures that the BSR paper prints (arXiv 2405.10951), and each of them rebuilt by a rule.

`tables` holds what is printed, `settings` the networks that are meant, `rebuild` the rules, `page` the
pages made of it. `tools/reproduce.py` is the front.
"""
