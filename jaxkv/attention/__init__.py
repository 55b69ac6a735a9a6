"""Reading the cache: masks, and a file an implementation."""

from jaxkv.attention.attend import IMPLEMENTATIONS, attend, explain
from jaxkv.attention.cross import attend_cross
from jaxkv.attention.fetched import fetched_blocks
from jaxkv.attention.observed import observed, watch

__all__ = [
    "IMPLEMENTATIONS",
    "attend",
    "attend_cross",
    "explain",
    "fetched_blocks",
    "observed",
    "watch",
]
