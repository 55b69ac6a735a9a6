"""The newest tokens alone, in a ring of slots: constant memory at any length."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.addressing.addressing import Layer, Plain, PlainIndex, first_visible
from jaxkv.addressing.runs import first_slots, read_runs, slots_of_runs
from jaxkv.counts import ceil_div, check_fields

# A GPU copies tiles of slots, which begin at a multiple of 8, and so must each sequence's ring.
_TILE, _MULTIPLE = 64, 8


@dataclasses.dataclass(frozen=True)
class Ring(Plain):
    """A query sees the ``window`` newest tokens, itself included, and the ``sinks`` first ones.

    Sliding windows as in Mistral 7B (Jiang et al., 2023, section 2), and attention sinks as in
    StreamingLLM (Xiao et al., 2024, section 3.2), with keys at their own positions.

    A sequence takes ``sinks + window - 1 + chunk`` slots, from 64 on rounded up to a multiple of
    8, or the context if that is less: a chunk's last token must not write over what its first one
    still sees.

    Args:
      window: newest tokens that a query sees.
      sinks: first tokens that are kept for good.
      chunk: tokens that one `append` may bring, and that `truncate` can take back.

    Raises:
      ValueError: a number that is not one of tokens.

    >>> import jaxkv
    >>> jaxkv.Ring(window=1024, sinks=4).num_slots(max_context_length=1_000_000, batch_size=None)
    1160
    """

    window: int
    sinks: int = 0
    chunk: int = 128

    def __post_init__(self) -> None:
        check_fields(self, "window", "chunk")
        check_fields(self, "sinks", least=0)

    @property
    def name(self) -> str:
        return "ring"

    @property
    def slots_per_sequence(self) -> int:
        slots = self.sinks + self.window - 1 + self.chunk
        return slots if slots < _TILE else ceil_div(slots, _MULTIPLE) * _MULTIPLE

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return min(self.slots_per_sequence, max_context_length) * (batch_size or 1)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        return 8 * (batch_size or 1)

    def init(self, max_context_length: int, batch_size: int | None) -> "RingIndex":
        shape = () if batch_size is None else (batch_size,)
        lengths, first = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
        chunk = self.slots_per_sequence - (self.sinks + self.window - 1)
        return RingIndex(lengths, first, max_context_length, self.window, self.sinks, chunk)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "first"],
    meta_fields=["capacity", "window", "sinks", "chunk", "aligned"],
)
@dataclasses.dataclass(frozen=True)
class RingIndex(PlainIndex):
    """Lengths, and the position from which on the ring holds tokens after a rollback.

    The slots of tokens that were taken back hold nothing: what they held before is lost.
    """

    lengths: Int[Array, "*batch"]
    first: Int[Array, "*batch"]
    capacity: int
    window: int
    sinks: int
    chunk: int
    aligned: bool = False

    @property
    def ring(self) -> Self:
        return self

    @property
    def ring_slots(self) -> int:
        """Beside those of the sinks, if the context is longer."""
        return self.window - 1 + self.chunk

    @property
    def extent(self) -> int:
        return min(self.sinks + self.ring_slots, self.capacity)

    @property
    def run(self) -> int:
        return self.extent

    @property
    def room(self) -> int:
        return self.capacity

    @property
    def intact(self) -> Bool[Array, "*batch"]:
        oldest_seen = first_visible(self.lengths, self.window, self.aligned)
        oldest_seen = jnp.maximum(oldest_seen, self.sinks)
        return (oldest_seen >= self.first) | (oldest_seen >= self.lengths)

    def first_position(self, lengths: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The ring holds tokens from this position on; ``lengths`` are those after the newest."""
        end = jnp.minimum(lengths, self.capacity)
        return jnp.maximum(self.first, end - self.ring_slots)

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return self.holding_from(jnp.minimum(self.first_position(self.lengths), lengths), lengths)

    def holding_from(self, first: Int[Array, "*batch"], lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, lengths=lengths, first=first)

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        exists = (positions >= 0) & (positions < self.capacity)
        first = first_slots(self.lengths.shape, self.extent)
        return jnp.where(exists, first + self.logical_slots(positions), -1)

    def logical_slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The place of a position within its sequence."""
        round_the_ring = self.sinks + (positions - self.sinks) % self.ring_slots
        return jnp.where(positions < self.sinks, positions, round_the_ring)

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        slots = start + jnp.arange(size, dtype=jnp.int32)
        newest = jnp.minimum(lengths, self.capacity)[..., None] - 1
        # The newest position so far that a slot of the ring is the place of.
        positions = newest - (newest - slots) % self.ring_slots
        positions = jnp.where(slots < self.sinks, slots, positions)
        oldest = jnp.maximum(self.first, self.sinks)[..., None]
        held = jnp.where(slots < self.sinks, slots <= newest, positions >= oldest)
        return jnp.where(held, positions, -1)

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        batch = self.lengths.shape
        return read_runs(leaf, layer, start, size, batch=batch, extent=self.extent)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"]]:
        lengths, first = self.lengths.reshape(-1)[rows], self.first.reshape(-1)[rows]
        selected = dataclasses.replace(self, lengths=lengths, first=first)
        return selected, slots_of_runs(rows, self.extent)
