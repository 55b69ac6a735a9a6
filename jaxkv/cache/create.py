"""Making a cache: every buffer preallocated and zero."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import AnyCache, AnyConfig, HybridCache, HybridConfig
from jaxkv.cache.kv_cache import OUT_OF_RANGE, KVCache
from jaxkv.cache.state import StateCache, StateConfig
from jaxkv.codecs import Leaves, container_dtype
from jaxkv.devices import default_device
from jaxkv.errors import ConfigError
from jaxkv.native import prefer_large_pages
from jaxkv.placement import Resident, zeros_in_host_memory
from jaxkv.programs import moves_data

_AXES = ("layers", "2", "slots", "kv_heads", "head_dim")  # of a buffer


@overload
def create(
    config: KVCacheConfig, *, device: Any = None, mesh: Mesh | None = None, axes: Axes | None = None
) -> KVCache: ...
@overload
def create(
    config: HybridConfig, *, device: Any = None, mesh: Mesh | None = None, axes: Axes | None = None
) -> HybridCache: ...
@overload
def create(
    config: AnyConfig, *, device: Any = None, mesh: Mesh | None = None, axes: Axes | None = None
) -> AnyCache: ...
@moves_data  # zeros, of which the host has one
def create(
    config: AnyConfig, *, device: Any = None, mesh: Mesh | None = None, axes: Axes | None = None
) -> AnyCache:
    """An empty cache: every buffer preallocated and zero.

    Args:
      config: its shape.
      device: a `jax.Device` or `jax.sharding.Sharding` for the buffers; JAX's default if None.
        A `NamedSharding` is of the axes ``[layers, 2, slots, kv_heads, head_dim]``; a buffer
        without the last ones, as scales are, is sharded by those that it has.
      mesh: over whose devices it is spread, as ``axes`` says; the one of `jax.set_mesh` if None.
      axes: the mesh axes that split it. The verbs then work on each device, on what it holds.

    Returns:
      A `KVCache`, or a `HybridCache` for a `HybridConfig`.

    Raises:
      CacheAllocationError: it does not fit; the message says what would.
      ConfigError: 2**30 or more positions, or slots times KV heads; or what the axes cannot split.
      ValueError: a sharding of more axes than that, or both a device and axes.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 16, 1, 4, codec=jaxkv.Dense("float32")))
    >>> cache.storage["data"].shape
    (2, 2, 16, 1, 4)
    """
    _check_axes(device)
    spread = Spread.of(mesh, axes)
    if spread is not None and device is not None:
        raise ValueError(f"create: give device= or axes=, not both; got {device} and {axes}.")

    def made(group: Any) -> Any:
        if spread is not None:
            return _create_spread(group, spread)
        # All in one place that is named, for a step returns it so, and compiles once then.
        named = default_device() if group.in_host_memory and device is None else device
        return _create(group, named)

    if not isinstance(config, HybridConfig):
        cache: KVCache = made(config)
        return cache
    check_cross(config, spread)
    kinds = (config.groups, config.states, config.cross)
    groups, states, cross = (tuple(map(made, each)) for each in kinds)
    return HybridCache(groups, config, states, cross)


def config_of_a_device(config: AnyConfig, spread: Spread | None) -> AnyConfig:
    """What one device holds of a cache that is spread over several.

    Raises:
      ConfigError: what the axes cannot split.
    """
    if spread is None:
        return config
    groups = tuple(spread.local(group) for group in config.groups)
    if not isinstance(config, HybridConfig):
        return groups[0]
    check_cross(config, spread)
    states = tuple(spread.local(each) for each in config.states)
    cross = tuple(spread.local(each) for each in config.cross)
    return dataclasses.replace(config, groups=groups, states=states, cross=cross)


def check_cross(config: AnyConfig, spread: Spread | None) -> None:
    """Refuse to split an encoder's tokens: a step of the text would have to ask every part.

    Raises:
      ConfigError: cross-attention, and axes that split the context.
    """
    if config.cross and spread is not None and spread.size("context") > 1:
        raise ConfigError(
            "axes: what cross-attention reads is not split by context. Leave context out of its "
            "axes; batch and heads split it."
        )


@functools.lru_cache(maxsize=256)
def shapes_of(config: KVCacheConfig) -> KVCache:
    """The cache of a config, or state of one, of shapes in place of arrays."""
    return jax.eval_shape(lambda: _create(config, None, host_zeros=jnp.zeros))


@functools.lru_cache(maxsize=256)
def specs_of(config: KVCacheConfig, spread: Spread) -> tuple[PartitionSpec, ...]:
    """How each array of a cache is split: where an axis is shorter once the cache is split."""
    whole = jax.tree.leaves(shapes_of(spread.held(config)))
    names: list[list[list[str]]] = [[[] for _ in leaf.shape] for leaf in whole]
    for what in ("batch", "heads", "context"):
        if (name := getattr(spread.axes, what)) is None:
            continue
        parts = jax.tree.leaves(shapes_of(spread.local(config, what)))
        for of_leaf, leaf, part in zip(names, whole, parts, strict=True):
            for of_axis, size, own in zip(of_leaf, leaf.shape, part.shape, strict=True):
                if own < size:
                    of_axis.append(name)
    return tuple(PartitionSpec(*(tuple(axis) or None for axis in leaf)) for leaf in names)


def _create_spread(config: KVCacheConfig, spread: Spread) -> KVCache:
    local = spread.local(config)
    if local.per_token:
        _check_numbers(local)
    specs: Any = jax.tree.unflatten(jax.tree.structure(shapes_of(config)), specs_of(config, spread))
    storage = _in_host_memory(config, spread, specs.storage) if config.in_host_memory else {}
    elsewhere = dataclasses.replace(
        specs, storage={name: spec for name, spec in specs.storage.items() if name not in storage}
    )

    def own() -> Any:
        made = _create(local, None, host_zeros=lambda *_, device: None)
        return jax.tree.unflatten(jax.tree.structure(elsewhere), jax.tree.leaves(made))

    made = jax.shard_map(own, mesh=spread.mesh, in_specs=(), out_specs=elsewhere, check_vma=False)
    cache: KVCache = jax.jit(made)()
    return dataclasses.replace(cache, storage=cache.storage | storage, spread=spread)


def _in_host_memory(
    config: KVCacheConfig, spread: Spread, specs: dict[str, PartitionSpec]
) -> Leaves:
    """The buffers of a cache that has them there: on each device's host, those of its part."""
    whole = shapes_of(spread.held(config)).storage
    return {
        name: zeros_in_host_memory(
            whole[name].shape, whole[name].dtype, NamedSharding(spread.mesh, spec)
        )
        for name, spec in specs.items()
    }


