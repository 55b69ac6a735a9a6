"""From a file to the slots of a compressed cache, each head for itself."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.addressing import KeptIndex, PolicyState
from jaxkv.cache.kv_cache import KVCache
from jaxkv.codecs import Leaves
from jaxkv.compression.gather import write_heads
from jaxkv.errors import CacheFullError, SnapshotError
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.kept import (
    BySlot,
    index_of,
    places_of_heads,
    positions_of_heads,
    used_slots,
)
from jaxkv.snapshot.places import named, state_of_file

# Vectors of one head that are on their way to the device at once.
_VECTORS_AT_ONCE = 4096


class KeptFill:
    """The tokens of a compressed cache's file, and where they go; see `Fill`."""

    def __init__(
        self,
        file: Path,
        group: Group,
        lengths: Sequence[int],
        cache: KVCache,
        rows: Sequence[int],
        tensors: dict[str, np.ndarray],
    ):
        self._cache, self._rows = cache, list(rows)
        self._state = state_of_file(file, cache, tensors)
        self._sequences = [named(tensors, f"{sequence}.") for sequence in range(len(self._rows))]
        ends = np.array(lengths, np.int32)
        num_new = ends - [int(sequence["first_new"]) for sequence in self._sequences]
        counts = np.stack([sequence["counts"] for sequence in self._sequences], axis=1)
        num_kept = counts - num_new[:, None]
        self._check_room(file, ends, num_new, num_kept)
        self._used = used_slots(index_of(cache), num_new[:, None], num_kept)
        self._index = self._filled_index(ends, num_new, num_kept)
        self._places = places_of_heads(dataclasses.replace(cache, index=self._index))[:, self._rows]
        if (self._places[self._used] < 0).any():
            raise CacheFullError(
                f"{file} needs more pages. Load it into= a cache with more pages assigned."
            )

    def _check_room(
        self, file: Path, lengths: np.ndarray, num_new: np.ndarray, num_kept: np.ndarray
    ) -> None:
        index, config = index_of(self._cache), self._cache.config
        checks = [
            ("tokens", lengths.max(), index.capacity),
            ("new tokens of one sequence", num_new.max(), index.new),
            ("kept tokens of one head", num_kept.max(), index.extent - index.new),
        ]
        if index.run_lengths is not None:
            if self._rows != list(range(config.batch_size or 1)):
                raise SnapshotError(
                    f"{file} has a number of tokens for each head: it is loaded whole, not by rows."
                )
            places = index.positions.shape[-1]
            checks.append(("kept tokens of all heads", num_kept.sum(axis=(1, 2)).max(), places))
        for what, held, room in checks:
            if held > room:
                raise CacheFullError(
                    f"{file} holds {held} {what}, and the cache has room for {room}. Load it with "
                    "the addressing that it was saved with."
                )

    def _filled_index(
        self, lengths: np.ndarray, num_new: np.ndarray, num_kept: np.ndarray
    ) -> KeptIndex:
        index, rows = index_of(self._cache), self._rows

        def merged(old: Array, new: Any, axis: int = 0) -> Array:
            """The old array with the new values in our rows of its batch axis."""
            batched = np.array(old if index.lengths.ndim else jnp.expand_dims(old, axis))
            batched[(slice(None),) * axis + (rows,)] = new
            return jax.device_put(batched.reshape(old.shape), old.sharding)

        positions = positions_of_heads(self._cache)
        positions[:, rows] = self._by_slot("positions", -1)
        kept = positions[..., index.new :]
        kept = kept.reshape(len(kept), *index.lengths.shape, *kept.shape[2:])
        runs = None
        if index.run_lengths is not None:
            runs = merged(index.run_lengths, num_kept, axis=1)
        if index.state is not None:
            since = merged(index.state.since, [int(each["since"]) for each in self._sequences])
            tokens = {
                name: merged(array, self._by_slot(name, 0), axis=1)
                for name, array in index.state.tokens.items()
            }
            index = index.with_state(PolicyState(tokens, since))
        index = dataclasses.replace(
            index,
            lengths=merged(index.lengths, lengths),
            within=index.within.with_lengths(merged(index.within.lengths, num_new)),
        )
        return _with_kept(index, kept, runs)

    def _by_slot(self, name: str, empty: int) -> BySlot:
        values = np.full(self._used.shape, empty, self._sequences[0][name].dtype)
        for sequence, tensors in enumerate(self._sequences):
            values[:, sequence][self._used[:, sequence]] = tensors[name]
        return values

    def __call__(self) -> KVCache:
        storage, config = self._cache.storage, self._cache.config
        size = min(_VECTORS_AT_ONCE, config.num_slots * config.num_kv_heads)
        for sequence, tensors in enumerate(self._sequences):
            end = 0
            for layer in range(config.num_layers):
                places = self._places[layer, sequence][self._used[layer, sequence]]
                begin, end = end, end + len(places)
                for start in range(0, len(places), size):
                    count = min(size, len(places) - start)
                    targets = np.full(size, -1, np.int32)
                    targets[:count] = places[start : start + count]
                    storage = _put(
                        storage,
                        jnp.int32(layer),
                        targets,
                        {
                            name: _padded(leaf, tensors[name][begin + start :][:count], size)
                            for name, leaf in storage.items()
                        },
                    )
        return KVCache(storage, self._index, config, self._state)


@jax.jit
def _with_kept(index: KeptIndex, positions: Array, runs: Array | None) -> KeptIndex:
    """The same index with these kept tokens, in runs of these lengths where it has runs."""
    if runs is not None:
        index = index.with_runs(runs)
    for layer in range(len(positions)):
        index = index.with_kept(layer, positions[layer])
    return index


@functools.partial(jax.jit, donate_argnames="storage")
def _put(storage: Leaves, layer: Array, targets: Array, vectors: Leaves) -> Leaves:
    return {
        name: write_heads(leaf, layer, targets, vectors[name]) for name, leaf in storage.items()
    }


def _padded(leaf: Array, vectors: np.ndarray, size: int) -> np.ndarray:
    padded = np.zeros((size, *vectors.shape[1:]), leaf.dtype)
    padded[: len(vectors)] = vectors.view(leaf.dtype)
    return padded
