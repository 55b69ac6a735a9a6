"""Scores of the centres that keys were stored less, a tile of slots at a time.

``q . R_t m`` is a sum over the rope's pairs of cosines and sines of t times what q and m make. For
slot j of a tile that begins at position p these are cosines and sines of j, the same in every tile
and so a table that the tensor cores multiply with, times what q and m make turned by p. From tile
to tile that is a turn by one angle of a few numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkv.attention.call import AttentionCall
from jaxkv.attention.mosaic.plan import LOW_STEPS, TILE, Turning

_MOST_COLUMNS = 16  # whose registers leave room for those of what turns
_FEWEST_PAIRS = 64  # the rows of a matrix in registers
_DIGIT_BITS = 7  # of a tile's number: turns are looked up a digit at a time


class Centres(NamedTuple):
    """What the kernel is given.

    Attributes:
      columns: float32 ``[batch, kv_heads, 2, rows, pairs]``: what goes with cosines, and with
        sines, of each query and centre.
      table: int8 ``[2, 2, slots, pairs]``: high and low bytes, of cosines and sines.
      turns: float32 ``[digits, 128, 2, pairs]``: cosines and sines of whole tiles.
    """

    columns: Array
    table: Array
    turns: Array


def turning_of(request: AttentionCall) -> Turning | None:
    """How the kernel makes these scores by itself, or None if it does not."""
    index, offsets, queries = request.cache.index, request.offsets, request.offset_queries
    if offsets is None or queries is None or not index.by_position:
        return None
    tokens, group, centres = queries.shape[2:5]
    if centres * tokens * group > _MOST_COLUMNS:
        return None
    tiles = -(-index.extent // TILE)
    return Turning(
        centres=centres,
        count=tokens * group,
        pairs=max(_FEWEST_PAIRS, request.cache.config.head_dim // 2),
        digits=max(1, -(-(tiles - 1).bit_length() // _DIGIT_BITS)),
    )


def centres_of(
    request: AttentionCall, turning: Turning, columns: Float[Array, "batch kv_heads numbers rows"]
) -> Centres:
    """Of offset queries, a column each and in the units of the scores."""
    assert request.offsets is not None
    frequencies = request.offsets.rope.frequencies if request.offsets.rope else ()
    turned, pairs = len(frequencies), turning.pairs
    with_cos, with_sin, rest = jnp.split(columns, [turned, 2 * turned], axis=2)
    if turned < pairs:  # what does not turn is one more pair; where all turns it is zero
        with_cos = jnp.concatenate([with_cos, rest], axis=2)

    def padded(numbers: Array) -> Array:
        return jnp.pad(numbers, ((0, 0), (0, 0), (0, pairs - numbers.shape[2]), (0, 0)))

    both = jnp.stack([padded(with_cos), padded(with_sin)], axis=2)
    table, turns = _tables((*frequencies, *(0.0,) * (pairs - turned)), turning.digits)
    return Centres(jnp.swapaxes(both, 3, 4), jnp.asarray(table), jnp.asarray(turns))


@functools.cache
def _tables(frequencies: tuple[float, ...], digits: int) -> tuple[np.ndarray, np.ndarray]:
    """`Centres.table` and `Centres.turns`."""

    def cos_sin(positions: np.ndarray) -> np.ndarray:
        angles = positions[..., None] * np.asarray(frequencies)
        return np.stack([np.cos(angles), np.sin(angles)])

    exact = 127 * cos_sin(np.arange(TILE, dtype=np.float64))
    high = np.round(exact)
    low = np.round(LOW_STEPS * (exact - high))
    places = TILE * 2.0 ** (_DIGIT_BITS * np.arange(digits))
    turns = cos_sin(places[:, None] * np.arange(1 << _DIGIT_BITS))
    return np.stack([high, low]).astype(np.int8), np.moveaxis(turns, 0, 2).astype(np.float32)


def tile_digits(tile: jax.Array, turning: Turning) -> list[jax.Array]:
    """Of a tile's number, the least first."""
    mask = (1 << _DIGIT_BITS) - 1
    return [tile >> _DIGIT_BITS * digit & mask for digit in range(turning.digits)]
