"""Writing to a cache that lives in host memory, and moving whole caches there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from jaxkv.cache.checks import check_alive
from jaxkv.cache.groups import in_every_group_of_tokens
from jaxkv.cache.kv_cache import KVCache, Layer, buffer_of
from jaxkv.cache.vectors import read
from jaxkv.codecs import Leaves, bitcast
from jaxkv.devices import default_device
from jaxkv.placement import Bounds, host_sharding, needed_run, to_device, write_slots
from jaxkv.programs import on_device


@in_every_group_of_tokens
def offload(cache: KVCache) -> KVCache:
    """The cache in host memory, bit for bit, for as long as its device memory is needed.

    `append`, `attend` and `evict` go on working at the pace of the bus (not where heads keep
    numbers of tokens of their own). The device memory is free again once the old cache is: rebind
    it, ``cache = jaxkv.offload(cache)``. A copy in numpy arrays goes to where its
    ``config.placement`` says.

    Raises:
      ValueError: the backend has no host memory.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> cache.storage["data"].sharding.memory_kind
    'pinned_host'
    """
    check_alive(cache)
    held_by_numpy = isinstance(buffer_of(cache), np.ndarray)
    if cache.config.placement is not None and not held_by_numpy:  # it is where its config says
        return cache
    at_home = SingleDeviceSharding(default_device())  # of numpy arrays
    storage = {
        name: jax.device_put(leaf, host_sharding(getattr(leaf, "sharding", at_home)))
        for name, leaf in cache.storage.items()
    }
    beside = jax.tree.map(on_device, dataclasses.replace(cache, storage={}))
    return dataclasses.replace(beside, storage=storage)


@in_every_group_of_tokens
def prefetch(cache: KVCache) -> KVCache:
    """The cache on its device again, all of it: one made with `HostMemory` has no placement then.

    Returns at once; the copy is waited for when it is used.

    >>> import jaxkv
    >>> cache = jaxkv.offload(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)))
    >>> jaxkv.prefetch(cache).storage["data"].sharding.memory_kind
    'device'
    """
    check_alive(cache)
    cache = jax.tree.map(on_device, cache)  # what numpy holds
    storage = {name: to_device(leaf) for name, leaf in cache.storage.items()}
    config = cache.config.replace(placement=None)
    return dataclasses.replace(cache, storage=storage, config=config, resident=None)


def on_the_device(cache: KVCache) -> KVCache:
    """The tokens of a cache in host memory that its device holds too, as a cache of them alone."""
    resident = cache.resident
    assert resident is not None, "a cache whose placement keeps tokens on the device"
    index = resident.index(cache.lengths)
    return dataclasses.replace(cache, storage=resident.storage, index=index, resident=None)


@jax.jit
def bounds_of(cache: KVCache, bounds: Bounds, rows: Int[Array, " rows"]) -> Bounds:
    """Bounds in which those of some sequences are of the keys that the cache holds, as stored."""
    index, size = cache.index, min(bounds.block, cache.index.extent)
    layers, batch, blocks, *vector = bounds.lowest.shape
    chosen = jnp.isin(jnp.arange(batch), rows)[:, None]

    def with_block(iteration: Array, bounds: Bounds) -> Bounds:
        layer, block = jnp.divmod(iteration, blocks)
        start = jnp.minimum(block * bounds.block, index.extent - size)
        keys = cache.config.codec.rotate(read(cache, layer, start, size, jnp.float32)[0])
        positions = index.key_positions(layer, index.lengths, start, size).reshape(batch, size)
        inside = chosen & (positions // bounds.block == block)
        positions = jnp.where(inside, positions, -1)
        return bounds.extended(layer, keys.reshape(batch, size, *vector), positions)

    return lax.fori_loop(0, layers * blocks, with_block, bounds)


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
    run = needed_run(cache.index)
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
            rotated = cache.config.codec.rotate(keys.astype(jnp.float32))
            rotated = rotated.reshape(*rows, *keys.shape[-2:])
            bounds = resident.bounds.extended(layer, rotated, kept.reshape(rows))
            resident = dataclasses.replace(resident, bounds=bounds)
    return dataclasses.replace(cache, storage=storage, resident=resident)
