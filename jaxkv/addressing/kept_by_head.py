"""Another number of tokens in each head, packed: a head frees what it does not use."""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.addressing.addressing import Layer, PlainPerHead
from jaxkv.addressing.contiguous import Contiguous
from jaxkv.addressing.kept import KeptIndex
from jaxkv.addressing.rows import read_rows
from jaxkv.addressing.runs import first_slots
from jaxkv.counts import ceil_div, check_fields


@dataclasses.dataclass(frozen=True)
class KeptByHead(PlainPerHead):
    """As `Kept`, with a number of tokens of its own for each layer, sequence and KV head.

    The slots of new tokens come first, ``new`` a sequence. Behind them the ctx and KV head axes
    are one axis of places for a single head's vector, and each sequence and head owns a run of
    them: memory is that of the tokens kept, however uneven. Attention goes through as many slots
    as the longest run has.

    Args:
      places: for the vectors of one head, those of all sequences and heads of a layer.
      longest: tokens of the longest run.
      new: see `Kept`.
      num_layers, num_kv_heads: of the config.

    Raises:
      ValueError: a number that is not one of places, tokens, layers or heads.

    >>> import jaxkv
    >>> kept = KeptByHead(places=4000, longest=900, new=24, num_layers=32, num_kv_heads=8)
    >>> config = jaxkv.KVCacheConfig(32, 100_000, num_kv_heads=8, head_dim=128, addressing=kept)
    >>> config.num_slots
    524
    """

    places: int
    longest: int
    new: int
    num_layers: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        check_fields(self, "places", "longest", "new", "num_layers", "num_kv_heads")

    @property
    def name(self) -> str:
        return "kept by head"

    def with_heads(self, num_kv_heads: int) -> Self:
        places = self.places * num_kv_heads // self.num_kv_heads
        return dataclasses.replace(self, num_kv_heads=num_kv_heads, places=places)

    def shared_by(self, devices: int) -> Self:
        return dataclasses.replace(self, places=self.places // devices)

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return self.new * (batch_size or 1) + ceil_div(self.places, self.num_kv_heads)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        batch = batch_size or 1
        runs = 2 * self.num_layers * batch * self.num_kv_heads
        return 4 * (2 * batch + self.num_layers * self.places + runs)

    def init(self, max_context_length: int, batch_size: int | None) -> "KeptByHeadIndex":
        batch = () if batch_size is None else (batch_size,)
        runs = jnp.zeros((self.num_layers, *batch, self.num_kv_heads), jnp.int32)
        return KeptByHeadIndex(
            lengths=jnp.zeros(batch, jnp.int32),
            positions=jnp.full((self.num_layers, self.places), -1, jnp.int32),
            within=Contiguous().init(self.new, batch_size),
            firsts=runs,
            counts=jnp.zeros_like(runs),
            capacity=max_context_length,
            new=self.new,
            longest=self.longest,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "positions", "within", "firsts", "counts"],
    meta_fields=["capacity", "new", "longest"],
)
@dataclasses.dataclass(frozen=True)
class KeptByHeadIndex(KeptIndex):
    """The runs of all heads.

    Attributes:
      positions: ``[layers, places]``, of the tokens in all runs.
      within: the slots of new tokens alone.
      firsts: the place that each head's run begins at.
      counts: tokens that each head may keep, the length of its run.
    """

    firsts: Int[Array, "layers *batch kv_heads"]
    counts: Int[Array, "layers *batch kv_heads"]
    longest: int

    @property
    def extent(self) -> int:
        return self.new + self.longest

    def with_runs(self, counts: Int[Array, "layers *batch kv_heads"]) -> Self:
        flat = counts.reshape(len(counts), -1)
        firsts = (jnp.cumsum(flat, axis=1) - flat).reshape(counts.shape)
        return dataclasses.replace(self, firsts=firsts.astype(jnp.int32), counts=counts)

    @property
    def run_lengths(self) -> Int[Array, "layers *batch kv_heads"]:
        return self.counts

    def limits(self, layer: Layer) -> Int[Array, "*batch kv_heads"]:
        return self.counts[layer]

    def kept_positions(
        self, layer: Layer, places: Int[Array, " size"]
    ) -> Int[Array, "*batch kv_heads size"]:
        firsts, counts = self.firsts[layer][..., None], self.counts[layer][..., None]
        kept = self.positions[layer].at[firsts + places].get(mode="clip")
        return jnp.where(places < counts, kept, -1)

    def with_kept(self, layer: Layer, positions: Int[Array, "*batch kv_heads longest"]) -> Self:
        in_run = jnp.arange(self.longest, dtype=jnp.int32)
        places = self.firsts[layer][..., None] + in_run
        owned = in_run < self.counts[layer][..., None]
        beyond = jnp.where(owned, places, self.positions.shape[1])
        kept = self.positions.at[layer, beyond].set(positions, mode="drop")
        return dataclasses.replace(self, positions=kept)

    def head_slots(
        self, layer: Layer, logical: Int[Array, "*batch kv_heads slots"]
    ) -> Int[Array, "*batch kv_heads slots"]:
        batch, kv_heads = self.lengths.shape, logical.shape[-2]
        heads = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
        new = (first_slots(batch, self.new)[..., None] + logical) * kv_heads + heads
        in_run = logical - self.new
        behind_new = self.new * math.prod(batch) * kv_heads
        kept = behind_new + self.firsts[layer][..., None] + in_run
        kept = jnp.where(in_run < self.counts[layer][..., None], kept, -1)
        return jnp.where(logical < 0, -1, jnp.where(logical < self.new, new, kept))

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        layers, sides, ctx, kv_heads, *vector = leaf.shape
        logical = start + jnp.arange(size, dtype=jnp.int32)
        every_head = jnp.broadcast_to(logical, (*self.lengths.shape, kv_heads, size))
        places = jnp.maximum(jnp.swapaxes(self.head_slots(layer, every_head), -1, -2), 0)
        return read_rows(leaf.reshape(layers, sides, ctx * kv_heads, *vector), layer, places)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Float[Array, " ctx"] | None]:
        """Not possible: sequences have runs of different lengths.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            "select and fork cannot reorder a cache with a number of tokens for each head: its "
            "sequences differ in size. Fork before jaxkv.compress, or keep one number per layer."
        )
