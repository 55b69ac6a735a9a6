"""Buffers in host memory, and how arrays get there and back."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxkv.addressing import Addressing
from jaxkv.counts import ceil_div, check_fields

# Memory that a device can copy from and to by itself comes first.
_HOST_KINDS = ("pinned_host", "unpinned_host")


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """All tokens in host memory; the newest of them, and a ring's first, on the device too.

    `jaxkv.attend` brings older blocks to the device one at a time, the next while it works on
    one, and so needs the memory of two blocks of one layer, whatever the context. The time is
    that of moving all bytes of the older tokens once a step, unless ``blocks_per_query`` says to
    fetch only those that matter most. A cache whose slots would all be resident is on the device
    alone: in a hybrid cache the rings of layers with short windows, while full layers stream.

    Works with `Contiguous`, `Paged` and `Ring`. Pages travel one by one: of 256 tokens and more
    nearly as fast as runs. A pool of shared pages has no resident tokens.

    Args:
      resident: newest tokens of each sequence that stay on the device as well.
      block: tokens that travel together.
      blocks_per_query: None, or how many older blocks an `attend` fetches: those whose keys
        could have the largest product with a query, by the bounds of Quest (Tang et al., 2024,
        section 3.3), which stay on the device. `jaxkv.fetched_blocks` says which.

    Raises:
      ValueError: a number that is not one of tokens or blocks.

    >>> import jaxkv
    >>> config = jaxkv.KVCacheConfig(
    ...     32, 1_000_000, num_kv_heads=8, head_dim=128, placement=jaxkv.HostMemory(resident=4096)
    ... )
    >>> config.host_bytes, config.device_bytes
    (131072000000, 536870920)
    """

    resident: int = 4096
    block: int = 1024
    blocks_per_query: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "resident", "block", optional=("blocks_per_query",))

    def num_blocks(self, max_context_length: int) -> int:
        """Blocks of one sequence, the last of them maybe not whole."""
        return ceil_div(max_context_length, self.block)

    def reason_against(self, addressing: Addressing) -> str | None:
        """Why a cache of this addressing cannot be created so, or None."""
        if addressing.per_head:
            return (
                "a compressed cache cannot have a placement in host memory, for its newest tokens "
                "stand in no ring; create it without one and jaxkv.offload the result, got "
                f"{addressing!r}"
            )
        stay = addressing.by_position and addressing.num_pages is None
        if self.blocks_per_query is None or stay:
            return None
        return (
            "blocks_per_query needs blocks that stay what they are, of a contiguous cache or of "
            f"pages that sequences own, got {addressing!r}"
        )


def in_host_memory(array: Any) -> bool:
    """Whether an array (traced or not) lives there rather than on the device.

    On a CPU, too, where it makes no difference to anything but the type.
    """
    if not isinstance(array, jax.Array):
        return getattr(getattr(array, "sharding", None), "memory_kind", None) in _HOST_KINDS
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_host(array: Array) -> Array:
    """A copy in host memory; inside jit too."""
    return jax.device_put(array, jax.memory.Space.Host)


def to_device(array: Array) -> Array:
    """The array on its device: a copy if it was not there. Inside jit too."""
    return jax.device_put(array, jax.memory.Space.Device) if in_host_memory(array) else array


def zeros_in_host_memory(shape: tuple[int, ...], dtype: Any, device: Any) -> Array:
    """As `jnp.zeros`, in the host memory of a device or a sharding."""
    sharding = device if isinstance(device, Sharding) else SingleDeviceSharding(device)
    placed = host_sharding(sharding)
    part = np.zeros(placed.shard_shape(shape), dtype)
    if len(placed.device_set) == 1:
        return jax.device_put(part, placed)
    parts = [  # other processes make theirs
        jax.device_put(part, SingleDeviceSharding(each, memory_kind=placed.memory_kind))
        for each in placed.addressable_devices
    ]
    return jax.make_array_from_single_device_arrays(shape, placed, parts)


def host_sharding(sharding: Sharding) -> Sharding:
    """The same devices' host memory.

    Raises:
      ValueError: the backend has none that JAX knows of.
    """
    device: Any = next(iter(sharding.addressable_devices))
    kinds = [memory.kind for memory in device.addressable_memories()]
    for kind in _HOST_KINDS:
        if kind in kinds:
            return sharding.with_memory_kind(kind)
    raise ValueError(f"{device} offers no host memory to JAX, only {', '.join(kinds)}.")
