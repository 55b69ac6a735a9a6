"""A cache for as long as a `with` block lasts, in the ledger meanwhile, and freed for sure."""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.create import config_of_a_device
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.kv_cache import is_readable
from jaxkv.devices import Device, is_concrete
from jaxkv.errors import CacheClosedError
from jaxkv.memory.allocate import allocate, free
from jaxkv.memory.device import bytes_by_device, device_memory
from jaxkv.memory.plan import needed_bytes
from jaxkv.memory.tracker import MemoryTracker, Purpose
from jaxkv.show.text import format_bytes, pairs, sequences


class Session:
    """The cache of one `session`, and what became of it.

    Attributes:
      config: the cache's shape.
      tracker: the ledger that counts it.
    """

    def __init__(
        self, config: AnyConfig, tracker: MemoryTracker, cache: AnyCache, spread: Spread | None
    ):
        self.config = config
        self._spread = spread
        self.tracker = tracker
        self._cache: AnyCache | None = cache
        self._devices = sorted(
            cache.lengths.sharding.addressable_devices, key=operator.attrgetter("id")
        )

    @property
    def cache(self) -> AnyCache:
        """The current cache. Set it to what a step that took it returned.

        Raises:
          CacheClosedError: the session has ended, or the cache was donated to a function
            whose result was not set here.
          TypeError, ValueError: on setting, what is no cache of this session's config.
        """
        if self._cache is None:
            raise CacheClosedError(
                "This session has ended and its KV cache is freed. Use the cache inside the "
                "`with jaxkv.session(...)` block, or open another session."
            )
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._cache)):
            raise CacheClosedError(
                "The session's KV cache was donated to a function (or deleted), and the session "
                "was not given the new one. Rebind it from the function's result, as in "
                "`logits, session.cache = step(params, tokens, session.cache)`."
            )
        return self._cache

    @cache.setter
    def cache(self, cache: AnyCache) -> None:
        if self._cache is None:
            raise CacheClosedError(
                "This session has ended: it cannot hold another KV cache. Open another session."
            )
        self._check(cache)
        self._cache = cache

    def report(self) -> str:
        """What was planned, what is held, how many tokens, and what the device says."""
        planned = needed_bytes(config_of_a_device(self.config, self._spread))
        leaves = [leaf for leaf in jax.tree.leaves(self._cache) if not leaf.is_deleted()]
        device = self._devices[0]
        memory, held = device_memory(device), sum(bytes_by_device(leaf)[device] for leaf in leaves)
        facts = [
            ("KV cache", self.config.describe()),
            ("planned", f"{format_bytes(planned)} ({planned:,} bytes)"),
            ("held", f"{format_bytes(held)} ({held:,} bytes)"),
            ("tokens", self._tokens()),
            ("device", f"{memory.device}: {memory.describe_use()}"),
        ]
        if self._spread is not None:
            facts[1:3] = [(f"{word} on each", size) for word, size in facts[1:3]]
            facts.insert(1, ("spread over", f"{len(self._devices)} devices by {self._spread.axes}"))
        if memory.process_bytes is not None and memory.process_peak_bytes is not None:
            now, peak = format_bytes(memory.process_bytes), format_bytes(memory.process_peak_bytes)
            facts.append(("process", f"{now} resident, {peak} at peak"))
        return pairs(facts)

    def _close(self) -> None:
        cache, self._cache = self._cache, None
        free(cache)

    def _check(self, cache: object) -> None:
        if not isinstance(cache, AnyCache):
            raise TypeError(
                f"session.cache must be a jaxkv.KVCache, got a {type(cache).__name__}. A step "
                "that returns more is unpacked: `logits, session.cache = step(...)`."
            )
        if not is_concrete(*jax.tree.leaves(cache)):
            raise TypeError(
                "session.cache was set inside a traced function (jit, scan, vmap). Return the "
                "cache from the function, and set session.cache to it outside."
            )
        if cache.config != self.config:
            changes = [
                f"{field.name} {getattr(cache.config, field.name)!r} "
                f"instead of {getattr(self.config, field.name)!r}"
                for field in dataclasses.fields(self.config)
                if getattr(cache.config, field.name) != getattr(self.config, field.name)
            ]
            raise ValueError(
                "session.cache must have the session's config, got a cache with "
                f"{', '.join(changes)}. Open another session for another config."
            )

    def _tokens(self) -> str:
        if self._cache is None:
            return "none: the session has ended"
        lengths = self._cache.lengths
        if lengths.is_deleted():
            return "unknown: the cache was donated, and session.cache not set to the result"
        if not is_readable(lengths):
            return "unknown here: other processes hold some sequences"
        held, each = np.asarray(lengths), self.config.max_context_length
        if held.ndim == 0:
            return f"{int(held):,} of {each:,}"
        return (
            f"{int(held.sum()):,} in {sequences(held.size)}, the longest {held.max():,} of {each:,}"
        )


@contextlib.contextmanager
def session(
    config: AnyConfig,
    *,
    tracker: MemoryTracker | None = None,
    device: Device | None = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    limit: int | str | None = None,
) -> Iterator[Session]:
    """Allocate a cache, hold it through updates, and free it when the block ends.

    The block may end by an exception: the buffers are deleted and the ledger is set back all
    the same. Sessions may nest, and run in several threads at once.

    Args:
      config: the cache.
      tracker: the ledger to count it in; one of its own if None.
      device: where; JAX's default device if None.
      mesh, axes: the devices over which the cache is spread and how, as in `jaxkv.create`.
      limit: the most that all JAX arrays on a device may take, the cache included: bytes, or text
        such as ``"24GB"``. What the device has if None.

    Yields:
      The `Session`: ``session.cache`` is to be set to the result of each step.

    Raises:
      CacheAllocationError: it does not fit. Nothing was allocated.

    >>> import functools, jax, jaxkv.memory
    >>> step = jax.jit(functools.partial(jaxkv.advance, num_tokens=3), donate_argnums=0)
    >>> config = jaxkv.KVCacheConfig(2, 16, num_kv_heads=1, head_dim=4)
    >>> tracker = jaxkv.memory.MemoryTracker()
    >>> with jaxkv.memory.session(config, tracker=tracker) as session:
    ...     session.cache = step(session.cache)
    ...     print(session.cache, tracker.total_usage())
    KVCache(2 layers, 1 KV heads x 4, bfloat16, contiguous, 3 of 16 tokens, 512 B) 516
    >>> tracker.total_usage()
    0
    """
    cache = allocate(config, device=device, mesh=mesh, axes=axes, limit=limit)
    with holding(cache, tracker=tracker, spread=Spread.of(mesh, axes)) as held:
        yield held


@contextlib.contextmanager
def holding(
    cache: AnyCache, *, tracker: MemoryTracker | None = None, spread: Spread | None = None
) -> Iterator[Session]:
    """A `session` of a cache that is there already, which is freed when the block ends."""
    config, tracker = cache.config, MemoryTracker() if tracker is None else tracker
    held = Session(config, tracker, cache, spread)
    try:
        allocation = tracker.track(held.cache, purpose=Purpose.KV_CACHE, name=config.describe())
        try:
            yield held
        finally:
            tracker.release(allocation)
    finally:
        held._close()
