"""Who holds device memory and for what, held against what the devices say themselves."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np

from jaxkv.memory.device import Device, bytes_by_device, default_device, device_memory
from jaxkv.memory.ledger import Allocation, BytesByDevice, Event, Ledger, Purpose
from jaxkv.memory.text import format_or_unknown, table
from jaxkv.text import format_bytes

# Allocations that a report names; the rest it counts.
_NAMED = 10
_DEVICE_HEADERS = ("device", "tracked", "in use", "untracked", "peak", "limit", "counted by")


class MemoryTracker:
    """A ledger of memory by purpose and device. Thread-safe: any method, from any thread.

    It counts what it is told with `track` until it is told `release`. It keeps no array
    alive, and does not watch arrays die. The same `jax.Array` object tracked twice counts
    once, under the purpose that it was tracked with first, until its last release. Two
    objects that share one buffer (as after a `jax.device_put` to where it was) count twice
    in the ledger; `report` holds it against the devices, which know better.

    >>> import jaxkv.memory
    >>> tracker = jaxkv.memory.MemoryTracker()
    >>> weights = tracker.track(1_000_000, purpose="weights")
    >>> tracker.total_usage(), tracker.total_usage("kv_cache")
    (1000000, 0)
    >>> tracker.release(weights)
    >>> tracker.total_usage(), tracker.peak_usage()
    (0, 1000000)
    """

    def __init__(self):
        self._ledger = Ledger()

    def track(
        self,
        what: Any,
        *,
        purpose: Purpose | str = Purpose.OTHER,
        name: str | None = None,
        device: Device | None = None,
    ) -> Allocation:
        """Count memory from now on.

        Args:
          what: a pytree of arrays (a cache, the weights of a model), or a number of bytes. A
            `jax.Array` counts on each device that holds a shard of it, or a replica.
          purpose: what it is for, as a `Purpose` or its value.
          name: what reports call it; the purpose if None.
          device: where a number of bytes counts, and arrays without a device, such as a
            `jax.ShapeDtypeStruct`. JAX's default device if None.

        Returns:
          A receipt for `release`.

        Raises:
          ValueError: an unknown purpose, a negative number, or an array that was deleted.
        """
        purpose = _purpose(purpose)
        return self._ledger.add(_sized(what, device), purpose, name or purpose.value)

    def release(self, allocation: Allocation) -> None:
        """Count it no longer. The memory itself is not touched.

        Raises:
          ValueError: released before, or tracked by another tracker.
        """
        self._ledger.remove(allocation)

    def total_usage(
        self, purpose: Purpose | str | None = None, device: Device | None = None
    ) -> int:
        """Bytes held now, for one purpose or all, on one device or all."""
        return self._ledger.usage(_purpose_or_all(purpose), device)

    def peak_usage(self, purpose: Purpose | str | None = None, device: Device | None = None) -> int:
        """The most bytes that `total_usage` with the same arguments ever was."""
        return self._ledger.peak(_purpose_or_all(purpose), device)

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """All that is held, the oldest first."""
        return self._ledger.allocations()

    @property
    def history(self) -> tuple[Event, ...]:
        """Every change of the total (the newest 100,000), the oldest first; for a plot."""
        return self._ledger.history()

    def report(self) -> str:
        """Tables: the ledger by purpose, against each device's own count, and what is held.

        What is untracked on a device was never told to this tracker, or, where negative, is
        gone from the device and was not released here.
        """
        purposes = [purpose for purpose in Purpose if self.peak_usage(purpose)]
        by_purpose = [
            [name, format_bytes(self.total_usage(purpose)), format_bytes(self.peak_usage(purpose))]
            for name, purpose in [(str(purpose), purpose) for purpose in purposes]
            + [("total", None)]
        ]
        tables = [table(("purpose", "held", "peak"), by_purpose)]
        if devices := self._ledger.devices():
            tables.append(table(_DEVICE_HEADERS, [self._device_row(each) for each in devices]))
        if held := self.allocations:
            tables.append(_largest(held))
        return "\n\n".join(tables)

    def to_json(self) -> str:
        """The ledger, the devices' own counts and the history, as a JSON object."""
        return json.dumps(
            {
                "total_bytes": self.total_usage(),
                "peak_bytes": self.peak_usage(),
                "purposes": {
                    str(purpose): {
                        "total_bytes": self.total_usage(purpose),
                        "peak_bytes": self.peak_usage(purpose),
                    }
                    for purpose in Purpose
                },
                "devices": [
                    {
                        "tracked_bytes": self.total_usage(device=device),
                        **dataclasses.asdict(device_memory(device)),
                    }
                    for device in self._ledger.devices()
                ],
                "allocations": [
                    {
                        "name": allocation.name,
                        "purpose": allocation.purpose,
                        "bytes_by_device": {
                            str(device): size for device, size in allocation.bytes_by_device.items()
                        },
                    }
                    for allocation in self.allocations
                ],
                "history": [event._asdict() for event in self.history],
            },
            indent=2,
        )

    def _device_row(self, device: Device) -> list[str]:
        memory, tracked = device_memory(device), self.total_usage(device=device)
        in_use = memory.in_use_bytes
        return [
            memory.device,
            format_bytes(tracked),
            format_or_unknown(in_use),
            format_or_unknown(None if in_use is None else in_use - tracked),
            format_or_unknown(memory.peak_bytes),
            format_or_unknown(memory.limit_bytes),
            memory.in_use_source,
        ]


def _purpose(purpose: Purpose | str) -> Purpose:
    try:
        return Purpose(purpose)
    except ValueError:
        allowed = ", ".join(Purpose)
        raise ValueError(f"purpose must be one of {allowed}, got {purpose!r}.") from None


def _purpose_or_all(purpose: Purpose | str | None) -> Purpose | None:
    return None if purpose is None else _purpose(purpose)


def _sized(what: Any, device: Device | None) -> list[tuple[Any, BytesByDevice]]:
    """Each thing to count, with its bytes. Python numbers inside a pytree hold no device memory."""
    if not isinstance(what, int | np.integer):
        leaves = [leaf for leaf in jax.tree.leaves(what) if hasattr(leaf, "dtype")]
        return [(leaf, _bytes_by_device(leaf, device)) for leaf in leaves]
    if what < 0:
        raise ValueError(f"Cannot track a negative number of bytes, got {what}.")
    return [(what, {device or default_device(): int(what)})]


def _bytes_by_device(leaf: Any, device: Device | None) -> BytesByDevice:
    if not isinstance(leaf, jax.Array):
        return {device or default_device(): math.prod(leaf.shape) * leaf.dtype.itemsize}
    if leaf.is_deleted():
        raise ValueError(
            "Cannot track an array that was donated or deleted: it holds no memory. Track the "
            "result of the function that it was donated to."
        )
    return bytes_by_device(leaf)


def _largest(allocations: tuple[Allocation, ...]) -> str:
    largest = sorted(allocations, key=lambda allocation: -allocation.size_bytes)[:_NAMED]
    rows = [
        [each.name, str(each.purpose), format_bytes(each.size_bytes), _devices(each)]
        for each in largest
    ]
    lines = table(("held", "purpose", "bytes", "on"), rows)
    others = len(allocations) - len(largest)
    return lines + (f"\nand {others} smaller" if others else "")


def _devices(allocation: Allocation) -> str:
    names = [str(device) for device in allocation.bytes_by_device]
    return names[0] if len(names) == 1 else f"{len(names)} devices"
