"""Memory: what a cache needs, what a device has, who holds it, and for how long."""

from jaxkv.memory.allocate import allocate
from jaxkv.memory.device import DeviceMemory, device_memory
from jaxkv.memory.plan import CodecPlan, Plan, plan
from jaxkv.memory.session import Session, session
from jaxkv.memory.tracker import Allocation, Event, MemoryTracker, Purpose
from jaxkv.show.text import parse_bytes, parse_tokens

__all__ = [
    "Allocation",
    "CodecPlan",
    "DeviceMemory",
    "Event",
    "MemoryTracker",
    "Plan",
    "Purpose",
    "Session",
    "allocate",
    "device_memory",
    "parse_bytes",
    "parse_tokens",
    "plan",
    "session",
]
