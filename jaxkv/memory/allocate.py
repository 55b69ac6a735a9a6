"""Allocating a cache, or an error that says what would fit, with nothing left behind."""

import functools
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.create import config_of_a_device, create
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.devices import Device, default_device
from jaxkv.errors import CacheAllocationError
from jaxkv.memory.device import DeviceMemory, memory_within
from jaxkv.memory.plan import bytes_against, plan_within
from jaxkv.show.text import format_bytes

_Create = TypeVar("_Create", bound=Callable[..., AnyCache])


def allocate(
    config: AnyConfig,
    *,
    device: Device | None = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    limit: int | str | None = None,
) -> AnyCache:
    """`jaxkv.create`, refused before it touches memory when it cannot fit.

    Returns once the memory is really there.

    Args:
      config: the cache.
      device: where; JAX's default device if None.
      mesh, axes: the devices over which the cache is spread and how, as in `jaxkv.create`.
      limit: the most that all JAX arrays on a device may take, this cache included: bytes, or text
        such as ``"24GB"``. What the device has if None.

    Raises:
      CacheAllocationError: the cache does not fit, by plan or by XLA's own word. The message
        says what is free and what would fit; nothing stays allocated.
      TypeError, ValueError: not a device, or a limit that is no size.

    >>> import jaxkv
    >>> allocate(jaxkv.KVCacheConfig(2, 16, num_kv_heads=1, head_dim=4)).size_bytes
    512
    """
    if device is not None and not isinstance(device, jax.Device):
        raise TypeError(f"device must be a jax.Device or None, got {device!r}.")
    spread = Spread.of(mesh, axes)
    own = config_of_a_device(config, spread)
    memory = _fullest(device, spread, limit)
    if memory.free_bytes is not None and bytes_against(own, memory) > memory.free_bytes:
        raise CacheAllocationError(_explain(config, memory, spread))
    cache = None
    try:
        if spread is None:
            cache = create(config, device=device)
        else:
            cache = create(config, mesh=spread.mesh, axes=spread.axes)
        return jax.block_until_ready(cache)
    except (JaxRuntimeError, MemoryError) as error:
        free(cache)
        if not _is_out_of_memory(error):
            raise
        # The frames of the failed call hold the buffers that it got before it failed.
        traceback.clear_frames(error.__traceback__)
        memory = _fullest(device, spread, limit)
        raise CacheAllocationError(_explain(config, memory, spread)) from error


def _fullest(device: Device | None, spread: Spread | None, limit: int | str | None) -> DeviceMemory:
    """The memory of the device, or of that which has least free: each holds as much of a cache."""
    devices = [device or default_device()] if spread is None else spread.mesh.local_devices
    memories = [memory_within(each, limit) for each in devices]
    known = [memory for memory in memories if memory.free_bytes is not None]
    return min(known or memories, key=lambda memory: memory.free_bytes or 0)


def explained(create: _Create) -> _Create:
    """`create`, whose error says what would fit where the cache does not."""

    @functools.wraps(create)
    def made(
        config: AnyConfig,
        *,
        device: Any = None,
        mesh: Mesh | None = None,
        axes: Axes | None = None,
    ) -> AnyCache:
        try:
            return create(config, device=device, mesh=mesh, axes=axes)
        except (JaxRuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            spread = Spread.of(mesh, axes)
            where = device if isinstance(device, jax.Device) else None
            memory = _fullest(where, spread, None)
            raise CacheAllocationError(_explain(config, memory, spread)) from error

    return made  # type: ignore[return-value]


def free(tree: object) -> None:
    """Give the memory of every array in a pytree back now. Arrays already gone are fine."""
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_deleted():
            leaf.delete()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _explain(config: AnyConfig, memory: DeviceMemory, spread: Spread | None) -> str:
    plan = plan_within(config, memory, spread)
    each = f" on each of {plan.num_devices} devices" if plan.num_devices > 1 else ""
    failed = (
        f"Failed to allocate KV cache ({format_bytes(plan.needed_bytes)}{each}: "
        f"{config.describe()}) on {memory.device}: {memory.describe_free()}"
    )
    if plan.fits:
        return (
            f"{failed}, yet the allocator ran out: the free memory is in pieces, or another "
            "process took it. Free other arrays first, or ask for a smaller cache."
        )
    sequence = "" if config.batch_size is None else " a sequence"
    would_fit = []
    if tokens := plan.max_context_length:
        would_fit.append(f"{_tokens(tokens)}{sequence} would fit")
    if (smaller := plan.smaller_codec) and (tokens := smaller.max_context_length):
        words = tokens if would_fit else f"{_tokens(tokens)}{sequence} would fit"
        would_fit.append(f"{words} as {smaller.codec}")
    return f"{failed}; {', '.join(would_fit) or 'not even one token would fit'}."


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
