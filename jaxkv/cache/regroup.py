"""A cache from a mesh onto one device, and back: through the host's memory, bit for bit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.checks import check_alive, check_here
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import shapes_of, specs_of
from jaxkv.cache.hybrid import AnyCache, in_every_group
from jaxkv.cache.kv_cache import KVCache
from jaxkv.errors import ConfigError
from jaxkv.programs import moves_data


@moves_data
@in_every_group
def gather(cache: KVCache, *, device: Any = None) -> KVCache:
    """A cache that is spread over a mesh, on one device: for verbs that want it whole, and files.

    Args:
      device: where; JAX's default device if None.

    Raises:
      ConfigError: pages of sequences that are split by context.
      ValueError: parts of it are in other processes.

    >>> import jax, jaxkv
    >>> mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> config = jaxkv.KVCacheConfig(1, 16, 1, 4)
    >>> cache = jaxkv.create(config, mesh=mesh, axes=jaxkv.Axes(heads="heads"))
    >>> jaxkv.gather(cache).spread is None
    True
    """
    check_alive(cache)
    if (spread := cache.spread) is None:
        return cache
    check_here(cache)
    config, copies = cache.config, spread.copies(cache.config)
    _check_pages(config, spread)
    whole = _moved(cache, lambda leaf: _in_order(leaf, config, spread)[:, :, :, ::copies])
    own = jax.tree.unflatten(jax.tree.structure(shapes_of(config)), jax.tree.leaves(whole))
    return jax.device_put(_with_numbers(own, spread, 1), device)


@moves_data
def spread(cache: AnyCache, *, mesh: Mesh | None = None, axes: Axes) -> AnyCache:
    """A cache of one device, spread over a mesh: one that was loaded or compressed, to go on there.

    Args:
      mesh, axes: as in `jaxkv.create`.

    Raises:
      ConfigError: what the axes cannot split, or a pool, whose pages have no device of their own.

    >>> import jax, jaxkv
    >>> mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4))
    >>> jaxkv.spread(cache, mesh=mesh, axes=jaxkv.Axes(heads="heads")).spread.axes
    Axes(batch=None, heads='heads', context=None)
    """
    found = Spread.of(mesh, axes)
    if found is None:
        return cache
    return cache.with_groups([_spread(group, found) for group in cache.groups])


def _spread(cache: KVCache, spread: Spread) -> KVCache:
    check_alive(cache)
    if cache.spread is not None:
        raise ConfigError(f"spread: it is spread already, by {cache.spread.axes}; gather it first.")
    config, copies = cache.config, spread.copies(cache.config)
    spread.local(config)  # or an error that says what cannot be split
    _check_pages(config, spread)
    if cache.index.pages is not None and cache.index.pages.shared and spread.size("batch") > 1:
        raise ConfigError(
            "spread: the pages of a shared pool are of no device. Give each part of the batch a "
            "pool of its own with jaxkv.create, or split it by heads alone."
        )
    parts = _moved(cache, lambda leaf: np.repeat(_dealt(leaf, config, spread), copies, axis=3))
    parts = _with_numbers(parts, spread, -1)
    specs = specs_of(config, spread)
    leaves = [
        jax.make_array_from_callback(
            leaf.shape, NamedSharding(spread.mesh, spec), np.asarray(leaf).__getitem__
        )
        for leaf, spec in zip(jax.tree.leaves(parts), specs, strict=True)
    ]
    whole = jax.tree.unflatten(jax.tree.structure(shapes_of(config)), leaves)
    return dataclasses.replace(whole, spread=spread)


def _moved(cache: KVCache, move: Callable[[np.ndarray], np.ndarray]) -> KVCache:
    """The cache on the host, with this done to each buffer, those of `Newest` tokens too."""
    cache = jax.device_get(cache)
    storage: Any = {name: move(np.asarray(leaf)) for name, leaf in cache.storage.items()}
    newest = None if cache.newest is None else _moved(cache.newest, move)
    return dataclasses.replace(cache, storage=storage, newest=newest)


def _in_order(leaf: np.ndarray, config: KVCacheConfig, spread: Spread) -> np.ndarray:
    """Slots of a buffer, by device, to where they are on one: position p was on p modulo them."""
    context = spread.size("context")
    if context == 1:  # the parts follow each other
        return leaf
    layers, sides, _, *vector = leaf.shape
    batch, rows = spread.size("batch"), (config.batch_size or 1) // spread.size("batch")
    parts = leaf.reshape(layers, sides, batch, context, rows, -1, *vector)
    return np.moveaxis(parts, 3, 5).reshape(leaf.shape)


def _dealt(leaf: np.ndarray, config: KVCacheConfig, spread: Spread) -> np.ndarray:
    """The other way round."""
    context = spread.size("context")
    if context == 1:
        return leaf
    layers, sides, _, *vector = leaf.shape
    batch, rows = spread.size("batch"), (config.batch_size or 1) // spread.size("batch")
    parts = leaf.reshape(layers, sides, batch, rows, -1, context, *vector)
    return np.moveaxis(parts, 5, 3).reshape(leaf.shape)


def _check_pages(config: KVCacheConfig, spread: Spread) -> None:
    if config.addressing.page_size is not None and spread.size("context") > 1:
        raise ConfigError(
            "the pages of a cache that is split by context hold other tokens than pages of one "
            "device. Gather a contiguous one, or go on where it is."
        )


def _with_numbers(cache: KVCache, spread: Spread, sign: int) -> KVCache:
    """Pages, which each device counts from 0, counted over all devices; or the other way round."""
    paged, parts = cache.pages, spread.size("batch")
    if paged is None or parts == 1:
        return cache
    table, pages = paged.table, cache.config.num_slots // paged.page_size // parts
    rows = np.arange(len(table), dtype=np.int32)[:, None]
    first = rows // (len(table) // parts) * pages
    table = np.where(table < 0, table, table + np.int32(sign) * first)
    index: Any = cache.index
    return dataclasses.replace(cache, index=dataclasses.replace(index, table=table))
