"""Where the tokens of a cache are: what a save reads, and what a load writes."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.addressing import Index
from jaxkv.errors import SnapshotError
from jaxkv.hybrid import AnyCache, HybridCache
from jaxkv.kv_cache import KVCache


class Places(NamedTuple):
    """The tokens that one sequence holds, by rising position; both int32 ``[held]``."""

    positions: np.ndarray
    slots: np.ndarray


def places_of(index: Index) -> list[Places]:
    """For each sequence of a cache, in order."""
    claimed = index.key_positions(0, index.lengths, 0, index.extent)
    if claimed.ndim > index.lengths.ndim + 1:
        raise SnapshotError(
            "A compressed cache cannot be saved or loaded into: each of its heads keeps tokens of "
            "its own. Save it before compressing, and compress what is loaded."
        )
    slots = index.slots(jnp.asarray(claimed))
    found = []
    for positions, row in zip(_rows(claimed), _rows(slots), strict=True):
        order = np.argsort(positions, kind="stable")
        held = order[np.count_nonzero(positions < 0) :]
        found.append(Places(positions[held], row[held]))
    return found


def caches_of(cache: AnyCache) -> tuple[KVCache, ...]:
    """The groups of a hybrid cache, or the one that a plain cache is."""
    return cache.groups if isinstance(cache, HybridCache) else (cache,)


def written_of(index: Index) -> np.ndarray:
    """How far each sequence was ever written, ``[sequences]``: a ring has lost what was there."""
    return np.asarray(getattr(index, "written", index.lengths)).reshape(-1)


def _rows(array: Array) -> np.ndarray:
    return np.asarray(array).reshape(-1, array.shape[-1])
