"""Pages of slots from one pool, in any order, that sequences may share."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxkv.addressing.addressing import LATER, Layer, Plain, PlainIndex, first_visible
from jaxkv.addressing.rows import read_rows
from jaxkv.counts import ceil_div, check_fields


@dataclasses.dataclass(frozen=True)
class Paged(Plain):
    """Each ``page_size`` tokens of a sequence stand in one page of a pool; a table says which.

    Kwon et al., "Efficient memory management for LLM serving with PagedAttention" (2023),
    section 4.

    Args:
      page_size: slots of a page.
      num_pages: pages of the pool. None for as many as all sequences need when full, each
        with pages of its own from the start. With a number nothing is assigned: pages come
        from an allocator (`jaxkv.paging`) through `KVCache.with_pages`.
      window: newest tokens that a query sees, itself included; all if None. The allocator
        takes back the pages before it, whose entries are -1 then.
      aligned: a query sees, of its window, the tokens from a multiple of its size on, as in
        `Chunked` (Llama 4).

    Raises:
      ValueError: a number that is not one of slots or pages.

    >>> import jaxkv
    >>> jaxkv.Paged(page_size=16, num_pages=100).num_slots(max_context_length=4096, batch_size=8)
    1600
    """

    page_size: int = 16
    num_pages: int | None = None
    window: int | None = None
    aligned: bool = dataclasses.field(default=False, metadata=LATER)

    by_position = True

    def __post_init__(self) -> None:
        check_fields(self, "page_size", optional=("num_pages", "window"))

    @property
    def name(self) -> str:
        return "paged"

    def shared_by(self, devices: int) -> Self:
        own = None if self.num_pages is None else self.num_pages // devices
        return dataclasses.replace(self, num_pages=own)

    def pages_per_sequence(self, max_context_length: int) -> int:
        """Entries of one sequence's row of the page table."""
        return ceil_div(max_context_length, self.page_size)

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        own = self.pages_per_sequence(max_context_length) * (batch_size or 1)
        return self.page_size * (self.num_pages or own)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        return 4 * (batch_size or 1) * (1 + self.pages_per_sequence(max_context_length))

    def init(self, max_context_length: int, batch_size: int | None) -> "PagedIndex":
        batch = () if batch_size is None else (batch_size,)
        shape = (*batch, self.pages_per_sequence(max_context_length))
        if self.num_pages is None:
            table = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)
        else:
            table = jnp.full(shape, -1, jnp.int32)
        shared = self.num_pages is not None
        lengths = jnp.zeros(batch, jnp.int32)
        sizes = self.page_size, max_context_length
        return PagedIndex(lengths, table, *sizes, shared, self.window, self.aligned)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "table"],
    meta_fields=["page_size", "capacity", "shared", "window", "aligned"],
)
@dataclasses.dataclass(frozen=True)
class PagedIndex(PlainIndex):
    """Lengths, and the page of the pool that holds each page of each sequence; -1 for none.

    ``shared`` says that the pages come from an allocator, and may stand in several rows.
    """

    lengths: Int[Array, "*batch"]
    table: Int[Array, "*batch pages"]
    page_size: int
    capacity: int
    shared: bool
    window: int | None = None
    aligned: bool = False

    by_position = True

    @property
    def pages(self) -> Self:
        return self

    @property
    def run(self) -> int:
        return self.page_size

    @property
    def intact(self) -> Bool[Array, "*batch"] | bool:
        if self.window is None:
            return True
        pages = jnp.arange(self.table.shape[-1], dtype=jnp.int32)
        end = self.lengths[..., None]
        first = first_visible(end, self.window, self.aligned)
        first = jnp.maximum(first, 0) // self.page_size
        seen = (pages >= first) & (pages * self.page_size < end)
        return jnp.all(~seen | (self.table >= 0), axis=-1)

    @property
    def extent(self) -> int:
        return self.table.shape[-1] * self.page_size

    @property
    def room(self) -> Int[Array, "*batch"]:
        assigned = self.table >= 0
        if self.window is not None:  # the pages before the window were there
            assigned = lax.cummax(assigned.astype(jnp.int32), axis=assigned.ndim - 1, reverse=True)
        assigned = jnp.cumprod(assigned, axis=-1, dtype=jnp.int32).sum(-1)
        return jnp.minimum(assigned * self.page_size, self.capacity)

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, lengths=lengths)

    def with_table(self, table: Int[Array, "*batch pages"]) -> Self:
        """The same lengths with other pages.

        Raises:
          ValueError: a table of another shape or dtype.
        """
        table = jnp.asarray(table)
        if table.shape != self.table.shape or table.dtype != jnp.int32:
            raise ValueError(
                f"a page table must be int32{list(self.table.shape)}, got "
                f"{table.dtype}{list(table.shape)}."
            )
        return dataclasses.replace(self, table=table)

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        pages = self._pages(positions // self.page_size)
        exists = (positions >= 0) & (positions < self.capacity) & (pages >= 0)
        return jnp.where(exists, pages * self.page_size + positions % self.page_size, -1)

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        end = jnp.minimum(lengths, self.capacity)[..., None]  # the last page may reach beyond it
        held = (positions < end) & (self._pages(positions // self.page_size) >= 0)
        return jnp.where(held, positions, -1)

    def places(self, logical: Int[Array, "#*batch slots"]) -> Int[Array, "*batch slots"]:
        """Where logical slots are in the pool; anywhere for those of a page that is not there."""
        pages = self._pages(logical // self.page_size)
        return jnp.maximum(pages, 0) * self.page_size + logical % self.page_size

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        return read_rows(leaf, layer, self.places(start + jnp.arange(size, dtype=jnp.int32)))

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        lengths = self.lengths.reshape(-1)[rows]
        table = self.table.reshape(-1, self.table.shape[-1])[rows]
        if self.shared:
            return dataclasses.replace(self, lengths=lengths, table=table), None
        slots = table[..., None] * self.page_size + jnp.arange(self.page_size, dtype=jnp.int32)
        own = jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape)
        return dataclasses.replace(self, lengths=lengths, table=own), slots.reshape(-1)

    def _pages(self, logical_pages: Int[Array, "#*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The page of the pool for each page of a sequence; any for one that does not exist."""
        shape = (*self.lengths.shape, logical_pages.shape[-1])
        inside = jnp.clip(logical_pages, 0, self.table.shape[-1] - 1)
        return jnp.take_along_axis(self.table, jnp.broadcast_to(inside, shape), axis=-1)
