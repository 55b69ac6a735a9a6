"""Each sequence owns one run of slots, in the order of its positions."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Sequence ``b`` owns slots ``b * max_context_length`` and up; position p is slot p of them."""

    @property
    def name(self) -> str:
        return "contiguous"

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return max_context_length * (batch_size or 1)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        return 4 * (batch_size or 1)

    def init(self, max_context_length: int, batch_size: int | None) -> "ContiguousIndex":
        shape = () if batch_size is None else (batch_size,)
        return ContiguousIndex(jnp.zeros(shape, jnp.int32), max_context_length)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths"], meta_fields=["capacity"]
)
@dataclasses.dataclass(frozen=True)
class ContiguousIndex:
    """The length of each sequence is all there is to know."""

    lengths: Int[Array, "*batch"]
    capacity: int

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, lengths=lengths)

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        first = self.capacity * jnp.arange(self.lengths.size, dtype=jnp.int32)
        exists = (positions >= 0) & (positions < self.capacity)
        return jnp.where(exists, first.reshape(*self.lengths.shape, 1) + positions, -1)

    def key_positions(
        self, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        return jnp.where(positions < lengths[..., None], positions, -1)

    def read(
        self, leaf: Array, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, size: int
    ) -> Array:
        layers, _, _, *vector = leaf.shape
        batch = self.lengths.shape
        per_sequence = leaf.reshape(layers, 2, *batch, self.capacity, *vector)
        begin = [layer, 0, *(0 for _ in batch), start, *(0 for _ in vector)]
        sizes = [1, 2, *batch, size, *vector]
        return lax.dynamic_slice(per_sequence, begin, sizes)[0]
