"""Writing to a cache that lives in host memory, and moving whole caches there and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.checks import check_alive
from jaxkv.codecs import Leaves, bitcast, rotate
from jaxkv.hybrid import in_every_group
from jaxkv.kv_cache import KVCache, Layer
from jaxkv.placement import host_sharding, run_of, write_slots


@in_every_group
def offload(cache: KVCache) -> KVCache:
    """The cache in host memory, bit for bit, for as long as its device memory is needed.

    `append` and `attend` go on working at the pace of the bus (not where heads keep numbers of
    tokens of their own). The device memory is free again once the old cache is: rebind it,
    ``cache = jaxkv.offload(cache)``.

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
    if (run := run_of(cache.index)) is None:
        raise ValueError(
            f"This {cache.config.addressing.name} cache is in host memory, where its tokens stand "
            "in no order to be written in. Bring it back with jaxkv.prefetch first."
        )
    kept = jnp.where(positions < cache.index.capacity, positions, -1)
    rows = (cache.config.batch_size or 1, kept.shape[-1])
    slots = cache.index.slots(kept).reshape(rows)
    storage = {}
    for name, leaf in cache.storage.items():
        new = bitcast(encoded[name], leaf.dtype).reshape(leaf.shape[1], *rows, *leaf.shape[3:])
        storage[name] = write_slots(leaf, layer, new, slots, run)
    resident = cache.resident
    if resident is not None:
        resident = resident.append(layer, encoded, kept)
        if resident.bounds is not None:
            turned = rotate(cache.config.codec, keys.astype(jnp.float32))
            turned = turned.reshape(*rows, *keys.shape[-2:])
            bounds = resident.bounds.extended(layer, turned, kept.reshape(rows))
            resident = dataclasses.replace(resident, bounds=bounds)
    return dataclasses.replace(cache, storage=storage, resident=resident)
