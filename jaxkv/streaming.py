"""Writing to a cache that lives in host memory, and moving whole caches there and back."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from jaxkv.checks import check_alive
from jaxkv.codecs import Leaves, bitcast, rotate
from jaxkv.devices import default_device
from jaxkv.hybrid import in_every_group
from jaxkv.kv_cache import KVCache, Layer, buffer_of
from jaxkv.placement import host_sharding, run_of, write_slots
from jaxkv.programs import on_device


@in_every_group
def offload(cache: KVCache) -> KVCache:
    """The cache in host memory, bit for bit, for as long as its device memory is needed.

    `append` and `attend` go on working at the pace of the bus (not where heads keep numbers of
    tokens of their own). The device memory is free again once the old cache is: rebind it,
    ``cache = jaxkv.offload(cache)``. A copy in numpy arrays goes to where its
    ``config.placement`` says.

    Raises:
      ValueError: the backend has no host memory.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> cache.storage["data"].sharding.memory_kind
    'pinned_host'
    """
    check_alive(cache)
    return _moved(cache, host_sharding)


@in_every_group
def prefetch(cache: KVCache) -> KVCache:
    """The cache on its device again. Returns at once; the copy is waited for when it is used.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> jaxkv.prefetch(cache).storage["data"].sharding.memory_kind
    'device'
    """
    check_alive(cache)
    return _moved(cache, lambda sharding: sharding.with_memory_kind("device"))


def _moved(cache: KVCache, to: Callable[[Sharding], Sharding]) -> KVCache:
    at_home = SingleDeviceSharding(default_device())  # of numpy arrays
    if cache.config.placement is not None:
        if not isinstance(buffer_of(cache), np.ndarray):  # it is where its config says
            return cache
        to = host_sharding if cache.config.in_host_memory else lambda sharding: sharding
    storage = {
        name: jax.device_put(leaf, to(getattr(leaf, "sharding", at_home)))
        for name, leaf in cache.storage.items()
    }
    beside = jax.tree.map(on_device, dataclasses.replace(cache, storage={}))
    return dataclasses.replace(beside, storage=storage)


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
