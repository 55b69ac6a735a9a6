"""The verbs of a cache: pure functions from value to value.

Under `jax.jit` with the cache donated every update is in place. Outside jit an update
copies, as for any immutable array.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.addressing import PagedIndex
from jaxkv.checks import (
    check_alive,
    check_chunk,
    check_counts,
    check_intact,
    check_layer,
    check_on_device,
    check_room,
    check_rows,
    check_vectors,
)
from jaxkv.codecs import Dense, Leaves, bitcast, container_dtype, leaf_specs
from jaxkv.config import KVCacheConfig
from jaxkv.errors import CacheFullError
from jaxkv.hybrid import (
    AnyCache,
    AnyConfig,
    HybridCache,
    HybridConfig,
    in_every_group,
    in_its_group,
)
from jaxkv.kv_cache import KVCache, Layer, NumTokens
from jaxkv.placement import Resident, in_host_memory, zeros_in_host_memory
from jaxkv.streaming import append_to_host
from jaxkv.vectors import encode, read


def create(config: AnyConfig, *, device: Any = None) -> AnyCache:
    """An empty cache: every buffer preallocated and zero.

    Args:
      config: its shape; a `HybridConfig` gives a `HybridCache`.
      device: a `jax.Device` or `jax.sharding.Sharding` for the buffers; JAX's default if None.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 16, 1, 4, codec=jaxkv.Dense("float32")))
    >>> cache.storage["data"].shape
    (2, 2, 16, 1, 4)
    """
    if isinstance(config, HybridConfig):
        groups = (_create(group, device) for group in config.groups)
        return HybridCache(tuple(groups), config)
    return _create(config, device)


def _create(config: KVCacheConfig, device: Any) -> KVCache:
    if config.placement is not None and device is None:
        # All in one place that is named, for a step returns it so, and compiles once then.
        device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    platform = _platform(device)

    def buffers(num_slots: int, allocate: Any = jnp.zeros) -> Leaves:
        leaves = {}
        for name, (shape, dtype, sides) in leaf_specs(config.codec, config.head_dim).items():
            whole = (config.num_layers, sides, num_slots, config.num_kv_heads, *shape)
            leaves[name] = allocate(whole, container_dtype(dtype, platform), device=device)
        return leaves

    means = config.means_shape and jnp.zeros(config.means_shape, device=_without_ctx(device))
    index = config.addressing.init(config.max_context_length, config.batch_size)
    resident = None
    if config.placement is not None:
        resident = Resident.create(config, buffers(config.num_resident_slots))
    if isinstance(device, NamedSharding):  # on all of the mesh, as a step will return it
        index = jax.device_put(index, NamedSharding(device.mesh, PartitionSpec()))
    elif isinstance(device, jax.Device):
        index, resident = jax.device_put((index, resident), device)
    storage = buffers(config.num_slots, jnp.zeros if resident is None else zeros_in_host_memory)
    return KVCache(storage, index, config, means, resident)


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
    check_chunk(cache, tokens)
    check_room(cache, tokens if num_tokens is None else num_tokens)

    positions = token_positions(cache, tokens, num_tokens)
    encoded, means = encode(cache, num_layer, keys, values, positions)
    if in_host_memory(next(iter(cache.storage.values()))):
        cache = append_to_host(cache, num_layer, encoded, keys, positions)
        return dataclasses.replace(cache, means=means)
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
    return dataclasses.replace(cache, storage=storage, means=means)


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
    lengths = cache.lengths + jnp.asarray(num_tokens, jnp.int32)
    return cache.with_lengths(lengths)


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


@in_every_group
def select(cache: KVCache, rows: Int[Array, " rows"] | Sequence[int]) -> KVCache:
    """A batch of these sequences of a cache: to reorder beams, drop finished ones, or repeat.

    The new sequences are copies that go on independently. Only with a shared pool of pages
    they keep the pages that they had: give those that go on pages of their own with
    `jaxkv.paging`, which says what to copy.

    Args:
      rows: which sequence each row of the new batch is, ``int32[rows]``; may be traced. A
        single sequence is row 0.

    Raises:
      IndexError: outside jit, a row that there is not.

    >>> import jaxkv
    >>> prompt = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.select(prompt, [0, 0, 0]).lengths.tolist()
    [5, 5, 5]
    """
    check_alive(cache)
    chosen = jnp.asarray(rows, jnp.int32)
    check_rows(cache, chosen)
    check_on_device(cache)
    index, slots = cache.index.select(chosen)
    storage = cache.storage
    if slots is not None:
        storage = {name: jnp.take(leaf, slots, axis=2) for name, leaf in storage.items()}
    config = cache.config.replace(batch_size=chosen.size)
    return dataclasses.replace(cache, storage=storage, index=index, config=config)


def fork(cache: AnyCache, num_copies: int) -> AnyCache:
    """Each sequence ``num_copies`` times, next to each other, as a batch.

    For parallel samples of one prompt; see `select` for pages of a shared pool.

    Args:
      num_copies: of each sequence, at least 1.

    >>> import jaxkv
    >>> prompt = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> fork(prompt, 4).lengths.tolist()
    [5, 5, 5, 5]
    """
    sequences = np.arange(cache.config.batch_size or 1, dtype=np.int32)
    return select(cache, np.repeat(sequences, num_copies))


def copy_pages(
    cache: KVCache, sources: Int[Array, " pages"], destinations: Int[Array, " pages"]
) -> KVCache:
    """Copy whole pages of a paged pool, in all layers, for sequences that part ways.

    In place under donation: only the pages' own bytes move.

    Args:
      sources: pages of the pool, ``int32[pages]``.
      destinations: as many pages, each named once; one below 0 or past the pool is skipped, so
        that calls can be padded to one shape.

    Raises:
      TypeError: not a paged cache.

    >>> import jax.numpy as jnp, jaxkv
    >>> config = jaxkv.KVCacheConfig(1, 8, 1, 4, addressing=jaxkv.Paged(page_size=4))
    >>> cache = jaxkv.create(config)
    >>> cache = jaxkv.append(cache, jnp.ones((4, 1, 4)), jnp.ones((4, 1, 4)), layer=0)
    >>> keys, values = jaxkv.layer(copy_pages(cache, jnp.array([0]), jnp.array([1])), 0)
    >>> keys[4:, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if not isinstance(cache.index, PagedIndex):
        raise TypeError(
            f"copy_pages needs a paged cache, got a {cache.config.addressing.name} one."
        )
    page_size, num_slots = cache.index.page_size, cache.config.num_slots
    within = jnp.arange(page_size, dtype=jnp.int32)
    skipped = num_slots + jnp.arange(destinations.size * page_size, dtype=jnp.int32)
    targets = (destinations[:, None] * page_size + within).reshape(-1)
    targets = jnp.where((targets < 0) | (targets >= num_slots), skipped, targets)
    origins = (jnp.maximum(sources, 0)[:, None] * page_size + within).reshape(-1)
    storage = {
        name: leaf.at[:, :, targets].set(
            leaf.at[:, :, origins].get(mode="clip"), mode="drop", unique_indices=True
        )
        for name, leaf in cache.storage.items()
    }
    return dataclasses.replace(cache, storage=storage)


def token_positions(
    cache: KVCache, tokens: int, num_tokens: NumTokens | None
) -> Int[Array, "*batch tokens"]:
    """`next_positions`, with -1 for padding: the tokens from ``num_tokens`` on."""
    positions = next_positions(cache, tokens)
    if num_tokens is None:
        return positions
    real = jnp.arange(tokens) < jnp.asarray(num_tokens)[..., None]
    return jnp.where(real, positions, -1)


def _platform(device: Any) -> str:
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    if isinstance(device, jax.sharding.Sharding):
        device = next(iter(device.device_set))
    return jax.default_backend() if device is None else device.platform


def _without_ctx(device: Any) -> Any:
    """Where means go, whose axes are those of a buffer without its ctx axis."""
    if not isinstance(device, NamedSharding):
        return device
    axes = tuple(device.spec)
    return NamedSharding(device.mesh, PartitionSpec(*axes[:2], *axes[3:]))


def _decoded_dtype(cache: KVCache) -> jnp.dtype:
    codec = cache.config.codec
    return jnp.dtype(codec.dtype if isinstance(codec, Dense) else "float32")
