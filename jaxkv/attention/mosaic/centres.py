"""Scores of the centres that keys were stored less, a tile of slots at a time.

``q . R_t m`` is a sum over the rope's pairs of cosines and sines of t times what q and m make. For
slot j of a tile that begins at position p these are cosines and sines of j, the same in every tile
and so a table that tensor cores multiply with, times what q and m make turned by p. That is a turn
by one angle from tile to tile, of few numbers. What would be the score of each slot and query in
memory is never there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkv.attention.call import AttentionCall
from jaxkv.attention.mosaic.plan import LOW_STEPS, TILE, Turning

_DIGIT = 128  # tiles: how far the first one is turned is looked up a digit of its number at once


class Centres(NamedTuple):
    """What the kernel is given.

    Attributes:
      columns: float32 ``[batch, kv_heads, 2, rows, pairs]``: what goes with cosines, and with
        sines, of each query and centre.
      table: int8 ``[2, 2, slots, pairs]``: high and low bytes of cosines and sines.
      turns: float32 ``[digits, 128, 2, pairs]``: cosines and sines of whole tiles.
    """

    columns: Array
    table: Array
    turns: Array


def centres_of(
    request: AttentionCall,
    turning: Turning,
    columns: Float[Array, "batch kv_heads numbers rows"],
    unit: float,
) -> Centres:
    """For these offset queries, a column each."""
    assert request.offsets is not None
    rope, pairs = request.offsets.rope, turning.pairs
    turned = rope.frequencies if rope else ()
    with_cos, with_sin, rest = jnp.split(columns, [len(turned), 2 * len(turned)], axis=2)
    if len(turned) < pairs:  # what does not turn is a pair of its own; or else there is none
        with_cos = jnp.concatenate([with_cos, rest], axis=2)

    def padded(numbers: Array) -> Array:
        return jnp.pad(numbers, ((0, 0), (0, 0), (0, pairs - numbers.shape[2]), (0, 0)))

    both = jnp.stack([padded(with_cos), padded(with_sin)], axis=2)
    table, turns = _tables((*turned, *(0.0,) * (pairs - len(turned))), turning.digits)
    return Centres(jnp.swapaxes(both * unit, 3, 4), jnp.asarray(table), jnp.asarray(turns))


def turning_of(request: AttentionCall) -> Turning | None:
    """How the kernel makes these scores by itself, or None if it does not."""
    index, offsets, queries = request.cache.index, request.offsets, request.offset_queries
    if offsets is None or queries is None or not index.by_position:
        return None
    tokens, group, centres = queries.shape[2:5]
    if centres * tokens * group > _MOST_COLUMNS:
        return None
    pairs = max(_LEAST_PAIRS, request.cache.config.head_dim // 2)
    digits, tiles = 1, -(-index.extent // TILE)
    while _DIGIT**digits < tiles:
        digits += 1
    return Turning(centres, tokens * group, pairs, digits)


_MOST_COLUMNS = 16  # whose registers the turning leaves
_LEAST_PAIRS = 64  # rows of a matrix in registers


@functools.cache
def _tables(frequencies: tuple[float, ...], digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Of slots in a tile, in two bytes; and of tiles."""

    def cos_sin(positions: np.ndarray) -> np.ndarray:
        angles = positions[..., None] * np.asarray(frequencies)
        return np.stack([np.cos(angles), np.sin(angles)])

    exact = 127 * cos_sin(np.arange(TILE, dtype=np.float64))
    high = np.round(exact)
    low = np.round(LOW_STEPS * (exact - high))
    places = TILE * _DIGIT ** np.arange(digits, dtype=np.float64)
    turns = cos_sin(places[:, None] * np.arange(_DIGIT))
    return np.stack([high, low]).astype(np.int8), np.moveaxis(turns, 0, 2).astype(np.float32)


def tile_digits(tile: jax.Array, digits: int) -> list[jax.Array]:
    """Of a tile's number, the least first."""
    shift = _DIGIT.bit_length() - 1
    return [tile >> shift * digit & _DIGIT - 1 for digit in range(digits)]
