"""In the kernel: scores of the centres of keys, from a table and what is turned, see `centres`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.attention.mosaic import pallas as gpu
from jaxkv.attention.mosaic.centres import tile_digits
from jaxkv.attention.mosaic.plan import LOW_STEPS, TILE, Turning

# What goes with cosines and what goes with sines, ``[pairs, rows]`` each, in steps of high bytes.
Pairs = tuple[jax.Array, jax.Array]


def passing(turning: Turning | None, rows: int) -> list[Any]:
    """Shared memory that is needed until `Turned.begin` only."""
    if turning is None:
        return []
    first = gpu.shared((turning.digits, 2, turning.pairs), jnp.float32)
    return [gpu.shared((2, rows, turning.pairs), jnp.float32), first]


def lasting(turning: Turning | None, rows: int) -> list[Any]:
    """Shared memory that is needed throughout."""
    if turning is None:
        return []
    return [
        gpu.shared_tiles((2, 2, TILE, turning.pairs), jnp.int8),
        gpu.shared_tiles((1, 4 * rows, turning.pairs), jnp.int8),
        gpu.shared((2, turning.pairs), jnp.float32),
        gpu.shared((2, rows), jnp.float32),
    ]


def num_copies(turning: Turning | None) -> int:
    """That `Turned.fetch` makes."""
    return 0 if turning is None else 6 + turning.digits


class Turned:
    """What is multiplied with the table, of the tile that is next.

    Args:
      rows: columns of queries, a multiple of 8.
      passing, lasting: the memory that functions of these names ask for.
    """

    def __init__(self, turning: Turning, rows: int, passing: Any, lasting: Any):
        self._turning, self._rows = turning, rows
        self._raw, self._first_turns = passing
        self._table, self._tiles, self._tile_turn, self._steps = lasting

    def fetch(self, sources: Any, row: Any, head: Any, first_tile: jax.Array, ready: Any) -> None:
        """What `Centres` are, for this head, from this tile on."""
        columns, table, turns = sources
        gpu.copy_in(columns.at[row, head], self._raw, ready)
        for place, digit in enumerate(tile_digits(first_tile, self._turning)):
            gpu.copy_in(turns.at[place, digit], self._first_turns.at[place], ready)
        gpu.copy_in(turns.at[0, 1], self._tile_turn, ready)
        for part, side in itertools.product(range(2), range(2)):
            gpu.copy_in(table.at[part, side], self._table.at[part, side], ready)

    def begin(self) -> Pairs:
        """Of the first tile."""
        of_cos, of_sin = (
            gpu.load(gpu.transposed(self._raw.at[side]), gpu.TRANSPOSED) for side in range(2)
        )
        # A pair is never longer than that, however it is turned.
        lengths = gpu.upright(jnp.abs(of_cos) + jnp.abs(of_sin))
        largest = jnp.maximum(lengths.max(axis=0), 1e-30)
        self._steps[0] = largest / (127 * 127 * LOW_STEPS)
        self._steps[1] = 127 / largest
        to_bytes = gpu.repeated(self._steps.at[1], of_cos.shape, 1)
        pairs = of_cos * to_bytes, of_sin * to_bytes
        for place in range(self._turning.digits):
            pairs = self._turn(pairs, self._first_turns.at[place])
        self._store(pairs)
        return pairs

    def next(self, pairs: Pairs) -> Pairs:
        """Of the next tile."""
        pairs = self._turn(pairs, self._tile_turn)
        self._store(pairs)
        return pairs

    def _turn(self, pairs: Pairs, angles: Any) -> Pairs:
        of_cos, of_sin = pairs
        cos, sin = (gpu.repeated(angles.at[at], of_cos.shape, 0) for at in range(2))
        return of_cos * cos + of_sin * sin, of_sin * cos - of_cos * sin

    def _store(self, pairs: Pairs) -> None:
        """In two bytes: what goes with cosines, high and low ones, and what goes with sines."""
        parts = []
        for each in pairs:
            high = jnp.round(each)
            parts += [high, jnp.round((each - high) * LOW_STEPS)]
        gpu.store_transposed(self._tiles.at[0], parts)

    def products(self, number: jax.Array) -> list[Any]:
        """For `gpu.sums_of_products`: of the table's high bytes with high and low ones, and of its
        low bytes with high ones. Of low ones with low ones all but nothing would come.

        Args:
          number: of a tile.
        """
        # Zero, which the compiler cannot tell: it would keep all addresses in registers.
        zero = lax.shift_right_logical(number, jnp.int32(24))

        def of(part: int, columns: int) -> Any:
            sides = []
            for side in range(2):
                some = self._tiles.at[zero, gpu.span(2 * self._rows * side, columns)]
                sides.append((self._table.at[part + zero, side], gpu.transposed(some)))
            return sides, jnp.int32

        return [of(0, 2 * self._rows), of(1, self._rows)]

    def scores(self, by_high: jax.Array, by_low: jax.Array) -> jax.Array:
        """Of what these products are."""
        coarse, fine = gpu.halves(by_high)
        whole = (coarse * LOW_STEPS + (fine + by_low)).astype(jnp.float32)
        return whole * gpu.across(gpu.load(self._steps.at[0], gpu.COLUMN_VECTOR), whole.shape, 1)
