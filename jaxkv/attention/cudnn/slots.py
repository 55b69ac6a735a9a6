"""What `cudnn` reads: pieces of slots, by a table, and tokens by their positions; 16 bits each."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Index
from jaxkv.addressing.rows import read_rows
from jaxkv.cache.kv_cache import KVCache, Layer
from jaxkv.cache.vectors import state_of
from jaxkv.codecs import Codec, Leaves, bitcast, out_of_containers

_LARGEST, _SMALLEST = 64, 8  # slots of a piece; powers of two, for cuDNN


class Pieces(NamedTuple):
    """Keys and values in pieces, of one layer or of all.

    Attributes:
      key_table, value_table: the piece that each so many slots of a sequence stand in.
    """

    keys: Float[Array, "pieces size kv_heads head_dim"]
    values: Float[Array, "pieces size kv_heads head_dim"]
    key_table: Int[Array, "batch runs"]
    value_table: Int[Array, "batch runs"]


def number_type(codec: Codec) -> jnp.dtype:
    """What cuDNN multiplies where this codec stores."""
    return jnp.dtype("float16" if codec.dtype == "float16" else "bfloat16")


def piece_size(index: Index) -> int:
    """Slots that stand next to each other, from each multiple of their number on."""
    size = _power_of_two(index)
    return size if size >= _SMALLEST else _LARGEST


def pieces_of(cache: KVCache, layer: Layer) -> Pieces:
    """All slots: where they are, or decoded."""
    config, index, batch = cache.config, cache.index, cache.config.batch_size or 1
    size = piece_size(index)
    in_place = size == _power_of_two(index)
    if config.codec.dtype is not None and in_place:
        (leaf,) = cache.storage.values()
        whole = bitcast(leaf, config.codec.dtype)
        pool = whole.reshape(-1, size, *whole.shape[3:])
        keys, values = (
            (2 * layer + side) * (config.num_slots // size) + _table(index, batch, size)
            for side in range(2)
        )
        return Pieces(pool, pool, keys, values)
    # Of a pool that holds less than its rows might, each page once: several rows may have it.
    crowded = batch * index.extent > config.num_slots and not cache.codec_state
    if in_place and crowded:
        pages = {name: leaf[layer] for name, leaf in cache.storage.items()}
        leaves = out_of_containers(config.codec, pages, config.head_dim)
        both = config.codec.decode_rotated(leaves, config.head_dim, number_type(config.codec))
        table = _table(index, batch, size)
    else:
        both = _rows(cache, layer, -index.extent % size)
        table = jnp.arange(both.shape[1] // size, dtype=jnp.int32).reshape(batch, -1)
    keys, values = both.reshape(2, -1, size, *both.shape[2:])
    return Pieces(keys, values, table, table)


def tokens_at(
    cache: KVCache, layer: Layer, positions: Int[Array, "batch tokens"]
) -> Float[Array, "2 batch tokens kv_heads head_dim"]:
    """Keys and values by position; zeros where a position has no slot."""
    config = cache.config
    slots = cache.index.slots(positions.reshape(*config.batch_shape, -1)).reshape(positions.shape)
    stored = {
        name: read_rows(leaf, layer, jnp.maximum(slots, 0)) for name, leaf in cache.storage.items()
    }
    both = _decoded(cache, layer, stored, positions)
    return jnp.where((slots >= 0)[..., None, None], both, 0)


def _rows(cache: KVCache, layer: Layer, padding: int) -> Float[Array, "2 slots kv_heads head_dim"]:
    """Every sequence's slots, one after the other, each padded."""
    index = cache.index
    stored = {
        name: index.read(leaf, layer, 0, index.extent) for name, leaf in cache.storage.items()
    }
    if cache.config.batch_size is None:
        stored = {name: leaf[:, None] for name, leaf in stored.items()}
    both = _decoded(cache, layer, stored, jnp.arange(index.extent, dtype=jnp.int32)[None])
    both = jnp.pad(both, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    return both.reshape(2, -1, *both.shape[-2:])


def _decoded(
    cache: KVCache, layer: Layer, stored: Leaves, positions: Int[Array, "#batch slots"]
) -> Float[Array, "2 batch slots kv_heads head_dim"]:
    """Rotated by the codec."""
    codec, head_dim = cache.config.codec, cache.config.head_dim
    leaves, dtype = out_of_containers(codec, stored, head_dim), number_type(codec)
    state = state_of(cache, layer)
    return codec.decode_tokens(leaves, head_dim, dtype, state, positions[..., None], rotated=True)


def _table(index: Index, batch: int, size: int) -> Int[Array, "batch runs"]:
    """The piece of the ctx axis that each ``size`` slots of a sequence stand in."""
    if index.pages is None:
        return jnp.arange(batch * index.extent // size, dtype=jnp.int32).reshape(batch, -1)
    per_page = index.pages.page_size // size
    pages = jnp.maximum(index.pages.table.reshape(batch, -1, 1), 0)
    return (pages * per_page + jnp.arange(per_page, dtype=jnp.int32)).reshape(batch, -1)


def _power_of_two(index: Index) -> int:
    run = index.run or 1
    return min(run & -run, _LARGEST)
