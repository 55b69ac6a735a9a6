"""Which slot holds which token: one file an addressing, one row in `ADDRESSINGS`."""

from jaxkv.addressing.addressing import (
    Addressing,
    Index,
    Layer,
    PageTable,
    Plain,
    PlainIndex,
    RingSlots,
    first_visible,
)
from jaxkv.addressing.chunked import Chunked
from jaxkv.addressing.contiguous import Contiguous
from jaxkv.addressing.kept import Kept, KeptIndex, PolicyState
from jaxkv.addressing.kept_by_head import KeptByHead
from jaxkv.addressing.paged import Paged, PagedIndex
from jaxkv.addressing.ring import Ring

# What the command line and the test table know, by name.
ADDRESSINGS: dict[str, Addressing] = {
    "contiguous": Contiguous(),
    "ring": Ring(window=1024, sinks=4),
    "paged": Paged(page_size=16),
    "chunked": Chunked(size=1024),
}

__all__ = [
    "ADDRESSINGS",
    "Addressing",
    "Chunked",
    "Contiguous",
    "Index",
    "Kept",
    "KeptByHead",
    "KeptIndex",
    "Layer",
    "PageTable",
    "Paged",
    "PagedIndex",
    "Plain",
    "PlainIndex",
    "PolicyState",
    "Ring",
    "RingSlots",
    "first_visible",
]
