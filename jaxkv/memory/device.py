"""What memory a device really has, and who says so."""

import dataclasses
import math
import operator
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jaxkv.devices import Device, default_device
from jaxkv.memory.cards import parse_device
from jaxkv.memory.machine import process_bytes, tightest_bound
from jaxkv.show.text import format_bytes


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """A device's memory at one moment. Every number is in bytes, and None where it is unknown.

    Attributes:
      device: its name, such as ``cuda:0``.
      source: who says so: ``memory_stats`` (the device itself), ``physical memory``,
        ``cgroup limit`` or ``RLIMIT_AS`` (of this machine, where the device is its CPU),
        ``given`` (by the caller), or ``unknown``.
      limit_bytes: all there is.
      free_bytes: what could still be allocated.
      in_use_bytes: what is allocated: by the device's count, else the bytes of live arrays.
      peak_bytes: the most that was, by the device's count.
      process_bytes, process_peak_bytes: resident memory of this process, for a CPU.
    """

    device: str
    source: str
    limit_bytes: int | None = None
    free_bytes: int | None = None
    in_use_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    process_peak_bytes: int | None = None

    def describe_free(self) -> str:
        """For messages: ``412.0 MB free of 24.0 GB``."""
        if self.free_bytes is None or self.limit_bytes is None:
            return "free memory unknown"
        return f"{format_bytes(self.free_bytes)} free of {format_bytes(self.limit_bytes)}"

    def describe_use(self) -> str:
        """For reports: ``1.2 GB in use, 1.9 GB at peak, 24.0 GB in all (memory_stats)``."""
        named = ((self.in_use_bytes, "{} in use"), (self.peak_bytes, "{} at peak"))
        known = [words.format(format_bytes(size)) for size, words in named if size is not None]
        if self.limit_bytes is not None:
            known.append(f"{format_bytes(self.limit_bytes)} in all")
        return f"{', '.join(known)} ({self.source})"

    @property
    def in_use_source(self) -> str:
        """What counted `in_use_bytes`."""
        return self.source if self.source in ("memory_stats", "given") else "live arrays"


def device_memory(device: Device | int | str | None = None) -> DeviceMemory:
    """The memory of a device, as it says itself or else as its machine does.

    Args:
      device: a `jax.Device`, None for JAX's default one, or the size of a device that is
        not here: bytes, or text such as ``"24GB"``, ``"24GiB"`` or ``"H100"``.

    Raises:
      TypeError, ValueError: not a device or a size.

    >>> device_memory("24GB").describe_free()
    '24.0 GB free of 24.0 GB'
    """
    if device is None:
        device = default_device()
    if hasattr(device, "memory_stats"):
        return _of_device(device)
    size = _size(device)
    return DeviceMemory("given", "given", size, size, 0)


def memory_within(device: Device, limit: int | str | None) -> DeviceMemory:
    """What a device has, or what a limit on all live JAX arrays there leaves of it.

    Raises:
      TypeError, ValueError: the limit is no size.
    """
    memory = _of_device(device)
    if limit is None:
        return memory
    most, live = _size(limit), live_array_bytes(device)
    free = max(most - live, 0)
    if memory.free_bytes is not None:
        free = min(free, memory.free_bytes)
    return DeviceMemory(f"{device} with a limit", "given", most, free, live)


def live_array_bytes(device: Device) -> int:
    """Bytes of all live JAX arrays on a device, a buffer that two arrays share counted once.

    Shards taken out of a sharded array by hand count beside it.
    """
    buffers: dict[Any, int] = {}
    for array in jax.live_arrays(device.platform):
        size = bytes_by_device(array).get(device, 0)
        if size and not array.is_deleted():
            buffers[_buffer_key(array)] = size
    return sum(buffers.values())


def bytes_by_device(array: jax.Array) -> dict[Device, int]:
    """Bytes that each device of this process holds of an array, replicas included."""
    size: int = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return dict.fromkeys(array.sharding.addressable_devices, size)


def _buffer_key(array: jax.Array) -> Any:
    # Asking a sharded array for its pointers would make an array a shard, which are live too.
    if len(array.sharding.device_set) == 1:
        try:
            return array.unsafe_buffer_pointer()
        except (RuntimeError, NotImplementedError, ValueError):
            pass  # deleted by another thread since, or a backend without pointers
    return id(array), "no pointer"


def _of_device(device: Any) -> DeviceMemory:
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, JaxRuntimeError):
        stats = {}
    name = str(device)
    if not stats and device.platform == "cpu":
        bound, process = tightest_bound(), process_bytes()
        live = live_array_bytes(device)
        return DeviceMemory(
            name, bound.source, bound.limit_bytes, bound.free_bytes, live, None, *process
        )
    in_use, limit = stats.get("bytes_in_use"), stats.get("bytes_limit")
    if in_use is None:
        in_use = live_array_bytes(device)
    free = None if limit is None else max(limit - in_use, 0)
    source = "unknown" if limit is None else "memory_stats"
    return DeviceMemory(name, source, limit, free, in_use, stats.get("peak_bytes_in_use"))


def _size(device: Any) -> int:
    size = parse_device(device) if isinstance(device, str) else device
    try:
        size = None if isinstance(size, bool) else operator.index(size)
    except TypeError:
        size = None
    if size is None:
        raise TypeError(
            f"device must be a jax.Device, None, bytes, or a size such as '24GB', got {device!r}."
        )
    if size < 0:
        raise ValueError(f"A device's memory must be at least 0 bytes, got {size}.")
    return size