def _check_numbers(config: KVCacheConfig) -> None:
    """Refuse more positions or places for a head's vector than int32 has numbers for."""
    context, places = config.max_context_length, config.num_slots * config.num_kv_heads
    if max(context, places) >= OUT_OF_RANGE:
        raise ConfigError(
            f"create: {context} tokens, and {config.num_slots} slots x {config.num_kv_heads} KV "
            "heads, must both be below 2**30, since they are numbered with int32. Use a smaller "
            "max_context_length or batch_size, or fewer num_pages."
        )


def _create(config: Any, device: Any, host_zeros: Callable[..., Any] = zeros_in_host_memory) -> Any:
    if config.per_token:
        return _create_tokens(config, device, host_zeros)
    return _create_state(config, device)


def _create_tokens(config: KVCacheConfig, device: Any, host_zeros: Callable[..., Any]) -> KVCache:
    _check_numbers(config)
    platform = _platform(device)

    def buffers(num_slots: int, allocate: Any = jnp.zeros) -> Leaves:
        leaves = {}
        for name, (shape, dtype, sides) in config.pair.leaves.items():
            whole = (config.num_layers, sides, num_slots, config.num_kv_heads, *shape)
            where = _of_axes(device, range(len(whole)))
            leaves[name] = allocate(whole, container_dtype(dtype, platform), device=where)
        return leaves

    of_state = _of_axes(device, (0, 1, 3, 4))  # all but the slots
    codec_state = {
        name: jnp.zeros(shape, dtype, device=of_state)
        for name, (shape, dtype) in config.codec_state.items()
    }
    index = config.addressing.init(config.max_context_length, config.batch_size)
    resident = None
    if config.num_resident_slots:
        resident = Resident.create(config, buffers(config.num_resident_slots))
    if isinstance(device, NamedSharding):  # on all of the mesh, as a step will return it
        index = jax.device_put(index, NamedSharding(device.mesh, PartitionSpec()))
    elif isinstance(device, jax.Device):
        index, resident = jax.device_put((index, resident), device)
    storage = buffers(config.num_slots, host_zeros if config.in_host_memory else jnp.zeros)
    if not config.in_host_memory:
        prefer_large_pages(storage)
    newest = None if config.newest_config is None else _create(config.newest_config, device)
    return KVCache(storage, index, config, codec_state, resident, newest)


def _create_state(config: StateConfig, device: Any) -> StateCache:
    if isinstance(device, NamedSharding):  # on all of the mesh: its axes are not those of a buffer
        device = NamedSharding(device.mesh, PartitionSpec())
    return StateCache.create(config, device)


def _platform(device: Any) -> str:
    if isinstance(device, str):
        return device
    if isinstance(device, jax.sharding.Sharding):
        device = next(iter(device.device_set))
    return (device or default_device()).platform


def _check_axes(device: Any) -> None:
    if isinstance(device, NamedSharding) and len(device.spec) > len(_AXES):
        raise ValueError(
            f"device: {device.spec} is of {len(device.spec)} axes, and a cache's buffers have "
            f"{len(_AXES)}: [{', '.join(_AXES)}]."
        )


def _of_axes(device: Any, axes: Sequence[int]) -> Any:
    """The same placement for an array that has only these axes of a buffer."""
    if not isinstance(device, NamedSharding):
        return device
    spec = [device.spec[axis] for axis in axes if axis < len(device.spec)]
    return device.update(spec=PartitionSpec(*spec))
