"""The newest tokens of each sequence, kept a second time by a better codec."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.addressing import Layer, Plain, PlainIndex
from jaxkv.addressing.runs import first_slots, read_runs, slots_of_runs
from jaxkv.codecs import Codec, Dense
from jaxkv.counts import check_fields


@dataclasses.dataclass(frozen=True)
class Newest:
    """Beside a cache of few bits: its newest tokens by another codec, in a ring.

    Attention falls mostly on the last few tokens, and so does the cost of rounding them; KIVI (Liu
    et al., 2024, section 3.3) keeps a residual of them unrounded, and rounds it later. Here every
    token is stored by the cache's own codec at once and for good. For as long as it is among the
    ``tokens`` newest, there is a better copy, and queries read that.

    A query reads the better copies of the ``tokens`` newest tokens, itself included, as far as the
    ring still holds them when it comes: all of them in decode. Of an `append` of more tokens the
    ring holds the last ones, and the earlier queries read what the cache's codec made of theirs.
    After a rollback it holds what was not written over.

    It takes ``tokens`` slots per sequence of that codec, whatever the context, and its means where
    it is `Centred`, on the device wherever the cache is. `jaxkv.layer` gives what the cache's own
    codec made of every token. In a compressed cache queries read them whatever a policy drops.

    In a shared pool they belong to a row, for a page must hold the same bits whoever computes it.
    So an `Engine` computes prompts without them, and answers with those of the answer: a hit
    equals a miss bit for bit. They move with a row that is forked or swapped. If you manage pages
    yourself, pass ``newest_from`` to `KVCache.with_pages`.

    Args:
      tokens: of each sequence.
      codec: a finer one than the cache's. A `Centred` one without a rope takes that of the cache's
        codec.

    Raises:
      ValueError: a number that is not one of tokens.

    >>> import jaxkv
    >>> config = jaxkv.KVCacheConfig(
    ...     32, 8192, num_kv_heads=8, head_dim=128, codec=jaxkv.Rotated(bits=2),
    ...     newest=jaxkv.Newest(16, jaxkv.Rotated(bits=4)),
    ... )
    >>> config.size_bytes == 2 * 32 * 8 * (8192 * (32 + 2) + 16 * (64 + 2))
    True
    """

    tokens: int = 16
    codec: Codec = Dense("bfloat16")

    def __post_init__(self) -> None:
        check_fields(self, "tokens")

    def codec_beside(self, codec: Codec) -> Codec:
        """Its codec beside the cache's own, whose rope it is under."""
        return self.codec.under(codec.rope)


@dataclasses.dataclass(frozen=True)
class NewestSlots(Plain):
    """The addressing of `Newest`: a ring of ``tokens`` slots per sequence.

    Unlike `Ring` it takes any number of tokens at once, of which it holds the last, and any
    rollback: what it lost is still in the cache that it stands beside.
    """

    tokens: int

    @property
    def name(self) -> str:
        return "newest"

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return min(self.tokens, max_context_length) * (batch_size or 1)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        return 8 * (batch_size or 1)

    def init(self, max_context_length: int, batch_size: int | None) -> "NewestIndex":
        shape = () if batch_size is None else (batch_size,)
        lengths, first = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
        return NewestIndex(lengths, first, max_context_length, self.tokens)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "first"],
    meta_fields=["capacity", "window"],
)
@dataclasses.dataclass(frozen=True)
class NewestIndex(PlainIndex):
    """Lengths, and where what is held begins after a rollback.

    Position p is in slot ``p % window``, as long as it is among the ``window`` newest.
    """

    lengths: Int[Array, "*batch"]
    first: Int[Array, "*batch"]
    capacity: int
    window: int

    @property
    def ring(self) -> Self:
        return self

    @property
    def ring_slots(self) -> int:
        return self.window

    @property
    def run(self) -> int:
        return self.extent

    @property
    def extent(self) -> int:
        return min(self.window, self.capacity)

    @property
    def room(self) -> int:
        return self.capacity

    def first_position(self, lengths: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Tokens from this position on are held; ``lengths`` are those after the newest."""
        return jnp.maximum(self.first, jnp.minimum(lengths, self.capacity) - self.window)

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        # Tokens that are taken back have written over those ``window`` before them.
        first = jnp.minimum(self.first_position(self.lengths), lengths)
        # The cache beside it has these lengths too, and no buffer can be donated twice.
        own = jnp.array(lengths, copy=True)
        return dataclasses.replace(self, lengths=own, first=jnp.maximum(first, 0))

    def holding_from(self, first: Int[Array, "*batch"], lengths: Int[Array, "*batch"]) -> Self:
        """Of sequences of these lengths, whose tokens from ``first`` on were written."""
        first, lengths = jnp.array(first, copy=True), jnp.array(lengths, copy=True)
        return dataclasses.replace(self, lengths=lengths, first=first)

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        kept = (positions >= 0) & (positions < self.capacity)
        newest = jnp.where(kept, positions, -1).max(axis=-1, keepdims=True)
        kept &= positions > newest - self.window
        first = first_slots(self.lengths.shape, self.extent)
        return jnp.where(kept, first + self.logical_slots(positions), -1)

    def logical_slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        return positions % self.window

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        newest = jnp.minimum(lengths, self.capacity)[..., None] - 1
        positions = newest - (newest - start - jnp.arange(size, dtype=jnp.int32)) % self.window
        return jnp.where(positions >= jnp.maximum(self.first, 0)[..., None], positions, -1)

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        batch = self.lengths.shape
        return read_runs(leaf, layer, start, size, batch=batch, extent=self.extent)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"]]:
        lengths, first = self.lengths.reshape(-1)[rows], self.first.reshape(-1)[rows]
        selected = dataclasses.replace(self, lengths=lengths, first=first)
        return selected, slots_of_runs(rows, self.extent)
