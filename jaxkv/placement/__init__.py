"""Where a cache's buffers live: on the device, or in host memory with the newest tokens beside."""

from jaxkv.placement.host_memory import (
    HostMemory,
    host_sharding,
    in_host_memory,
    to_device,
    to_host,
    zeros_in_host_memory,
)
from jaxkv.placement.resident import Bounds, Resident

__all__ = [
    "Bounds",
    "HostMemory",
    "Resident",
    "host_sharding",
    "in_host_memory",
    "to_device",
    "to_host",
    "zeros_in_host_memory",
]
