"""Keys and values to what a cache stores of them, and back."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.cache.kv_cache import KVCache, Layer
from jaxkv.codecs import Centred, Leaves, decode_stored, refuse_gradient, updated_means
from jaxkv.placement import read_slots


def means_of(cache: KVCache, layer: Layer) -> Float[Array, "2 kv_heads head_dim"]:
    """Of one layer of a cache that has them."""
    assert cache.means is not None, "a cache with a Centred codec was made without its means"
    return cache.means[layer]


def encode(
    cache: KVCache,
    layer: Layer,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads head_dim"],
    positions: Int[Array, "*batch tokens"],
) -> tuple[Leaves, Array | None]:
    """The codec's leaves, ``[sides, *batch, tokens, kv_heads, ...]``, and the cache's means."""
    codec = cache.config.codec
    vectors = refuse_gradient(codec, jnp.stack([keys, values]))
    if not isinstance(codec, Centred):
        return codec.encode(vectors), None
    vectors, empty = vectors.astype(jnp.float32), jnp.all(cache.lengths == 0)
    own = updated_means(codec, means_of(cache, layer), vectors, positions, empty)
    encoded = codec.encode(vectors - codec.centres(own, positions[..., None]))
    return encoded, cache.means.at[layer].set(own)  # type: ignore[union-attr]


def read(
    cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int, dtype: Any
) -> Float[Array, "2 *batch size kv_heads head_dim"]:
    """Decode ``size`` logical slots of one layer."""
    codec, lengths = cache.config.codec, cache.lengths
    if not isinstance(codec, Centred):
        return _decode(cache, layer, start, size, dtype, rotated=False)
    slots = start + jnp.arange(size, dtype=jnp.int32)
    positions = cache.index.key_positions(layer, lengths, start, size)
    positions = jnp.where(positions < 0, slots, positions)  # tokens that are not counted yet
    positions = positions.reshape(*lengths.shape, -1, size).swapaxes(-1, -2)
    differences = _decode(cache, layer, start, size, jnp.dtype("float32"), rotated=False)
    return (differences + codec.centres(means_of(cache, layer), positions)).astype(dtype)


def read_stored(
    cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int
) -> Float[Array, "2 *batch size kv_heads head_dim"]:
    """The same as the codec keeps them, float32: turned by it, and less their means."""
    return _decode(cache, layer, start, size, jnp.dtype("float32"), rotated=True)


def _decode(
    cache: KVCache,
    layer: Layer,
    start: Int[Array, ""] | int,
    size: int,
    dtype: Any,
    *,
    rotated: bool,
) -> Array:
    stored = {
        name: read_slots(cache.index, leaf, layer, start, size)
        for name, leaf in cache.storage.items()
    }
    config = cache.config
    return decode_stored(config.codec, stored, config.head_dim, dtype, rotated=rotated)
