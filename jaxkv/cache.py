"""The verbs of a cache: pure functions from value to value.

Under `jax.jit` with the cache donated every update is in place. Outside jit an update
copies, as for any immutable array.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from jaxkv.checks import (
    check_alive,
    check_chunk,
    check_counts,
    check_intact,
    check_layer,
    check_room,
    check_vectors,
)
from jaxkv.codecs import Dense, bitcast
from jaxkv.errors import CacheFullError
from jaxkv.hybrid import (
    AnyCache,
    in_every_group,
    in_its_group,
)
from jaxkv.kv_cache import KVCache, Layer, NumTokens
from jaxkv.placement import in_host_memory
from jaxkv.streaming import append_to_host
from jaxkv.vectors import encode, read


@in_its_group
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

    >>> import jax.numpy as jnp, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> cache = jaxkv.append(cache, jnp.ones((3, 1, 4)), jnp.zeros((3, 1, 4)), layer=0)
    >>> keys, values = jaxkv.layer(cache, 0)
    >>> keys[:4, 0, 0].tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    num_layer = check_layer(cache, layer)
    check_vectors(cache, "keys", keys)
    check_vectors(cache, "values", values, expected_shape=keys.shape)
    tokens = keys.shape[-3]
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    num_tokens = real_of(cache, tokens, num_tokens)
    check_chunk(cache, tokens)
    check_room(cache, tokens if num_tokens is None else num_tokens)

    positions = token_positions(cache, tokens, num_tokens)
    encoded, means = encode(cache, num_layer, keys, values, positions)
    newest = cache.newest
    if newest is not None:
        newest = append(newest, keys, values, layer=num_layer, num_tokens=num_tokens)
    cache = dataclasses.replace(cache, means=means, newest=newest)
    if in_host_memory(next(iter(cache.storage.values()))):
        return append_to_host(cache, num_layer, encoded, keys, positions)
    slots = cache.index.slots(positions)
    # Places that do not exist get numbers past the end, each its own: the scatter drops
    # them, and may still be told that no two writes meet.
    past_the_end = cache.config.num_slots + jnp.arange(slots.size, dtype=jnp.int32)
    slots = jnp.where(slots < 0, past_the_end.reshape(slots.shape), slots)
    storage = {  # a scatter wants slots before sides
        name: leaf.at[num_layer, :, slots].set(
            jnp.moveaxis(bitcast(encoded[name], leaf.dtype), 0, slots.ndim),
            mode="drop",
            unique_indices=True,
        )
        for name, leaf in cache.storage.items()
    }
    return dataclasses.replace(cache, storage=storage)


@in_every_group
def advance(cache: KVCache, num_tokens: NumTokens) -> KVCache:
    """Count the appended tokens, once a step, after the last layer.

    Raises:
      CacheFullError: outside jit, when that is more than a sequence can hold.
      ValueError: a bad shape of ``num_tokens`` or, outside jit, a negative number.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4, batch_size=2))
    >>> cache = jaxkv.advance(jaxkv.advance(cache, 3), jax.numpy.array([1, 0]))
    >>> cache.lengths.tolist()
    [4, 3]
    """
    check_counts(cache, "num_tokens", num_tokens)
    check_alive(cache)
    check_room(cache, num_tokens)
    counted = jnp.asarray(num_tokens, jnp.int32)
    if cache.real_tokens is not None:
        counted = jnp.minimum(counted, cache.real_tokens)
        cache = dataclasses.replace(cache, real_tokens=cache.real_tokens - counted)
    return cache.with_lengths(cache.lengths + counted)


@in_every_group
def padded_after(cache: KVCache, num_tokens: NumTokens | None) -> KVCache:
    """The cache for a step by a model that knows nothing of padding; None ends the step.

    `append`, `attend` and `advance` then take the first ``num_tokens`` of all tokens of the step
    for real, and no more. So padding enters neither slots nor means.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4))
    >>> cache = padded_after(cache, 3)
    >>> int(jaxkv.advance(cache, 5).lengths)
    3
    """
    real = None if num_tokens is None else jnp.asarray(num_tokens, jnp.int32)
    return dataclasses.replace(cache, real_tokens=real)


def real_of(cache: KVCache, tokens: int, num_tokens: NumTokens | None) -> NumTokens | None:
    """How many of the next ``tokens`` are real: as many as is said, and no padding of the step."""
    if cache.real_tokens is None:
        return num_tokens
    most = tokens if num_tokens is None else num_tokens
    return jnp.minimum(cache.real_tokens, jnp.asarray(most, jnp.int32))


def next_positions(cache: AnyCache, num_tokens: int) -> Int[Array, "*batch tokens"]:
    """The positions of the next ``num_tokens`` tokens, for rope or a position embedding.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 3)
    >>> jaxkv.next_positions(cache, 2).tolist()
    [3, 4]
    """
    check_alive(cache)
    return cache.lengths[..., None] + jnp.arange(num_tokens, dtype=jnp.int32)


def layer(
    cache: AnyCache, layer: Layer
) -> tuple[
    Float[Array, "*batch ctx kv_heads head_dim"], Float[Array, "*batch ctx kv_heads head_dim"]
]:
    """The decoded keys and values of one layer, all slots of each sequence, in logical order.

    Slots at or past a sequence's length hold zeros or tokens that were rolled back: mask
    them. `attend` does, and reads less. In a ring a position comes round again:
    ``cache.index.key_positions`` says which one a slot holds.

    Raises:
      IndexError: no such layer.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 8, num_kv_heads=1, head_dim=4))
    >>> keys, values = jaxkv.layer(cache, 1)
    >>> keys.shape, values.dtype.name
    ((8, 1, 4), 'bfloat16')
    """
    return _layer(cache, layer=layer)


@in_its_group
def _layer(cache: KVCache, *, layer: Layer) -> tuple[Array, Array]:
    number = check_layer(cache, layer)
    keys, values = read(cache, number, 0, cache.index.extent, _decoded_dtype(cache))
    return keys, values


@in_every_group
def truncate(cache: KVCache, length: NumTokens) -> KVCache:
    """Roll back to the first ``length`` tokens: the rest is forgotten and written over.

    A ring can take back ``chunk`` tokens, or all.

    Raises:
      ValueError: a bad shape of ``length`` or, outside jit, a negative one or one that a ring
        has lost (inside jit, `check` says so after). One beyond the cache's own changes nothing.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.truncate(cache, 3).lengths.tolist(), jaxkv.truncate(cache, 7).lengths.tolist()
    (3, 5)
    """
    check_alive(cache)
    check_counts(cache, "length", length)
    lengths = jnp.minimum(cache.lengths, jnp.asarray(length, jnp.int32))
    rolled_back = cache.with_lengths(lengths)
    check_intact(rolled_back)
    return rolled_back


def reset(cache: AnyCache) -> AnyCache:
    """The same buffers, empty. Old tokens stay in memory until written over, never to be read.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.reset(cache).lengths.tolist()
    0
    """
    return truncate(cache, 0)


@in_every_group
def check(cache: KVCache) -> KVCache:
    """Return the cache if it is sound.

    Inside jit this does nothing, unless the function is run under `checkify`.

    Raises:
      CacheFullError: tokens were dropped inside jit because their sequence was full.
      CacheClosedError: the buffers were donated or deleted.
      ValueError: a ring was rolled back inside jit to tokens that it had written over.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4))
    >>> full = jax.jit(jaxkv.advance)(jaxkv.check(cache), 9)  # inside jit nothing can be raised
    >>> jaxkv.check(full)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CacheFullError: Tokens were dropped: ...
    """
    if isinstance(cache.lengths, jax.core.Tracer):
        checkify.debug_check(~cache.overflowed.any(), "KV cache full: tokens were dropped")
        checkify.debug_check(jnp.all(cache.index.intact), "KV cache rolled back beyond its ring")
        return cache
    check_alive(cache)
    if cache.overflowed.any():
        each = np.unique(cache.index.room).tolist()
        room = each[0] if len(each) == 1 else np.asarray(cache.index.room).tolist()
        raise CacheFullError(
            f"Tokens were dropped: sequences are {np.asarray(cache.lengths).tolist()} tokens long, "
            f"and the cache holds {room} each. The first {room} are intact; truncate to them, or "
            "create a cache with a larger max_context_length."
        )
    check_intact(cache)
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


def _decoded_dtype(cache: KVCache) -> jnp.dtype:
    codec = cache.config.codec
    return jnp.dtype(codec.dtype if isinstance(codec, Dense) else "float32")
