"""Writing to a cache that lives in host memory, and moving whole caches there and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.addressing.contiguous import ContiguousIndex
from jaxkv.checks import check_alive
from jaxkv.codecs import Leaves, bitcast, rotate
from jaxkv.hybrid import in_every_group
from jaxkv.kv_cache import KVCache, Layer
from jaxkv.placement import host_sharding, to_device, to_host


@in_every_group
def offload(cache: KVCache) -> KVCache:
    """The cache in host memory, bit for bit, for as long as its device memory is needed.

    The verbs go on working if its addressing is `Contiguous`, at the pace of the bus. The device
    memory is free again once the old cache is: rebind it, ``cache = jaxkv.offload(cache)``.

    Raises:
      ValueError: the backend has no host memory.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> cache.storage["data"].sharding.memory_kind
    'pinned_host'
    """
    check_alive(cache)
    return _moved(cache, lambda leaf: host_sharding(leaf.sharding))


@in_every_group
def prefetch(cache: KVCache) -> KVCache:
    """The cache on its device again. Returns at once; the copy is waited for when it is used.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> jaxkv.prefetch(cache).storage["data"].sharding.memory_kind
    'device'
    """
    check_alive(cache)
    return _moved(cache, lambda leaf: leaf.sharding.with_memory_kind("device"))


def _moved(cache: KVCache, to: Any) -> KVCache:
    if cache.config.placement is not None:  # it is where its config says
        return cache
    storage = {name: jax.device_put(leaf, to(leaf)) for name, leaf in cache.storage.items()}
    return dataclasses.replace(cache, storage=storage)


def append_to_host(
    cache: KVCache,
    layer: Layer,
    encoded: Leaves,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    positions: Int[Array, "*batch tokens"],
) -> KVCache:
    """What `jaxkv.append` does for a cache in host memory: to there, and to the device's ring.

    Args:
      encoded: leaves ``[sides, *batch, tokens, kv_heads, ...]``.
      keys: before they were encoded.
      positions: of the tokens, one after the other from each sequence's length on; -1 for padding.
    """
    if not isinstance(cache.index, ContiguousIndex):
        raise ValueError(
            f"This {cache.config.addressing.name} cache is in host memory, where only contiguous "
            "ones can grow. Bring it back with jaxkv.prefetch first."
        )
    capacity = cache.index.capacity
    kept = jnp.where(positions < capacity, positions, -1)
    lengths = cache.lengths.reshape(-1)
    rows = kept.reshape(len(lengths), -1)
    storage = {
        name: _written(leaf, layer, encoded[name], lengths, rows, capacity)
        for name, leaf in cache.storage.items()
    }
    resident = cache.resident
    if resident is not None:
        resident = resident.append(layer, encoded, kept)
        if resident.bounds is not None:
            turned = rotate(cache.config.codec, keys.astype(jnp.float32))
            turned = turned.reshape(*rows.shape, *keys.shape[-2:])
            bounds = resident.bounds.extended(layer, turned, rows)
            resident = dataclasses.replace(resident, bounds=bounds)
    return dataclasses.replace(cache, storage=storage, resident=resident)


def _written(
    leaf: Array,
    layer: Layer,
    encoded: Array,
    lengths: Int[Array, " batch"],
    positions: Int[Array, "batch tokens"],
    capacity: int,
) -> Array:
    """Each sequence's new tokens over a run of slots of one layer of a leaf in host memory.

    A scatter into host memory crashes XLA (openxla/xla 34565), and a slice update clamps. So a
    run of slots is read that lies within the sequence, what is new in it is put in, and it is
    written back.
    """
    batch, tokens = positions.shape
    size = min(tokens, capacity)
    new = bitcast(encoded, leaf.dtype).reshape(leaf.shape[1], batch, tokens, *leaf.shape[3:])
    sizes = (1, leaf.shape[1], size, *leaf.shape[3:])

    def one_sequence(sequence: Int[Array, ""], leaf: Array) -> Array:
        length = lengths[sequence]
        start = jnp.minimum(length, capacity - size)
        # The token of each slot of the run: none before ``length``, and none of padding.
        token = start + jnp.arange(size, dtype=jnp.int32) - length
        is_new = (token >= 0) & (token < tokens)
        token = jnp.clip(token, 0, tokens - 1)
        is_new &= positions[sequence, token] >= 0
        run = new[:, sequence, token][None]  # [1, sides, size, ...]
        place = (layer, 0, sequence * capacity + start, *(0 for _ in leaf.shape[3:]))
        old = to_device(lax.dynamic_slice(leaf, place, sizes))
        mask = is_new.reshape(-1, *(1 for _ in leaf.shape[3:]))
        return lax.dynamic_update_slice(leaf, to_host(jnp.where(mask, run, old)), place)

    if batch == 1:
        return one_sequence(jnp.int32(0), leaf)
    return lax.fori_loop(0, batch, one_sequence, leaf)
