"""A cache that is spread over a mesh as the caches of this process's devices, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.addressing.interleaved import Interleaved, whole
from jaxkv.cache.axes import Spread
from jaxkv.cache.create import shapes_of
from jaxkv.cache.kv_cache import KVCache
from jaxkv.devices import Device, default_device
from jaxkv.snapshot.split import Share, shares_of


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
    structure: Any = jax.tree.structure(shapes_of(spread.local(cache.config)))
    _, shares = shares_of(spread, cache.config)
    return {
        device: _with_index_on(_numbered(structure.unflatten(own), spread, shares[device]))
        for device, own in leaves.items()
    }


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


def _numbered(cache: KVCache, spread: Spread, share: Share) -> KVCache:
    """With an index that knows which of the positions are its own."""
    axis = spread.axes.context
    if axis is None:
        return cache
    index = Interleaved(cache.index, jnp.int32(share.context), axis, spread.size("context"))
    return dataclasses.replace(cache, index=index)


def _with_index_on(cache: KVCache, device: Device | None = None) -> KVCache:
    device = device or default_device()
    newest = None if cache.newest is None else _with_index_on(cache.newest, device)
    index = jax.device_put(cache.index, device)
    return dataclasses.replace(cache, index=index, newest=newest)


def _as_stored(cache: KVCache) -> KVCache:
    return dataclasses.replace(cache, index=whole(cache.index))
