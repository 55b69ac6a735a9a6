"""One device's share of sequences whose tokens are dealt out over several."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.addressing.addressing import Layer, PageTable, PlainIndex


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inner", "rank"], meta_fields=["axis", "size"]
)
@dataclasses.dataclass(frozen=True)
class Interleaved(PlainIndex):
    """Position p of a sequence is position ``p // size`` of the device whose rank is ``p % size``.

    So all devices are equally full, whatever a sequence's length.

    Attributes:
      inner: where this device's tokens are. Its lengths are those of the whole sequences.
      rank: this device's number along the mesh axis.
      axis: name of the mesh axis.
      size: devices along it.
    """

    inner: Any
    rank: Int[Array, ""]
    axis: str
    size: int

    @property
    def share(self) -> Self:
        return self

    @property
    def run(self) -> int | None:
        return self.inner.run

    @property
    def pages(self) -> PageTable | None:
        return self.inner.pages

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        return self.inner.lengths

    @property
    def capacity(self) -> int:
        return self.inner.capacity * self.size

    @property
    def extent(self) -> int:
        return self.inner.extent

    @property
    def room(self) -> Int[Array, "*batch"] | int:
        return self.inner.room * self.size

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, inner=self.inner.with_lengths(lengths))

    def own(self, lengths: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """How many of the positions below these are this device's."""
        return (lengths - self.rank + self.size - 1) // self.size

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        mine = (positions >= 0) & (positions % self.size == self.rank)
        return self.inner.slots(jnp.where(mine, positions // self.size, -1))

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        positions = self.inner.key_positions(layer, self.own(lengths), start, size)
        return jnp.where(positions < 0, -1, positions * self.size + self.rank)

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        return self.inner.read(leaf, layer, start, size)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        inner, slots = self.inner.select(rows)
        return dataclasses.replace(self, inner=inner), slots


def whole(index: Any) -> Any:
    """An index without the knowledge of which share it is of."""
    return index.inner if isinstance(index, Interleaved) else index
