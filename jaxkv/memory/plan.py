"""Will it fit, and what would: answered before any memory is touched."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxkv.cache.axes import Axes, Spread, words_of_copies
from jaxkv.cache.create import config_of_a_device
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.codecs import CODECS, Codec
from jaxkv.devices import Device
from jaxkv.errors import ConfigError
from jaxkv.memory.device import DeviceMemory, bytes_by_device, device_memory
from jaxkv.placement import HostMemory
from jaxkv.show.text import format_bytes, pairs, table

# Positions and lengths are int32: no sequence is longer, whatever the memory.
MAX_COUNT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class CodecPlan:
    """A row of `Plan.codecs`: the same cache, stored by another codec. Fields as in `Plan`."""

    codec: str
    needed_bytes: int
    fits: bool
    max_context_length: int | None
    max_batch_size: int | None


@dataclasses.dataclass(frozen=True)
class StreamedPlan:
    """The same cache in host memory: exact bytes there and on the device, and whether these fit."""

    device_bytes: int
    host_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. ``print`` shows it as a table.

    Attributes:
      config: the cache that was asked about.
      memory: the device's memory that it was held against, and who reported it.
      needed_bytes: exact bytes of the cache: keys, values, scales, lengths and tables.
      fits: whether that is free. True where free memory is unknown.
      max_context_length: the largest that would fit, all else as in the config; 0 if not
        even one token does, None where free memory is unknown.
      max_batch_size: likewise the most sequences.
      codecs: the same for every codec in `jaxkv.codecs.CODECS`.
      host_bytes: how many of ``needed_bytes`` are in host memory, see `HostMemory`. They count
        against the device only where it is a CPU, whose memory that is.
      num_devices: over which the cache is spread; bytes are those of each, tokens and sequences of
        all together.
      head_copies: devices that hold the same KV head, where there are more devices than heads.
      copied_bytes: how many of ``needed_bytes`` would not be there without such copies.
      weights_bytes: bytes of the weights beside the cache, as given.
      streamed: the same cache with `HostMemory` as its placement; None where it has that
        already or cannot have it.

    >>> import jaxkv
    >>> answer = jaxkv.plan(jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128), "1GB")
    >>> answer.fits, answer.max_context_length
    (False, 7629)
    >>> [row.codec for row in answer.codecs if row.fits][0]
    'int8'
    """

    config: AnyConfig
    memory: DeviceMemory
    needed_bytes: int
    fits: bool
    max_context_length: int | None
    max_batch_size: int | None
    codecs: tuple[CodecPlan, ...]
    host_bytes: int = 0
    streamed: StreamedPlan | None = None
    num_devices: int = 1
    head_copies: int = 1
    copied_bytes: int = 0
    weights_bytes: int = 0

    @property
    def smaller_codec(self) -> CodecPlan | None:
        """The row of the smallest codec, if it is smaller than the config's."""
        smallest = min(self.codecs, key=lambda row: row.needed_bytes)
        return smallest if smallest.needed_bytes < self.needed_bytes else None

    def to_json(self) -> str:
        """All of it as a JSON object, the config as its fields with the codec by name."""
        return json.dumps({**dataclasses.asdict(self), "config": self.config.to_dict()}, indent=2)

    def __str__(self) -> str:
        facts = [
            ("KV cache", self.config.describe()),
            ("needs", f"{format_bytes(self.needed_bytes)} ({self.needed_bytes:,} bytes)"),
            *self._beside(),
            ("device", self._device()),
            ("fits", self._verdict()),
            ("at most", self._at_most()),
        ]
        if self.num_devices > 1:
            spread = f"{self.num_devices} devices; bytes are those of each"
            facts.insert(0, ("spread over", spread))
        if self.streamed is not None and self.streamed.fits and not self.fits:
            facts.append(("streamed", self._streamed(self.streamed)))
        headers = ("codec", "bytes", "fits", "max context", "max batch")
        return f"{pairs(facts)}\n\n{table(headers, [self._row(row) for row in self.codecs])}"

    def _device(self) -> str:
        memory = self.memory
        if memory.source == "given":
            return f"{format_bytes(memory.limit_bytes or 0)}, as given"
        return f"{memory.device}: {memory.describe_free()} (source: {memory.source})"

    def _beside(self) -> Iterator[tuple[str, str]]:
        """Where the bytes of the cache are, and what stands beside it."""
        if self.host_bytes:
            yield "of it", f"{format_bytes(self.host_bytes)} in host memory"
        if self.head_copies > 1:
            yield "copies", words_of_copies(self.head_copies, self.copied_bytes)
        if self.weights_bytes:
            yield "weights", f"{format_bytes(self.weights_bytes)} ({self.weights_bytes:,} bytes)"

    def _verdict(self) -> str:
        free, needed = self.memory.free_bytes, self.needed_bytes
        if _has_its_own(self.memory):
            needed -= self.host_bytes
        if free is None:
            return "unknown: the device does not say what memory it has"
        left = free - self.weights_bytes
        if left < 0:
            return f"no, the weights alone are {format_bytes(-left)} too large"
        beside = f"; the weights leave {format_bytes(left)}" if self.weights_bytes else ""
        if needed > left:
            return f"no, {format_bytes(needed - left)} too large{beside}"
        return f"yes, in {(needed + self.weights_bytes) / free:.1%} of what is free{beside}"

    def _streamed(self, streamed: StreamedPlan) -> str:
        device, host = format_bytes(streamed.device_bytes), format_bytes(streamed.host_bytes)
        return f"{device} on the device and {host} in host memory, with placement=HostMemory()"

    def _at_most(self) -> str:
        sequence = "" if self.config.batch_size is None else " a sequence"
        plural = "" if self.max_batch_size == 1 else "s"
        return (
            f"{_count(self.max_context_length)} tokens{sequence}, or {_count(self.max_batch_size)} "
            f"sequence{plural} of {self.config.max_context_length:,}"
        )

    def _row(self, row: CodecPlan) -> tuple[str, ...]:
        mark = " (chosen)" if row.codec == self.config.codec_name else ""
        return (
            row.codec + mark,
            format_bytes(row.needed_bytes),
            "yes" if row.fits else "no",
            _count(row.max_context_length),
            _count(row.max_batch_size),
        )


