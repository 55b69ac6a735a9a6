"""Where the tokens of a cache are: what a save reads, and what a load writes."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.addressing import Index
from jaxkv.cache.kv_cache import KVCache
from jaxkv.codecs import State
from jaxkv.errors import SnapshotError
from jaxkv.programs import one_program


class Places(NamedTuple):
    """The tokens that one sequence holds, by rising position; both int32 ``[held]``."""

    positions: np.ndarray
    slots: np.ndarray


def places_of(index: Index) -> list[Places]:
    """For each sequence of a cache, in order."""
    claimed, slots = _claimed(index)
    found = []
    for positions, row in zip(_rows(claimed), _rows(slots), strict=True):
        order = np.argsort(positions, kind="stable")
        held = order[np.count_nonzero(positions < 0) :]
        found.append(Places(positions[held], row[held]))
    return found


@one_program()
def _claimed(index: Index) -> tuple[Array, Array]:
    claimed = index.key_positions(0, index.lengths, 0, index.extent)
    return claimed, index.slots(claimed)


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


def state_of_file(file: Path, cache: KVCache, tensors: dict[str, np.ndarray]) -> State:
    """The codec's state that vectors of the file are under; another cache's may have another."""
    own, state = cache.codec_state, {}
    is_set = any(np.asarray(array).any() for array in own.values())
    for name, array in own.items():
        if is_set and (np.asarray(array) != tensors[name]).any():
            raise SnapshotError(
                f"{file} was saved with other {name} than the cache that it is to be loaded into, "
                f"which has been used before: they are of its {cache.config.codec.name} codec. "
                "Load it into a new one."
            )
        state[name] = jax.device_put(tensors[name], array.sharding)
    return state


def named(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def written_of(index: Index) -> np.ndarray:
    """How far each sequence was ever written, ``[sequences]``: a ring has lost what was there."""
    lengths = index.lengths
    if index.ring is not None:
        lengths = jnp.maximum(lengths, index.ring.first_position(lengths) + index.ring.ring_slots)
    return np.asarray(lengths).reshape(-1)


def _rows(array: Array) -> np.ndarray:
    return np.asarray(array).reshape(-1, array.shape[-1])
