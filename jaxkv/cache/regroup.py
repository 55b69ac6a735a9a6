"""A cache from a mesh onto one device, and back: through the host's memory, bit for bit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.checks import check_alive, check_here
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import check_cross, shapes_of, specs_of
from jaxkv.cache.groups import in_every_kind
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.devices import default_device
from jaxkv.errors import ConfigError
from jaxkv.placement import host_sharding, in_host_memory
from jaxkv.programs import moves_data


@moves_data
@in_every_kind
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
    config = cache.config
    if not config.per_token:  # its arrays are whole as they are
        whole = dataclasses.replace(jax.device_get(cache), spread=None)
        return jax.device_put(whole, device)
    _check_pages(cache, spread)
    whole = _moved(cache, lambda leaf: _in_order(leaf, config, spread))
    once = _by_copies(whole, spread, _each_once)
    return _placed(_with_numbers(once, spread, 1), device)


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
    made: list[tuple[Sequence[Any], Callable[..., Any]]]
    made = [(cache.groups, _dealt_out), (cache.states, _as_it_is), (cache.cross, _dealt_out)]
    check_cross(cache.config, found)
    for each in (*cache.groups, *cache.states, *cache.cross):
        _check_spread(each, found)
    groups, states, cross = (
        [_on_mesh(each, make(each, found), found) for each in kinds] for kinds, make in made
    )
    return cache.with_groups(groups, states, cross)


def _check_spread(cache: Any, spread: Spread) -> None:
    check_alive(cache)
    if cache.spread is not None:
        raise ConfigError(f"spread: it is spread already, by {cache.spread.axes}; gather it first.")
    spread.local(cache.config)  # or an error that says what cannot be split


def _as_it_is(cache: Any, spread: Spread) -> Any:
    """State on the host: its arrays are of sequences and heads in their order."""
    return jax.device_get(cache)


def _dealt_out(cache: KVCache, spread: Spread) -> KVCache:
    """The arrays of all devices' parts, on the host."""
    config = cache.config
    _check_pages(cache, spread)
    if cache.index.pages is not None and cache.index.pages.shared and spread.size("batch") > 1:
        raise ConfigError(
            "spread: the pages of a shared pool are of no device. Give each part of the batch a "
            "pool of its own with jaxkv.create, or split it by heads alone."
        )
    dealt = _moved(cache, lambda leaf: _dealt(leaf, config, spread))
    copied = _by_copies(dealt, spread, lambda leaf, axis, copies: np.repeat(leaf, copies, axis))
    return _with_numbers(copied, spread, -1)


def _on_mesh(cache: Any, parts: Any, spread: Spread) -> Any:
    """The parts on their devices."""
    config = cache.config
    specs = specs_of(config, spread)
    leaves = [
        jax.make_array_from_callback(
            leaf.shape,
            host_sharding(sharding) if in_host_memory(old) else sharding,
            np.asarray(leaf).__getitem__,
        )
        for leaf, old, sharding in zip(
            jax.tree.leaves(parts),
            jax.tree.leaves(cache),
            (NamedSharding(spread.mesh, spec) for spec in specs),
            strict=True,
        )
    ]
    whole = jax.tree.unflatten(jax.tree.structure(shapes_of(config)), leaves)
    return dataclasses.replace(whole, spread=spread)


def _placed(cache: KVCache, device: Any) -> KVCache:
    """What the host holds, where its config says."""
    there = device
    if cache.config.in_host_memory:
        home = device or default_device()
        home = home if isinstance(home, Sharding) else SingleDeviceSharding(home)
        there = host_sharding(home)
    beside = jax.device_put(dataclasses.replace(cache, storage={}), device)
    return dataclasses.replace(beside, storage=jax.device_put(cache.storage, there))


def _by_copies(
    cache: KVCache, spread: Spread, change: Callable[[np.ndarray, int, int], np.ndarray]
) -> KVCache:
    """With this done along the axis of KV heads, where several devices have each, to each array."""
    once, held = shapes_of(cache.config), shapes_of(spread.held(cache.config))

    def changed(leaf: np.ndarray, own: Any, copied: Any) -> np.ndarray:
        for axis, (size, sizes) in enumerate(zip(own.shape, copied.shape, strict=True)):
            if sizes > size:
                leaf = change(np.asarray(leaf), axis, sizes // size)
        return leaf

    leaves = map(changed, *(jax.tree.leaves(tree) for tree in (cache, once, held)))
    return jax.tree.unflatten(jax.tree.structure(once), list(leaves))


def _each_once(leaf: np.ndarray, axis: int, copies: int) -> np.ndarray:
    return np.take(leaf, range(0, leaf.shape[axis], copies), axis)


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


def _check_pages(cache: KVCache, spread: Spread) -> None:
    config = cache.config
    index: Any = cache.index
    if index.per_head and index.run_lengths is not None and spread.mesh.size > 1:
        raise ConfigError(
            "heads of this compressed cache keep different numbers of tokens, packed on each device"
            " for itself. Gather it before jaxkv.compress, or keep one number of tokens per layer."
        )
    if config.addressing.page_size is not None and spread.size("context") > 1:
        raise ConfigError(
            "the pages of a cache that is split by context hold other tokens than pages of one "
            "device. Gather a contiguous one, or go on where it is."
        )


def _with_numbers(cache: KVCache, spread: Spread, sign: int) -> KVCache:
    """Pages, which each device counts from 0, counted over all devices; or the other way round."""
    index: Any = cache.index
    paged, parts = index.pages, spread.size("batch")
    if paged is None or parts == 1:
        return cache
    table, pages = paged.table, cache.config.num_slots // paged.page_size // parts
    rows = np.arange(len(table), dtype=np.int32)[:, None]
    first = rows // (len(table) // parts) * pages
    table = np.where(table < 0, table, table + np.int32(sign) * first)
    numbered = dataclasses.replace(paged, table=table)
    index = numbered if index is paged else dataclasses.replace(index, within=numbered)
    return dataclasses.replace(cache, index=index)