def plan(
    config: AnyConfig,
    device: Device | int | str | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axes: Axes | None = None,
    weights: Any = 0,
) -> Plan:
    """Will this cache fit, and what would? Allocates nothing.

    Args:
      config: the cache.
      device: a `jax.Device` (None for JAX's default one), asked for what is free now; or the
        size of a device that is not here: bytes, or text such as ``"24GB"``, ``"24GiB"`` or
        ``"H100"``.
      mesh, axes: the devices over which the cache is spread and how, as in `jaxkv.create`; a
        `jax.sharding.AbstractMesh` for some that are not here. The plan is of one of them.
      weights: what stands on the device beside the cache and is not there yet: bytes, or a pytree
        of arrays or shapes, such as a model, of which the fullest device counts.

    Raises:
      ConfigError: what the axes cannot split.
      TypeError, ValueError: not a device or a size.

    >>> import jaxkv
    >>> llama3 = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, batch_size=16)
    >>> answer = plan(llama3, "24GB")
    >>> answer.fits, answer.needed_bytes, answer.max_context_length, answer.max_batch_size
    (True, 17179869248, 11444, 22)
    """
    spread, memory, beside = Spread.of(mesh, axes), device_memory(device), _bytes_of(weights)
    left = memory
    if memory.free_bytes is not None:
        left = dataclasses.replace(memory, free_bytes=memory.free_bytes - beside)
    found = plan_within(config, left, spread)
    return dataclasses.replace(found, memory=memory, weights_bytes=beside)


