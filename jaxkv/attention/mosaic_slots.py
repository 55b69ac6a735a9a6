"""Which slots a block of threads of `mosaic_kernel` goes through, and which of them are seen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.attention import pallas_gpu as gpu
from jaxkv.attention.mosaic_plan import TILE, Plan


class Slots:
    """A part of a sequence's visible slots, in tiles; tiles that are all gap are left out.

    Attributes:
      count: of tiles.
    """

    def __init__(self, bounds: Any, table: Any, row: jax.Array, part: jax.Array, plan: Plan):
        self._table, self._row, self._plan = table, row, plan
        self._low, self._high, self._gap, self._gap_end = (bounds[row, at] for at in range(4))
        first, last = lax.div(self._low, TILE), lax.div(self._high + (TILE - 1), TILE)
        self._gap_tile, self._skipped = lax.div(self._gap + (TILE - 1), TILE), jnp.int32(0)
        if plan.gap:
            self._skipped = jnp.maximum(lax.div(self._gap_end, TILE) - self._gap_tile, 0)
        tiles = last - first - self._skipped
        share = lax.div(tiles + (plan.splits - 1), plan.splits)
        self._first = first + part * share
        self.count = jnp.clip(tiles - part * share, 0, share)

    def start_of(self, number: Any) -> jax.Array:
        """The first slot of a tile."""
        tile = self._first + number
        if self._plan.gap:
            tile += jnp.where(tile >= self._gap_tile, self._skipped, 0)
        return tile * TILE

    def pages_of(self, number: Any) -> tuple[jax.Array, ...]:
        """The page that each piece of a tile lies in."""
        plan, table = self._plan, self._table
        if not plan.paged:
            return (self._row,)
        slots = (self.start_of(number) + at for at in range(0, TILE, plan.piece))
        entries = (lax.div(slot, plan.page_size) for slot in slots)
        most = table.shape[1] - 1
        return tuple(table[self._row, jnp.clip(entry, 0, most)] for entry in entries)

    def seen(
        self, start: jax.Array, pages: tuple[jax.Array, ...], matrix: tuple[int, int]
    ) -> tuple[Callable[[], jax.Array], jax.Array]:
        """Which slots of the tile are visible, for a matrix of a row a slot; and if all are."""
        plan = self._plan
        whole = (start >= self._low) & (start + TILE <= self._high)
        if plan.gap:
            whole &= (start + TILE <= self._gap) | (start >= self._gap_end)
        if plan.holes:
            bits = [(page >= 0).astype(jnp.int32) << at for at, page in enumerate(pages)]
            held = functools.reduce(jnp.bitwise_or, bits)
            whole &= held == (1 << len(pages)) - 1

        def visible() -> jax.Array:
            slot = gpu.iota(matrix, 0)
            inside = (slot >= self._low - start) & (slot < self._high - start)
            if plan.gap:
                inside &= (slot < self._gap - start) | (slot >= self._gap_end - start)
            if plan.holes:
                inside &= ((held >> lax.div(slot, plan.piece)) & 1) == 1
            return inside

        return visible, whole
