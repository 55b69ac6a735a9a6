"""Counting bytes by purpose and device, every array once. No device is asked anything here."""

import collections
import dataclasses
import enum
import itertools
import threading
import time
import weakref
from typing import Any, NamedTuple

import jax

from jaxkv.memory.device import Device

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


class Ledger:
    """Allocations held, their totals and peaks. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._opened = time.monotonic()
        self._allocations: dict[Allocation, None] = {}
        self._item_of_array: dict[int, _Item] = {}  # by id(), which a dead array may hand on
        # Keyed by (purpose, device), None for all of them.
        self._usage: dict[tuple[Purpose | None, Device | None], int] = collections.Counter()
        self._peak: dict[tuple[Purpose | None, Device | None], int] = collections.Counter()
        self._history: collections.deque[Event] = collections.deque(maxlen=MAX_HISTORY)

    def add(
        self, leaves: list[tuple[Any, BytesByDevice]], purpose: Purpose, name: str
    ) -> Allocation:
        with self._lock:
            items = tuple(dict.fromkeys(self._item(leaf, purpose, size) for leaf, size in leaves))
            total: collections.Counter[Device] = collections.Counter()
            before = self._usage[None, None]
            for item in items:
                total.update(item.bytes_by_device)
                item.holders += 1
                if item.holders == 1:
                    self._count(item, +1)
            allocation = Allocation(name, purpose, dict(total), items)
            self._allocations[allocation] = None
            self._record(allocation, before)
        return allocation

    def remove(self, allocation: Allocation) -> None:
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

    def usage(self, purpose: Purpose | None, device: Device | None) -> int:
        with self._lock:
            return self._usage[purpose, device]

    def peak(self, purpose: Purpose | None, device: Device | None) -> int:
        with self._lock:
            return self._peak[purpose, device]

    def devices(self) -> list[Device]:
        """Every device that ever held something, in their order."""
        with self._lock:
            seen = {device for _, device in self._peak if device is not None}
        return sorted(seen, key=lambda device: (device.platform, device.id))

    def allocations(self) -> tuple[Allocation, ...]:
        with self._lock:
            return tuple(self._allocations)

    def history(self) -> tuple[Event, ...]:
        with self._lock:
            return tuple(self._history)

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
