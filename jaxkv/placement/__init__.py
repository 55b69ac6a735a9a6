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
from jaxkv.placement.slots import read_slots, run_of, write_slots

__all__ = [
    "Bounds",
    "HostMemory",
    "Resident",
    "host_sharding",
    "in_host_memory",
    "read_slots",
    "run_of",
    "to_device",
    "to_host",
    "write_slots",
    "zeros_in_host_memory",
]