def plan_within(config: AnyConfig, memory: DeviceMemory, spread: Spread | None = None) -> Plan:
    """`plan` against memory that was looked at already."""
    own = config_of_a_device(config, spread)
    chosen = _codec_plan(own, memory, spread)
    rows = {name: _other_codec_plan(own, codec, memory, spread) for name, codec in CODECS.items()}
    rows[chosen.codec] = chosen
    found = Plan(
        config,
        memory,
        chosen.needed_bytes,
        chosen.fits,
        chosen.max_context_length,
        chosen.max_batch_size,
        codecs=tuple(row for row in rows.values() if row is not None),
        host_bytes=own.host_bytes,
        streamed=_streamed_plan(own, memory),
    )
    if spread is None:
        return found
    return dataclasses.replace(
        found,
        streamed=None,  # host memory is of no mesh
        num_devices=spread.mesh.size,
        head_copies=max(spread.copies(group) for group in (*config.groups, *config.cross)),
        copied_bytes=sum(spread.copied_bytes(group) for group in (*config.groups, *config.cross)),
    )


def needed_bytes(config: AnyConfig) -> int:
    """Exact bytes that `jaxkv.create` allocates for a config."""
    return config.size_bytes + config.index_bytes


def _bytes_of(weights: Any) -> int:
    """A number of bytes, or those of arrays on the device that has most of them."""
    if isinstance(weights, int | np.integer):
        if weights < 0:
            raise ValueError(f"weights must be at least 0 bytes, got {weights}.")
        return int(weights)
    held: collections.Counter[Any] = collections.Counter()
    nowhere = 0  # shapes, which count on every device
    for leaf in jax.tree.leaves(weights):
        if isinstance(leaf, jax.Array):
            held.update(bytes_by_device(leaf))
        elif hasattr(leaf, "dtype"):
            nowhere += math.prod(leaf.shape) * leaf.dtype.itemsize
    return nowhere + max(held.values(), default=0)


def _other_codec_plan(
    config: AnyConfig, codec: Codec, memory: DeviceMemory, spread: Spread | None
) -> CodecPlan | None:
    try:
        return _codec_plan(config.replace(codec=codec), memory, spread)
    except ValueError:  # it cannot store vectors of this head_dim: no choice
        return None


def bytes_against(config: AnyConfig, memory: DeviceMemory) -> int:
    """`needed_bytes` less those that are in the host's memory and not the device's."""
    return needed_bytes(config) - (config.host_bytes if _has_its_own(memory) else 0)


def _has_its_own(memory: DeviceMemory) -> bool:
    """Whether a device's memory is not that of its host."""
    return memory.source in ("memory_stats", "given", "unknown")


def _streamed_plan(config: AnyConfig, memory: DeviceMemory) -> StreamedPlan | None:
    if config.host_bytes:
        return None
    try:
        streamed = config.replace(placement=HostMemory())
    except ConfigError:  # not for this addressing
        return None
    host, held, free = streamed.host_bytes, bytes_against(streamed, memory), memory.free_bytes
    if not host:  # all of it would be resident
        return None
    return StreamedPlan(needed_bytes(streamed) - host, host, free is None or held <= free)


def _codec_plan(config: AnyConfig, memory: DeviceMemory, spread: Spread | None) -> CodecPlan:
    """Of the config of one device; tokens and sequences are those of all together."""
    free = memory.free_bytes
    context, batch = (
        _largest(config, field, memory) for field in ("max_context_length", "batch_size")
    )
    return CodecPlan(
        codec=config.codec_name,
        needed_bytes=needed_bytes(config),
        fits=free is None or bytes_against(config, memory) <= free,
        max_context_length=_of_all(context, spread, "context"),
        max_batch_size=_of_all(batch, spread, "batch"),
    )


def _of_all(count: int | None, spread: Spread | None, what: str) -> int | None:
    """What devices take together of which each takes so much."""
    if count is None or spread is None:
        return count
    return min(count * spread.size(what), MAX_COUNT)


def _largest(config: AnyConfig, field: str, memory: DeviceMemory) -> int | None:
    """The largest value of a field that fits, by bisection: no addressing has to be linear."""
    if (free := memory.free_bytes) is None:
        return None
    fitting, too_many = 0, MAX_COUNT + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        tried: dict[str, Any] = {field: middle}
        if bytes_against(config.replace(**tried), memory) <= free:
            fitting = middle
        else:
            too_many = middle
    return fitting


def _count(count: int | None) -> str:
    if count is None:
        return "unknown"
    return "any" if count == MAX_COUNT else f"{count:,}"
