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
from jaxkv.devices import Device


def parts_of(cache: KVCache) -> dict[Device, KVCache]:
    """What each device of this process holds, as a cache of its own. Nothing is copied."""
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
            number = 0 if context is None else place[names.index(context)]
            rank = jax.device_put(jnp.int32(number), device)
            parts[device] = local_cache(cache, leaves[device], rank)
    return parts


def joined(cache: KVCache, parts: Mapping[Device, KVCache]) -> KVCache:
    """The cache of other such parts, spread as this one is."""
    leaves = {
        device: jax.tree.leaves(dataclasses.replace(part, index=whole(part.index)))
        for device, part in parts.items()
    }
    together = [
        jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [leaves[device][number] for device in parts]
        )
        for number, leaf in enumerate(jax.tree.leaves(cache))
    ]
    return jax.tree.unflatten(jax.tree.structure(cache), together)
