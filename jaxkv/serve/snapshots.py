"""Copies of states at the ends of chunks, on the device: what a prompt that begins alike needs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.state import StateCache
from jaxkv.errors import ConfigError
from jaxkv.serve import steps

# Tokens from one snapshot of a prompt to the next, where an engine is told nothing else.
SNAPSHOT_EVERY = 1024
# Snapshots that there is room for, one per row or this many. Each new prompt takes one or two.
LEAST_SNAPSHOTS = 8


class StateSnapshots:
    """A pool of slots for states, whose books are `jaxkv.paging.Snapshots`.

    Args:
      config: of the cache whose states they are.
      size_bytes: of the pool, at most.
      at_once: snapshots that a step of prefill takes, at most.
      device: where.
    """

    def __init__(self, config: AnyConfig, size_bytes: int, at_once: int, device: Any):
        each = sum(state.bytes_per_sequence for state in config.states)
        self.num_slots, self._at_once = (size_bytes // each if each else 0), at_once
        self._states: tuple[StateCache, ...] = ()
        if self.num_slots:
            self._states = tuple(
                StateCache.create(state.replace(batch_size=self.num_slots), device)
                for state in config.states
            )

    @property
    def size_bytes(self) -> int:
        """Of the pool."""
        return sum(each.size_bytes for each in self._states)

    def close(self) -> None:
        """Free the pool."""
        for leaf in jax.tree.leaves(self._states):
            leaf.delete()

    def keep(self, rows: Mapping[int, int], cache: AnyCache) -> None:
        """Copy the states of rows of a cache to slots, by slot."""
        padded = np.full((2, self._at_once), -1, np.int32)
        padded[:, : len(rows)] = list(rows.values()), list(rows)
        self._states = steps.move_states(cache.states, *_placed(padded[0], self._states, padded[1]))

    def bring_back(self, slot: int, row: int, cache: AnyCache) -> AnyCache:
        """The cache, whose states are donated, with what a slot has in one of its rows."""
        numbers = np.array([[slot], [row]], np.int32)
        states = steps.move_states(self._states, *_placed(numbers[0], cache.states, numbers[1]))
        return cache.with_groups(cache.groups, states)


def _placed(sources: np.ndarray, to: tuple[StateCache, ...], rows: np.ndarray) -> tuple[Any, ...]:
    sources, rows = jax.device_put((sources, rows))
    return sources, to, rows


def checked_space(
    config: AnyConfig, space: int | None, every: int | None, chunk: int, sharing: bool
) -> tuple[int, int]:
    """Bytes for snapshots, and tokens from one to the next, of what an engine was told.

    Raises:
      ConfigError: snapshots of a model without state, or so many tokens that no chunk ends there.
    """
    if not config.states:
        if space is not None or every is not None:
            raise ConfigError(
                "Engine: snapshot_space and snapshot_every must be left out: this model's layers "
                "keep no state."
            )
        return 0, chunk
    every = max(SNAPSHOT_EVERY // chunk, 1) * chunk if every is None else every
    if every < chunk or every % chunk:
        raise ConfigError(
            f"Engine: snapshot_every must be a multiple of prefill_chunk, {chunk}, got {every}: a "
            "snapshot is taken where a chunk ends."
        )
    if space is None:
        kept = max(config.states[0].batch_size or 1, LEAST_SNAPSHOTS)
        space = kept * sum(state.bytes_per_sequence for state in config.states)
    if space < 0:
        raise ConfigError(f"Engine: snapshot_space must be at least 0 bytes, got {space}.")
    return space if sharing else 0, every
