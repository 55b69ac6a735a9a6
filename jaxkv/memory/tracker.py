"""What holds device memory and for what purpose, beside what the devices themselves report."""

import collections
import dataclasses
import enum
import itertools
import json
import math
import threading
import time
import weakref
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkv.devices import Device, default_device
from jaxkv.memory.device import bytes_by_device, device_memory
from jaxkv.show.text import format_bytes, format_or_unknown, table

# Allocations that a report names; the rest it counts.
_NAMED = 10
_DEVICE_HEADERS = ("device", "tracked", "in use", "untracked", "peak", "limit", "counted by")


# Events kept for a plot: the newest. Totals and peaks do not depend on them.
MAX_HISTORY = 100_000

BytesByDevice = dict[Device, int]


class Purpose(enum.StrEnum):
    """What memory is for.

    >>> import jaxkv
    >>> jaxkv.Purpose("kv_cache") is jaxkv.Purpose.KV_CACHE
    True
    """

    KV_CACHE = "kv_cache"
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    OTHER = "other"


class Event(NamedTuple):
    """One change of the ledger: when (seconds since it was opened), and by how much."""

    seconds: float
    name: str
    purpose: Purpose
    change_bytes: int
    total_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """A receipt of `MemoryTracker.track`, to be given to `MemoryTracker.release`.

    Attributes:
      name: what reports call it.
      purpose: what it is for.
      bytes_by_device: its bytes on each device, whether or not another allocation counts them.
    """

    name: str
    purpose: Purpose
    bytes_by_device: BytesByDevice
    items: tuple["_Item", ...] = dataclasses.field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Its bytes on all devices together."""
        return sum(self.bytes_by_device.values())


@dataclasses.dataclass(eq=False)
class _Item:
    """An array, or a plain number of bytes: counted once however many allocations hold it."""

    purpose: Purpose
    bytes_by_device: BytesByDevice
    array: weakref.ref[jax.Array] | None = None
    array_id: int | None = None
    holders: int = 0


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

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened = time.monotonic()
        self._allocations: dict[Allocation, None] = {}
        self._item_of_array: dict[int, _Item] = {}  # by id(), which a dead array may hand on
        # Keyed by (purpose, device), None for all of them.
        self._usage: dict[tuple[Purpose | None, Device | None], int] = collections.Counter()
        self._peak: dict[tuple[Purpose | None, Device | None], int] = collections.Counter()
        self._history: collections.deque[Event] = collections.deque(maxlen=MAX_HISTORY)

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
        leaves = _sized(what, device)
        with self._lock:
            items = tuple(dict.fromkeys(self._item(leaf, purpose, size) for leaf, size in leaves))
            total: collections.Counter[Device] = collections.Counter()
            before = self._usage[None, None]
            for item in items:
                total.update(item.bytes_by_device)
                item.holders += 1
                if item.holders == 1:
                    self._count(item, +1)
            allocation = Allocation(name or purpose.value, purpose, dict(total), items)
            self._allocations[allocation] = None
            self._record(allocation, before)
        return allocation

    def release(self, allocation: Allocation) -> None:
        """Count it no longer. The memory itself is not touched.

        Raises:
          ValueError: released before, or tracked by another tracker.
        """
        with self._lock:
            if allocation not in self._allocations:
                raise ValueError(
                    f"The allocation {allocation.name!r} is not held by this tracker: it was "
                    "released before, or tracked by another. Release each receipt once."
                )
            del self._allocations[allocation]
            before = self._usage[None, None]
            for item in allocation.items:
                item.holders -= 1
                if item.holders == 0:
                    self._count(item, -1)
                    self._forget(item)
            self._record(allocation, before)

    def total_usage(
        self, purpose: Purpose | str | None = None, device: Device | None = None
    ) -> int:
        """Bytes held now, for one purpose or all, on one device or all."""
        with self._lock:
            return self._usage[_purpose_or_all(purpose), device]

    def peak_usage(self, purpose: Purpose | str | None = None, device: Device | None = None) -> int:
        """The most bytes that `total_usage` with the same arguments ever was."""
        with self._lock:
            return self._peak[_purpose_or_all(purpose), device]

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """All that is held, the oldest first."""
        with self._lock:
            return tuple(self._allocations)

    @property
    def history(self) -> tuple[Event, ...]:
        """Every change of the total (the newest 100,000), the oldest first; for a plot."""
        with self._lock:
            return tuple(self._history)

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
        if devices := self._devices():
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
                    for device in self._devices()
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

    def _devices(self) -> list[Device]:
        """Every device that ever held something, in their order."""
        with self._lock:
            seen = {device for _, device in self._peak if device is not None}
        return sorted(seen, key=lambda device: (device.platform, device.id))

    def _item(self, leaf: Any, purpose: Purpose, size: BytesByDevice) -> _Item:
        if not isinstance(leaf, jax.Array):
            return _Item(purpose, size)
        known = self._item_of_array.get(id(leaf))
        if known is not None and known.array is not None and known.array() is leaf:
            return known
        item = _Item(purpose, size, weakref.ref(leaf), id(leaf))
        self._item_of_array[id(leaf)] = item
        return item

    def _forget(self, item: _Item) -> None:
        # Another array may have got a dead one's id since.
        if item.array_id is not None and self._item_of_array.get(item.array_id) is item:
            del self._item_of_array[item.array_id]

    def _count(self, item: _Item, sign: int) -> None:
        for device, size in item.bytes_by_device.items():
            for key in itertools.product((item.purpose, None), (device, None)):
                self._usage[key] += sign * size
                self._peak[key] = max(self._peak[key], self._usage[key])

    def _record(self, allocation: Allocation, before: int) -> None:
        seconds, total = time.monotonic() - self._opened, self._usage[None, None]
        event = Event(seconds, allocation.name, allocation.purpose, total - before, total)
        self._history.append(event)

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
