"""From the tensors of a file to the slots of a cache, whatever addressing either has."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import Index
from jaxkv.cache.host import bounds_of, on_the_device
from jaxkv.cache.kv_cache import KVCache, books_of_index
from jaxkv.codecs import Leaves
from jaxkv.errors import CacheFullError, SnapshotError
from jaxkv.placement import in_host_memory, scatter, write_slots
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.kept_fill import KeptFill
from jaxkv.snapshot.places import named, places_of, state_of_file
from jaxkv.snapshot.vectors import Vectors

# Tokens that are on their way to the device at once, and so in its memory beside the cache.
_TOKENS_AT_ONCE = 512


class Fill:
    """The tokens of a file, and the places of a cache that they go to. Made, it has checked all."""

    def __init__(
        self,
        file: Path,
        group: Group,
        lengths: Sequence[int],
        cache: KVCache,
        rows: Sequence[int],
        tensors: dict[str, Any],
        first: np.ndarray | None = None,
    ):
        self._cache = cache
        self._index = _index(cache.index, group, lengths, rows, first)
        places = places_of(self._index)
        room = books_of_index(self._index)[1].reshape(-1)
        self._state = state_of_file(file, cache, tensors)
        self._moves = []
        for sequence, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length > room[row]:
                raise CacheFullError(
                    f"{file} holds {length} tokens, and the cache has room for {room[row]}. Give a "
                    "larger max_context_length=, or load it into= a cache with more pages assigned."
                )
            stored = tensors.get(f"{sequence}.positions", np.arange(length))
            positions, slots = places[row]
            found = np.searchsorted(stored, positions)
            if not _holds(stored, found, positions):
                raise SnapshotError(
                    f"{file} holds {len(stored)} of the {length} tokens of sequence {sequence}, "
                    f"which its {group.config.addressing.name} addressing had kept; "
                    f"{cache.config.addressing.name} needs tokens that are not among them. Load it "
                    "with the addressing that it was saved with."
                )
            leaves = {name: tensors[f"{sequence}.{name}"] for name in cache.storage}
            # Host memory is written to by runs, which end where positions are left out.
            gaps = np.flatnonzero(np.diff(positions) != 1) + 1
            for move in zip(np.split(found, gaps), np.split(slots, gaps), strict=True):
                self._moves.append((leaves, *move))

    def __call__(self) -> KVCache:
        storage, config = self._cache.storage, self._cache.config
        at_once = min(_TOKENS_AT_ONCE, self._index.extent)
        for leaves, found, slots in self._moves:
            for start in range(0, len(slots), at_once):
                part = found[start : start + at_once]
                targets = np.full(at_once, -1, np.int32)  # what fills up the last portion
                targets[: len(part)] = slots[start : start + at_once]
                portions = {
                    name: _portion(storage[name], leaves[name], part, at_once) for name in leaves
                }
                storage = _put(storage, targets, portions, self._index.run)
        return KVCache(storage, self._index, config, self._state)


@functools.partial(jax.jit, donate_argnames="storage", static_argnames="run")
def _put(
    storage: Leaves, slots: Int[Array, " tokens"], portions: Leaves, run: int | None
) -> Leaves:
    return {name: _written(leaf, slots, portions[name], run) for name, leaf in storage.items()}


def _written(leaf: Array, slots: Int[Array, " tokens"], portion: Array, run: int | None) -> Array:
    if not in_host_memory(leaf):
        return scatter(leaf, slots, portion)
    assert run is not None

    def one_layer(layer: Array, leaf: Array) -> Array:
        return write_slots(leaf, layer, portion[layer][:, None], slots[None], run)

    return lax.fori_loop(0, len(leaf), one_layer, leaf)


def _portion(leaf: Array, stored: Vectors, found: np.ndarray, size: int) -> Array:
    """Some tokens of a file, filled up to ``size``, on the leaf's devices and cut as it is cut."""
    vectors = stored.of_tokens(found).view(leaf.dtype)
    portion = np.zeros((*vectors.shape[:2], size, *vectors.shape[3:]), leaf.dtype)
    portion[:, :, : len(found)] = vectors
    if in_host_memory(leaf):
        return jax.device_put(portion, leaf.sharding.with_memory_kind("device"))
    try:
        leaf.sharding.shard_shape(portion.shape)
    except ValueError:  # cut along its slots: each device gets all, and keeps its own
        return jnp.asarray(portion)
    return jax.device_put(portion, leaf.sharding)


def _index(
    index: Index,
    group: Group,
    lengths: Sequence[int],
    rows: Sequence[int],
    first: np.ndarray | None,
) -> Index:
    """The index of a cache whose ``rows`` are as long, and as far written, as they were.

    Args:
      first: the positions from which on a ring held tokens; None for those that a ring of this
        size had not written over yet.
    """

    def with_rows(old: Array, values: Any) -> Array:
        new = np.array(old).reshape(-1)
        new[list(rows)] = values
        return jax.device_put(new.reshape(old.shape), old.sharding)

    for values in (0, lengths):
        index = index.with_lengths(with_rows(index.lengths, values))
    if index.ring is None:
        return index
    if first is None:
        first = np.clip(np.subtract(group.written, index.ring.ring_slots), 0, lengths)
    all_first = with_rows(index.ring.first_position(index.lengths), first)
    return index.ring.holding_from(all_first, index.lengths)


def _holds(stored: np.ndarray, found: np.ndarray, positions: np.ndarray) -> bool:
    """Whether stored positions rise, and ``found`` is where the wanted ones are among them."""
    if (np.diff(stored) <= 0).any() or (len(found) and found[-1] >= len(stored)):
        return False
    return bool((stored[found] == positions).all())


class Fills(NamedTuple):
    """Of a cache; of its newest tokens by a finer codec; of those that are on the device too."""

    own: Fill | KeptFill
    newest: Fill | None
    resident: Fill | None
    cache: KVCache
    rows: Sequence[int]

    def __call__(self) -> KVCache:
        """The cache with all of them."""
        filled = self.own()
        if self.newest is not None:
            filled = dataclasses.replace(filled, newest=self.newest())
        if self.resident is None or self.cache.resident is None:
            return filled
        tokens = self.resident()
        assert tokens.index.ring is not None
        first = tokens.index.ring.first_position(tokens.lengths)
        resident = dataclasses.replace(self.cache.resident, storage=tokens.storage, first=first)
        if resident.bounds is not None:
            bounds = bounds_of(filled, resident.bounds, jnp.array(self.rows, jnp.int32))
            resident = dataclasses.replace(resident, bounds=bounds)
        return dataclasses.replace(filled, resident=resident)


def fills_of(
    file: Path,
    group: Group,
    lengths: Sequence[int],
    cache: KVCache,
    rows: Sequence[int],
    tensors: dict[str, Any],
) -> Fills:
    """The fills of one group of layers, which have checked everything once they are made."""
    kind = KeptFill if cache.index.per_head else Fill
    fill = kind(file, group, lengths, cache, rows, tensors)
    newest = resident = None
    if group.of_newest is not None and cache.newest is not None:
        of_newest, first = named(tensors, "newest."), np.subtract(lengths, group.of_newest.held)
        newest = Fill(file, group.of_newest, lengths, cache.newest, rows, of_newest, first=first)
    if cache.resident is not None:
        resident = Fill(file, group, lengths, on_the_device(cache), rows, tensors)
    return Fills(fill, newest, resident, cache, rows)
