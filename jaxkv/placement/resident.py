"""What stays on the device of a cache that lives in host memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Layer
from jaxkv.addressing.ring import RingIndex
from jaxkv.codecs import Leaves, bitcast
from jaxkv.counts import ceil_div
from jaxkv.placement.scatter import scatter_tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["storage", "first", "bounds"],
    meta_fields=["window", "sinks", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class Resident:
    """The newest tokens of each sequence, a ring's first ones, and the bounds of all blocks.

    Host memory has these tokens as well, so nothing is lost when they are written over.

    Attributes:
      storage: as that of the cache, with a ring of slots per sequence.
      first: the position of each sequence from which on tokens are here after a rollback.
      bounds: of every block's keys, where queries choose blocks; else None.
      window, sinks: how many newest and first tokens, static.
      capacity: of the whole cache, static.
    """

    storage: Leaves
    first: Int[Array, "*batch"]
    bounds: "Bounds | None"
    window: int
    sinks: int
    capacity: int

    @classmethod
    def create(cls, config: Any, storage: Leaves) -> Self:
        """With nothing in it yet, of a `KVCacheConfig`."""
        batch, context = config.batch_size or 1, config.max_context_length
        bounds = None
        if config.placement.blocks_per_query is not None:
            blocks = config.placement.num_blocks(context)
            shape = (config.num_layers, batch, blocks, config.num_kv_heads, config.head_dim)
            lowest, highest = (jnp.zeros(shape, jnp.float32) for _ in range(2))
            bounds = Bounds(lowest=lowest, highest=highest, block=config.placement.block)
        first = jnp.zeros(config.batch_shape, jnp.int32)
        sinks = config.addressing.sinks
        window = max(config.num_resident_slots // batch - sinks, 1)
        return cls(storage, first, bounds, window, sinks, context)

    def index(self, lengths: Int[Array, "*batch"]) -> RingIndex:
        """Which position each slot holds, when sequences are so long."""
        return RingIndex(lengths, self.first, self.capacity, self.window, self.sinks, chunk=1)

    def with_lengths(self, before: Int[Array, "*batch"], lengths: Int[Array, "*batch"]) -> Self:
        """The same when sequences that had one number of tokens have another."""
        return dataclasses.replace(self, first=self.index(before).with_lengths(lengths).first)

    def append(self, layer: Layer, encoded: Leaves, positions: Int[Array, "*batch tokens"]) -> Self:
        """Write new tokens over the oldest. Position -1 is padding."""
        newest = positions.max(axis=-1, keepdims=True)
        kept = (positions > newest - self.window) | (positions < self.sinks)
        kept = jnp.where(kept, positions, -1)
        slots = self.index(self.first).slots(kept)
        storage = {
            name: scatter_tokens(leaf, slots, bitcast(encoded[name], leaf.dtype), layer)
            for name, leaf in self.storage.items()
        }
        return dataclasses.replace(self, storage=storage)

    def select(self, rows: Int[Array, " rows"]) -> Self:
        """The resident tokens of a batch of these sequences."""
        index, slots = self.index(self.first).select(rows)
        storage = {name: jnp.take(leaf, slots, axis=2) for name, leaf in self.storage.items()}
        bounds = self.bounds
        if bounds is not None:
            lowest, highest = bounds.lowest[:, rows], bounds.highest[:, rows]
            bounds = dataclasses.replace(bounds, lowest=lowest, highest=highest)
        return dataclasses.replace(self, storage=storage, first=index.first, bounds=bounds)

    @property
    def num_slots(self) -> int:
        return next(iter(self.storage.values())).shape[2]

    def first_position(self, lengths: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The first position of each sequence that is read from here.

        ``lengths`` are those after the tokens being processed. All before but the first
        ``sinks``, and after a deep rollback all there are, are in host memory only. Where blocks
        are chosen they are whole, so it is the start of one.
        """
        oldest = self.index(lengths).first_position(lengths)
        if self.bounds is not None:
            oldest = ceil_div(oldest, self.bounds.block) * self.bounds.block
        return jnp.minimum(oldest, lengths)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lowest", "highest"], meta_fields=["block"]
)
@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the largest of each coordinate of the keys of a block.

    Attributes:
      lowest, highest: float32 ``[layers, batch, blocks, kv_heads, head_dim]``.
      block: tokens of a block.
    """

    lowest: Float[Array, "layers batch blocks kv_heads head_dim"]
    highest: Float[Array, "layers batch blocks kv_heads head_dim"]
    block: int

    def extended(
        self,
        layer: Layer,
        keys: Float[Array, "batch tokens kv_heads head_dim"],
        positions: Int[Array, "batch tokens"],
    ) -> Self:
        """With new tokens. What was known of a block whose first token is among them is dropped."""
        first = jnp.where(positions >= 0, positions, jnp.int32(2**31 - 1)).min(-1, keepdims=True)
        batch, tokens = positions.shape
        touched = jnp.arange(ceil_div(tokens, self.block) + 1, dtype=jnp.int32)
        blocks = first // self.block + touched  # [batch, touched]
        inside = (positions[:, None] // self.block == blocks[..., None]) & (positions >= 0)[:, None]
        started_before = blocks * self.block < first
        blocks = jnp.where(inside.any(-1), blocks, self.lowest.shape[2])  # else: to be dropped
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]

        def update(
            leaf: Array, extreme: float, reduce: Callable[..., Any], merge: Callable[..., Any]
        ) -> Array:
            chosen = jnp.where(inside[..., None, None], keys[:, None], extreme)
            new = reduce(chosen, axis=2)
            old = leaf.at[layer, row, blocks].get(mode="clip")
            old = jnp.where(started_before[..., None, None], old, extreme)
            return leaf.at[layer, row, blocks].set(merge(old, new), mode="drop")

        inf = float("inf")
        return dataclasses.replace(
            self,
            lowest=update(self.lowest, inf, jnp.min, jnp.minimum),
            highest=update(self.highest, -inf, jnp.max, jnp.maximum),
        )
