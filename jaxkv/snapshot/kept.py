"""A compressed cache in a file: what each head of each layer holds, slot by slot.

Of each sequence there is a flat list of single heads' vectors, by layer, head and slot: the new
tokens of a head, then its kept ones up to the last. So each comes back to the slot that it had,
and sums over slots are the same to the bit.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.addressing import KeptIndex
from jaxkv.cache.kv_cache import KVCache
from jaxkv.codecs import leaf_specs
from jaxkv.compression.scoring import held_positions, map_layers
from jaxkv.errors import SnapshotError
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.places import buffer_of_layers

# ``[layers, sequences, kv_heads, slots]``
BySlot = np.ndarray


@dataclasses.dataclass(frozen=True)
class KeptSource:
    """A compressed cache, and what its heads hold.

    Attributes:
      positions: of the tokens in all slots, -1 for none.
      used: the slots that go to the file.
    """

    cache: KVCache
    positions: Int[BySlot, "..."]
    used: Bool[BySlot, "..."]

    @classmethod
    def of(cls, cache: KVCache) -> "KeptSource":
        index = index_of(cache)
        positions = positions_of_heads(cache)
        in_kept = np.arange(1, index.extent - index.new + 1)
        num_kept = (in_kept * (positions[..., index.new :] >= 0)).max(axis=-1)
        if index.run_lengths is not None:
            num_kept = np.asarray(index.run_lengths).reshape(num_kept.shape)
        num_new = np.asarray(index.within.lengths).reshape(-1)
        return cls(cache, positions, used_slots(index, num_new[:, None], num_kept))

    @property
    def described(self) -> Group:
        lengths = np.asarray(self.cache.lengths).reshape(-1).tolist()
        return Group(
            self.cache.config, tuple(lengths), tuple(self.used.sum(axis=(0, 2, 3)).tolist())
        )

    def pieces(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        """One sequence's leaf of the codec, or its positions or sums from the index."""
        used, index = self.used[:, sequence], index_of(self.cache)
        if leaf in self.cache.storage:
            yield from self._vectors(sequence, leaf)
        elif leaf == "counts":
            yield used.sum(axis=-1, dtype=np.int32)
        elif leaf == "first_new":
            yield np.asarray(index.first_new).reshape(-1)[sequence]
        elif leaf == "positions":
            yield self.positions[:, sequence][used]
        elif index.state is not None and leaf in index.state.tokens:
            yield np.asarray(index.state.tokens[leaf]).reshape(self.used.shape)[:, sequence][used]
        elif index.state is not None and leaf == "since":
            yield np.asarray(index.state.since).reshape(-1)[sequence]

    def state(self, name: str) -> np.ndarray:
        """What its codec has learned."""
        return np.asarray(self.cache.codec_state[name])

    def _vectors(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        config, layers = self.cache.config, buffer_of_layers(self.cache, leaf)
        dtype, places = (
            leaf_specs(config.codec, config.head_dim)[leaf].dtype,
            places_of_heads(self.cache),
        )
        for layer in range(config.num_layers):
            whole = layers[layer]
            flat = whole.reshape(whole.shape[0], -1, *whole.shape[3:])
            rows = flat[:, places[layer, sequence][self.used[layer, sequence]]]
            yield np.asarray(rows).swapaxes(0, 1).view(jnp.dtype(dtype))


def check_kept(file: Path, saved: Manifest, number: int, tensors: dict[str, np.ndarray]) -> None:
    """Refuse numbers that no compressed cache has.

    Raises:
      SnapshotError: naming what is wrong.
    """
    group = saved.groups[number]
    for sequence, (held, length) in enumerate(zip(group.held, saved.lengths, strict=True)):
        name = f"{number}.{sequence}"
        counts, positions = tensors[f"{name}.counts"], tensors[f"{name}.positions"]
        first_new, wrong = int(tensors[f"{name}.first_new"]), None
        num_new = length - first_new
        if not 0 <= num_new <= length:
            wrong = f"its new tokens begin at {first_new} of {length}"
        elif counts.min() < num_new or counts.sum(dtype=np.int64) != held:
            wrong = f"its heads do not hold {num_new} new tokens each and {held} in all"
        else:
            ends = counts.reshape(-1).cumsum()
            place = np.arange(held) - np.repeat(ends - counts.reshape(-1), counts.reshape(-1))
            kept = (positions >= -1) & (positions < first_new)
            if not np.where(place < num_new, positions == first_new + place, kept).all():
                wrong = "it holds tokens at positions that cannot be"
        if wrong is not None:
            raise SnapshotError(f"{file} does not describe a compressed cache: {wrong}.")


def used_slots(index: KeptIndex, num_new: np.ndarray, num_kept: np.ndarray) -> BySlot:
    """The slots of so many new and kept tokens of each head."""
    slots = np.arange(index.extent)
    kept = (slots >= index.new) & (slots - index.new < num_kept[..., None])
    return (slots < num_new[..., None]) | kept


def positions_of_heads(cache: KVCache) -> BySlot:
    """The positions of the tokens in all slots, -1 for none."""
    return _by_sequence(_positions(cache))


def places_of_heads(cache: KVCache) -> BySlot:
    """Where vectors stand when the ctx and KV head axes are one; -1 for no such slot."""
    return _by_sequence(_places(cache))


@jax.jit
def _positions(cache: KVCache) -> Int[Array, "layers *batch kv_heads slots"]:
    return map_layers(cache, lambda layer: held_positions(cache, layer))


@jax.jit
def _places(cache: KVCache) -> Int[Array, "layers *batch kv_heads slots"]:
    index, config = index_of(cache), cache.config
    shape = (*config.batch_shape, config.num_kv_heads, index.extent)
    logical = jnp.broadcast_to(jnp.arange(index.extent, dtype=jnp.int32), shape)
    return map_layers(cache, lambda layer: index.head_slots(layer, logical))


def _by_sequence(array: Array) -> BySlot:
    return np.array(array).reshape(len(array), -1, *array.shape[-2:])


def index_of(cache: KVCache) -> KeptIndex:
    assert cache.index.per_head
    return cast(KeptIndex, cache.index)
