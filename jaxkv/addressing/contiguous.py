"""Each sequence owns one run of slots, in the order of its positions."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.addressing.addressing import Layer, Plain, PlainIndex
from jaxkv.addressing.runs import first_slots, read_runs, slots_of_runs


@dataclasses.dataclass(frozen=True)
class Contiguous(Plain):
    """Sequence ``b`` owns slots ``b * max_context_length`` and up; position p is slot p of them.

    >>> import jaxkv
    >>> jaxkv.Contiguous().num_slots(max_context_length=1024, batch_size=4)
    4096
    """

    by_position = True

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
class ContiguousIndex(PlainIndex):
    """The length of each sequence is all there is to know."""

    lengths: Int[Array, "*batch"]
    capacity: int

    by_position = True

    @property
    def extent(self) -> int:
        return self.capacity

    @property
    def run(self) -> int:
        return self.capacity

    @property
    def room(self) -> int:
        return self.capacity

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, lengths=lengths)

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        exists = (positions >= 0) & (positions < self.capacity)
        first = first_slots(self.lengths.shape, self.capacity)
        return jnp.where(exists, first + positions, -1)

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        return jnp.where(positions < lengths[..., None], positions, -1)

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        batch = self.lengths.shape
        return read_runs(leaf, layer, start, size, batch=batch, extent=self.capacity)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"]]:
        selected = dataclasses.replace(self, lengths=self.lengths.reshape(-1)[rows])
        return selected, slots_of_runs(rows, self.capacity)
