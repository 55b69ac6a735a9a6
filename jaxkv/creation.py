"""Making a cache: every buffer preallocated and zero."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxkv.codecs import Leaves, container_dtype, leaf_specs
from jaxkv.config import KVCacheConfig
from jaxkv.errors import ConfigError
from jaxkv.hybrid import AnyCache, AnyConfig, HybridCache, HybridConfig
from jaxkv.kv_cache import OUT_OF_RANGE, KVCache
from jaxkv.placement import Resident, zeros_in_host_memory


def create(config: AnyConfig, *, device: Any = None) -> AnyCache:
    """An empty cache: every buffer preallocated and zero.

    Args:
      config: its shape; a `HybridConfig` gives a `HybridCache`.
      device: a `jax.Device` or `jax.sharding.Sharding` for the buffers; JAX's default if None.

    Raises:
      ConfigError: 2**30 or more positions, or slots times KV heads.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 16, 1, 4, codec=jaxkv.Dense("float32")))
    >>> cache.storage["data"].shape
    (2, 2, 16, 1, 4)
    """
    if isinstance(config, HybridConfig):
        groups = (_create(group, device) for group in config.groups)
        return HybridCache(tuple(groups), config)
    return _create(config, device)


def _check_numbers(config: KVCacheConfig) -> None:
    """Refuse more positions or places for a head's vector than int32 has numbers for."""
    context, places = config.max_context_length, config.num_slots * config.num_kv_heads
    if max(context, places) >= OUT_OF_RANGE:
        raise ConfigError(
            f"create: {context} tokens, and {config.num_slots} slots x {config.num_kv_heads} KV "
            "heads, must both be below 2**30, since they are numbered with int32. Use a smaller "
            "max_context_length or batch_size, or fewer num_pages."
        )


def _create(config: KVCacheConfig, device: Any) -> KVCache:
    _check_numbers(config)
    if config.in_host_memory and device is None:
        # All in one place that is named, for a step returns it so, and compiles once then.
        device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    platform = _platform(device)

    def buffers(num_slots: int, allocate: Any = jnp.zeros) -> Leaves:
        leaves = {}
        for name, (shape, dtype, sides) in leaf_specs(config.codec, config.head_dim).items():
            whole = (config.num_layers, sides, num_slots, config.num_kv_heads, *shape)
            leaves[name] = allocate(whole, container_dtype(dtype, platform), device=device)
        return leaves

    means = config.means_shape and jnp.zeros(config.means_shape, device=_without_ctx(device))
    index = config.addressing.init(config.max_context_length, config.batch_size)
    resident = None
    if config.num_resident_slots:
        resident = Resident.create(config, buffers(config.num_resident_slots))
    if isinstance(device, NamedSharding):  # on all of the mesh, as a step will return it
        index = jax.device_put(index, NamedSharding(device.mesh, PartitionSpec()))
    elif isinstance(device, jax.Device):
        index, resident = jax.device_put((index, resident), device)
    storage = buffers(
        config.num_slots, zeros_in_host_memory if config.in_host_memory else jnp.zeros
    )
    newest = None if config.newest_config is None else _create(config.newest_config, device)
    return KVCache(storage, index, config, means, resident, newest)


def _platform(device: Any) -> str:
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    if isinstance(device, jax.sharding.Sharding):
        device = next(iter(device.device_set))
    return jax.default_backend() if device is None else device.platform


def _without_ctx(device: Any) -> Any:
    """Where means go, whose axes are those of a buffer without its ctx axis."""
    if not isinstance(device, NamedSharding):
        return device
    axes = tuple(device.spec)
    return NamedSharding(device.mesh, PartitionSpec(*axes[:2], *axes[3:]))
