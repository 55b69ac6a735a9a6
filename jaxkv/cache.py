"""The verbs of a cache: pure functions from value to value.

Under `jax.jit` with the cache donated every update is in place. Outside jit an update
copies, as for any immutable array.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.checks import check_alive, check_counts, check_layer, check_room, check_vectors
from jaxkv.codecs import Dense, bitcast, container_dtype, decode_stored
from jaxkv.config import KVCacheConfig
from jaxkv.errors import CacheFullError
from jaxkv.kv_cache import KVCache, Layer, NumTokens


def create(config: KVCacheConfig, *, device: Any = None) -> KVCache:
    """An empty cache: every buffer preallocated and zero.

    Args:
      config: its shape.
      device: a `jax.Device` or `jax.sharding.Sharding` for the buffers; JAX's default if None.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 16, 1, 4, codec=jaxkv.Dense("float32")))
    >>> cache.storage["data"].shape
    (2, 2, 16, 1, 4)
    """
    platform = _platform(device)
    prefix = (config.num_layers, 2, config.num_slots, config.num_kv_heads)
    storage = {
        name: jnp.zeros((*prefix, *shape), container_dtype(dtype, platform), device=device)
        for name, (shape, dtype) in config.codec.leaves(config.head_dim).items()
    }
    index = config.addressing.init(config.max_context_length, config.batch_size)
    if isinstance(device, NamedSharding):  # on all of the mesh, as a step will return it
        index = jax.device_put(index, NamedSharding(device.mesh, PartitionSpec()))
    elif isinstance(device, jax.Device):
        index = jax.device_put(index, device)
    return KVCache(storage, index, config)


def append(
    cache: KVCache,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
) -> KVCache:
    """Write the keys and values of the next tokens into one layer. Lengths do not move.

    Args:
      keys, values: ``[tokens, kv_heads, head_dim]``, with a leading ``[batch]`` exactly when
        the config has a ``batch_size``. Any float dtype; the codec rounds.
      layer: which layer; may be traced.
      num_tokens: how many of ``tokens`` are real, for prompts padded on the right. All if None.

    Raises:
      CacheFullError: outside jit, when a sequence has not enough slots left. Inside jit the
        tokens that do not fit are dropped and `check` says so once `advance` has counted them.
      IndexError, TypeError, ValueError: a bad layer, dtype or shape.
    """
    num_layer = check_layer(cache, layer)
    check_vectors(cache, "keys", keys)
    check_vectors(cache, "values", values, expected_shape=keys.shape)
    tokens = keys.shape[-3]
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    check_room(cache, tokens if num_tokens is None else num_tokens)

    slots = cache.index.slots(token_positions(cache, tokens, num_tokens))
    # Places that do not exist get numbers past the end, each its own: the scatter drops
    # them, and may still be told that no two writes meet.
    past_the_end = cache.config.num_slots + jnp.arange(slots.size, dtype=jnp.int32)
    slots = jnp.where(slots < 0, past_the_end.reshape(slots.shape), slots)
    encoded = cache.config.codec.encode(jnp.stack([keys, values], axis=-3))
    storage = {
        name: leaf.at[num_layer, :, slots].set(
            bitcast(encoded[name], leaf.dtype), mode="drop", unique_indices=True
        )
        for name, leaf in cache.storage.items()
    }
    return dataclasses.replace(cache, storage=storage)


def advance(cache: KVCache, num_tokens: NumTokens) -> KVCache:
    """Count the appended tokens, once a step, after the last layer.

    Raises:
      CacheFullError: outside jit, when that is more than a sequence can hold.
      ValueError: a bad shape of ``num_tokens`` or, outside jit, a negative number.
    """
    check_counts(cache, "num_tokens", num_tokens)
    check_alive(cache)
    check_room(cache, num_tokens)
    lengths = cache.lengths + jnp.asarray(num_tokens, jnp.int32)
    return dataclasses.replace(cache, index=cache.index.with_lengths(lengths))


def next_positions(cache: KVCache, num_tokens: int) -> Int[Array, "*batch tokens"]:
    """The positions of the next ``num_tokens`` tokens, for rope or a position embedding.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 3)
    >>> jaxkv.next_positions(cache, 2).tolist()
    [3, 4]
    """
    check_alive(cache)
    return cache.lengths[..., None] + jnp.arange(num_tokens, dtype=jnp.int32)


def layer(
    cache: KVCache, layer: Layer
) -> tuple[
    Float[Array, "*batch ctx kv_heads head_dim"], Float[Array, "*batch ctx kv_heads head_dim"]
]:
    """The decoded keys and values of one layer, all slots, in logical order.

    Slots at or past a sequence's length hold zeros or tokens that were rolled back: mask
    them. `attend` does, and reads less.

    Raises:
      IndexError: no such layer.
    """
    number = check_layer(cache, layer)
    keys, values = read(cache, number, 0, cache.index.capacity, _decoded_dtype(cache))
    return keys, values


def truncate(cache: KVCache, length: NumTokens) -> KVCache:
    """Roll back to the first ``length`` tokens: the rest is forgotten and written over.

    Raises:
      ValueError: a bad shape of ``length`` or, outside jit, a negative one. One beyond the
        cache's own changes nothing.
    """
    check_alive(cache)
    check_counts(cache, "length", length)
    lengths = jnp.minimum(cache.lengths, jnp.asarray(length, jnp.int32))
    return dataclasses.replace(cache, index=cache.index.with_lengths(lengths))


def reset(cache: KVCache) -> KVCache:
    """The same buffers, empty. Old tokens stay in memory until written over, never to be read."""
    return truncate(cache, 0)


def check(cache: KVCache) -> KVCache:
    """Return the cache if it is sound.

    Inside jit this does nothing, unless the function is run under `checkify`.

    Raises:
      CacheFullError: tokens were dropped inside jit because their sequence was full.
      CacheClosedError: the buffers were donated or deleted.
    """
    if isinstance(cache.lengths, jax.core.Tracer):
        checkify.debug_check(~cache.overflowed.any(), "KV cache full: tokens were dropped")
        return cache
    check_alive(cache)
    if cache.overflowed.any():
        raise CacheFullError(
            f"Tokens were dropped: sequences are {np.asarray(cache.lengths).tolist()} tokens long, "
            f"and the cache holds {cache.index.capacity} each. The first {cache.index.capacity} "
            "are intact; truncate to them, or create a cache with a larger max_context_length."
        )
    return cache


def token_positions(
    cache: KVCache, tokens: int, num_tokens: NumTokens | None
) -> Int[Array, "*batch tokens"]:
    """`next_positions`, with -1 for padding: the tokens from ``num_tokens`` on."""
    positions = next_positions(cache, tokens)
    if num_tokens is None:
        return positions
    real = jnp.arange(tokens) < jnp.asarray(num_tokens)[..., None]
    return jnp.where(real, positions, -1)


def read(
    cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int, dtype: Any
) -> Float[Array, "2 *batch size kv_heads head_dim"]:
    """Decode ``size`` logical slots of one layer."""
    config = cache.config
    stored = {
        name: cache.index.read(leaf, layer, start, size) for name, leaf in cache.storage.items()
    }
    return decode_stored(config.codec, stored, config.head_dim, dtype)


def _platform(device: Any) -> str:
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    if isinstance(device, jax.sharding.Sharding):
        device = next(iter(device.device_set))
    return jax.default_backend() if device is None else device.platform


def _decoded_dtype(cache: KVCache) -> jnp.dtype:
    codec = cache.config.codec
    return jnp.dtype(codec.dtype if isinstance(codec, Dense) else "float32")
