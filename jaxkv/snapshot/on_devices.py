"""A cache that is spread over a mesh as the caches of this process's devices, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.addressing.interleaved import whole
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import local_cache
from jaxkv.devices import Device, default_device


def parts_of(cache: KVCache) -> dict[Device, KVCache]:
    """What each device of this process holds, as a cache of its own. No buffer is copied.

    All their indices are on one device, whose small programs serve all.
    """
    spread = cache.spread
    assert spread is not None
    leaves: dict[Device, list[Any]] = {}
    for leaf in jax.tree.leaves(cache):
        for shard in leaf.addressable_shards:
            leaves.setdefault(shard.device, []).append(shard.data)
    names, context = spread.mesh.axis_names, spread.axes.context
    parts = {}
    for place, device in np.ndenumerate(spread.mesh.devices):
        if device in leaves:
            rank = 0 if context is None else place[names.index(context)]
            part = local_cache(cache, leaves[device], jnp.int32(rank))
            parts[device] = _with_index_on(part, default_device())
    return parts


def joined(cache: KVCache, parts: Mapping[Device, KVCache]) -> KVCache:
    """The cache of other such parts, spread as this one is."""
    leaves = {
        device: jax.tree.leaves(_with_index_on(_as_stored(part), device))
        for device, part in parts.items()
    }
    together = [
        jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [leaves[device][number] for device in parts]
        )
        for number, leaf in enumerate(jax.tree.leaves(cache))
    ]
    return jax.tree.unflatten(jax.tree.structure(cache), together)


def _with_index_on(cache: KVCache, device: Device) -> KVCache:
    newest = None if cache.newest is None else _with_index_on(cache.newest, device)
    index = jax.device_put(cache.index, device)
    return dataclasses.replace(cache, index=index, newest=newest)


def _as_stored(cache: KVCache) -> KVCache:
    return dataclasses.replace(cache, index=whole(cache.index))
