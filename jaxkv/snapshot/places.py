"""Where the tokens of a cache are: what a save reads, and what a load writes."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.addressing import Index
from jaxkv.cache.kv_cache import KVCache
from jaxkv.errors import SnapshotError


class Places(NamedTuple):
    """The tokens that one sequence holds, by rising position; both int32 ``[held]``."""

    positions: np.ndarray
    slots: np.ndarray


def places_of(index: Index) -> list[Places]:
    """For each sequence of a cache, in order."""
    claimed = index.key_positions(0, index.lengths, 0, index.extent)
    slots = index.slots(jnp.asarray(claimed))
    found = []
    for positions, row in zip(_rows(claimed), _rows(slots), strict=True):
        order = np.argsort(positions, kind="stable")
        held = order[np.count_nonzero(positions < 0) :]
        found.append(Places(positions[held], row[held]))
    return found


def buffer_of_layers(cache: KVCache, leaf: str) -> Any:
    """A buffer to gather from layer by layer: where it is, for it may be larger than the host."""
    stored = cache.storage[leaf]
    if isinstance(stored, np.ndarray):
        return stored
    devices: list[Any] = list(stored.sharding.device_set)
    kind = stored.sharding.memory_kind or ""
    # Numpy sees it without a copy.
    seen = len(devices) == 1 and (devices[0].platform == "cpu" or "host" in kind)
    return np.asarray(stored) if seen else stored


def means_of_file(file: Path, cache: KVCache, stored: np.ndarray | None) -> Array | None:
    """What vectors of the file are stored less; another cache's vectors may have other means."""
    if cache.means is None or stored is None:
        return cache.means
    own = np.asarray(cache.means)
    if own.any() and (own != stored).any():
        raise SnapshotError(
            f"{file} was centred by other means than the cache that it is to be loaded into, which "
            "has been used before. Load it into a new one."
        )
    return jax.device_put(stored, cache.means.sharding)


def named(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def written_of(index: Index) -> np.ndarray:
    """How far each sequence was ever written, ``[sequences]``: a ring has lost what was there."""
    return np.asarray(getattr(index, "written", index.lengths)).reshape(-1)


def _rows(array: Array) -> np.ndarray:
    return np.asarray(array).reshape(-1, array.shape[-1])
