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
from jaxkv.placement.scatter import scatter, scatter_tokens
from jaxkv.placement.slots import (
    copy_runs,
    needed_run,
    read_slots,
    take_slots,
    write_slots,
)

__all__ = [
    "Bounds",
    "HostMemory",
    "Resident",
    "copy_runs",
    "host_sharding",
    "in_host_memory",
    "needed_run",
    "read_slots",
    "scatter",
    "scatter_tokens",
    "take_slots",
    "to_device",
    "to_host",
    "write_slots",
    "zeros_in_host_memory",
]
