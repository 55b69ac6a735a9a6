"""What every attention implementation is given: checked arrays and the options of one call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.attention.masks import visible
from jaxkv.cache import read
from jaxkv.kv_cache import KVCache, Layer

# Query head h * group + g reads KV head h, so queries are kept grouped by what they read.
Grouped = Float[Array, "batch kv_heads tokens group head_dim"]
Scores = Float[Array, "batch kv_heads tokens group slots"]
Vectors = Float[Array, "batch slots kv_heads head_dim"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "queries", "layer", "positions", "lengths", "sinks"],
    meta_fields=["softcap", "window"],
)
@dataclasses.dataclass(frozen=True)
class Request:
    """One call of `attend`, always with a batch axis; implementations return ``queries``' shape.

    Attributes:
      cache: with the keys and values of these queries' tokens appended already.
      queries: float32, scaled.
      positions: of each query, -1 for padding.
      lengths: of each sequence, after these tokens.
      sinks: a learned logit a query head that takes probability and gives nothing, or None.
    """

    cache: KVCache
    queries: Grouped
    layer: Layer
    positions: Int[Array, "batch tokens"]
    lengths: Int[Array, " batch"]
    softcap: float | None = None
    window: int | None = None
    sinks: Float[Array, "kv_heads group"] | None = None

    def keys_and_values(self, start: Int[Array, ""] | int, size: int) -> tuple[Vectors, Vectors]:
        """Logical slots from ``start`` on, decoded to float32; empty slots read as zero.

        Zero probability times NaN is NaN, so what an empty slot holds must not be read at all.
        """
        both = read(self.cache, self.layer, start, size, jnp.float32)
        both = both.reshape(2, len(self.lengths), *both.shape[-3:])
        held = jnp.swapaxes(self.key_positions(start, size) >= 0, 1, 2)
        keys, values = jnp.where(held[..., None], both, 0)
        return keys, values

    def visible(
        self, start: Int[Array, ""] | int, size: int
    ) -> Bool[Array, "batch #kv_heads tokens 1 size"]:
        """Which of those slots each query may read, shaped to mask `Scores`."""
        index, positions = self.cache.index, self.key_positions(start, size)
        seen = visible(self.positions[:, None], positions, index.window, index.sinks)
        if self.window is not None:
            seen &= visible(self.positions[:, None], positions, self.window)
        return seen[:, :, :, None, :]

    def capped(self, scores: Scores) -> Scores:
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def key_positions(
        self, start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "batch #kv_heads size"]:
        index, batch = self.cache.index, len(self.lengths)
        lengths = self.lengths.reshape(index.lengths.shape)
        return index.key_positions(self.layer, lengths, start, size).reshape(batch, -1, size)
