"""Save the inputs of a block's three segments, and run their first products again in the backward pass.

The segments begin at the input of each norm and at the output of the attention. Queries, keys and values are computed
again from the first norm's input, and the hidden values of the FFN (or experts) from the second norm's. This saves 3
activations of a token's width instead of 10. It recomputes a fifth of the block's forward products less than
`recompute`, and does not repeat the attention. `segments_int8` saves the three in eight bits.
"""

from dataclasses import replace
from functools import partial

from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import run_by_kind
from moe_bsr.model.storage.exact import EXACT
from moe_bsr.model.storage.packed import INT8
from moe_bsr.ops.keep import QUERIES_KEYS_VALUES

SEGMENTS = replace(EXACT, reruns_products=True)
# Queries and keys from a rounded input do not fit the log-sums of the forward pass. Using these doubles the error.
SEGMENTS_INT8 = replace(INT8, reruns_products=True, coarse=frozenset({QUERIES_KEYS_VALUES}))

STORAGES.register("segments")(Storage(partial(run_by_kind, SEGMENTS)))
STORAGES.register("segments_int8")(Storage(partial(run_by_kind, SEGMENTS_INT8)))
