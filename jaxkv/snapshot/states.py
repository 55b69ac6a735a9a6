"""State per sequence in a file, ``state.kind.sequence.name``, and from there into a cache."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.axes import Spread
from jaxkv.cache.state import StateCache, StateConfig, StateIndex
from jaxkv.errors import SnapshotError
from jaxkv.snapshot.container import Layout, Spec
from jaxkv.snapshot.processes import processes_of

PREFIX = "state."


def check_processes(whole: Sequence[Any], spread: Spread | None, verb: str) -> None:
    """Refuse what files have from one process, where others hold a part: of these configs, if any.

    Raises:
      SnapshotError: it says what to do.
    """
    if whole and spread is not None and len(processes_of(spread)) > 1:
        raise SnapshotError(
            f"{verb}: layers that keep a state or have cross-attention are on devices of "
            f"{len(processes_of(spread))} processes, and files have them from one. Use a mesh of "
            "one process."
        )


def layout_of(states: Sequence[StateConfig], sequences: int) -> Layout:
    """The tensors: of each sequence, ``[layers, *shape]``."""
    return {
        f"{PREFIX}{kind}.{sequence}.{name}": Spec(dtype, (config.num_layers, *shape))
        for kind, config in enumerate(states)
        for sequence in range(sequences)
        for name, shape, dtype in config.arrays
    }


def pieces(states: Sequence[StateCache], name: str) -> Iterator[np.ndarray]:
    """A tensor of the layout; zeros for a sequence that has not begun."""
    kind, sequence, array = name.removeprefix(PREFIX).split(".", 2)
    cache, row = states[int(kind)], int(sequence)
    empty = np.asarray(cache.lengths).reshape(-1)[row] == 0
    for leaf in cache.storage[array]:
        whole: Any = leaf if cache.spread is None else np.asarray(leaf)  # by the host
        own = np.asarray(whole if cache.config.batch_size is None else whole[row])
        yield np.zeros_like(own) if empty else own


def filled(
    cache: StateCache,
    kind: int,
    lengths: Sequence[int],
    rows: Sequence[int],
    tensors: Mapping[str, np.ndarray],
) -> StateCache:
    """The cache with the file's sequences in these rows."""
    chosen, counts = np.asarray(rows, np.int32), jnp.asarray(lengths, jnp.int32)
    batched = cache.config.batch_size is not None

    def with_rows(name: str, layer: int, leaf: Any) -> Any:
        own = [tensors[f"{PREFIX}{kind}.{each}.{name}"][layer] for each in range(len(rows))]
        return leaf.at[chosen].set(np.stack(own)) if batched else jnp.array(own[0])

    def counted(leaf: Any) -> Any:
        return leaf.at[chosen].set(counts) if batched else counts[0]

    def together(cache: StateCache) -> StateCache:
        storage = {
            name: tuple(with_rows(name, layer, leaf) for layer, leaf in enumerate(of_layers))
            for name, of_layers in cache.storage.items()
        }
        index = StateIndex(counted(cache.lengths), counted(cache.index.at))
        return dataclasses.replace(cache, storage=storage, index=index)

    if cache.spread is None:
        return together(cache)
    places = jax.tree.map(lambda leaf: leaf.sharding, cache)
    here = jax.tree.map(jnp.asarray, jax.device_get(cache))
    return jax.device_put(together(here), places)


def to_json(states: Sequence[StateConfig]) -> list[dict[str, Any]]:
    """What the file says of them, their batch left to its groups."""
    return [
        {"layers": each.layers, "arrays": each.arrays}
        | ({"by_head": each.by_head} if each.by_head else {})  # so that files stay what they were
        for each in states
    ]


def of_json(json: Any, batch_size: int | None) -> tuple[StateConfig, ...]:
    """The inverse; raises ValueError, TypeError or LookupError for what is none."""
    if not isinstance(json, list):
        raise ValueError("states must be a list.")
    found = []
    for each in json:
        if not isinstance(each, dict) or each.keys() - {"by_head"} != {"layers", "arrays"}:
            raise ValueError("a state must be an object with layers and arrays.")
        by_head = each.get("by_head", ())
        found.append(StateConfig(each["layers"], each["arrays"], batch_size, by_head))
    return tuple(found)
