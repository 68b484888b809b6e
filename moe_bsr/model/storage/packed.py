"""Save activations in fewer bits: `bf16`, or `int8` with a scale for each channel of each image.

All experts of a layer share their scales. With separate scales equal experts would appear to differ, and routers would
learn these differences.
"""

from functools import partial

from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import Table, run_by_kind
from moe_bsr.model.storage.codecs import BFloat16Packed, Int8Packed
from moe_bsr.ops.keep import KINDS

BF16 = Table(dict.fromkeys(KINDS, BFloat16Packed), BFloat16Packed)
INT8 = Table(dict.fromkeys(KINDS, Int8Packed), Int8Packed)

STORAGES.register("bf16")(Storage(partial(run_by_kind, BF16)))
STORAGES.register("int8")(Storage(partial(run_by_kind, INT8)))
