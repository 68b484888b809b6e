"""Keep the inputs of a block's three segments and run their first products again in the backward pass.

The segments begin with the input of each norm and with the attention's result: queries, keys and values follow from
the first by one product, the FFN's (or the experts') hidden values from the second norm's. That is 3 activations of
a token's width in place of 10, for a fifth of the block's forward products less than `recompute` runs again, and the
attention itself is not repeated. `segments_int8` keeps the three in eight bits.
"""

from dataclasses import replace
from functools import partial

from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import run_by_kind
from moe_bsr.model.storage.exact import EXACT
from moe_bsr.model.storage.packed import INT8
from moe_bsr.ops.keep import QUERIES_KEYS_VALUES

SEGMENTS = replace(EXACT, reruns_products=True)
# Queries and keys from a rounded input do not fit the log-sums of the forward pass: with these the error doubles.
SEGMENTS_INT8 = replace(INT8, reruns_products=True, coarse=frozenset({QUERIES_KEYS_VALUES}))

STORAGES.register("segments")(Storage(partial(run_by_kind, SEGMENTS)))
STORAGES.register("segments_int8")(Storage(partial(run_by_kind, SEGMENTS_INT8)))
