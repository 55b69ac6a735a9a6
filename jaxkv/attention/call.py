"""What every attention implementation is given: checked arrays and the options of one call."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.attention.masks import visible
from jaxkv.attention.tree import Tree
from jaxkv.cache.ancestors import Ancestors
from jaxkv.cache.checks import check_layer
from jaxkv.cache.kv_cache import KVCache, Layer, NumTokens
from jaxkv.cache.vectors import is_second, offsets_of, read_stored
from jaxkv.cache.verbs import token_positions
from jaxkv.codecs import Offsets
from jaxkv.codecs.offsets import chosen

# Query head h * group + g reads KV head h, so queries are kept grouped by what they read.
Grouped = Float[Array, "batch kv_heads tokens group head_dim"]
Scores = Float[Array, "batch kv_heads tokens group slots"]
# The log of the sum of what the scores of all that a query saw are the logs of.
LogTotal = Float[Array, "batch kv_heads tokens group"]
LOWEST = -1e30  # a finite "minus infinity": differences of it are never NaN
Vectors = Float[Array, "batch slots kv_heads head_dim"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("cache", "queries", "layer", "positions", "lengths", "sink_logits"),
        *("offset_queries", "newest", "tree"),
    ],
    meta_fields=["softcap", "window", "side_by_side"],
)
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of `attend`, always with a batch axis.

    Implementations return ``queries``' shape, but with as many numbers as `Pair.width` says.

    Attributes:
      cache: with the keys and values of these queries' tokens appended already.
      queries: float32, scaled, and rotated as keys are; outputs are rotated as values are. An
        implementation that rotates them itself is given neither, and gives neither.
      positions: of each query, in its own text where the tokens form a tree; -1 for padding.
      lengths: of each sequence, after these tokens.
      sink_logits: None, or a learned logit per query head, added to the softmax denominator only.
      offset_queries: what features of a position are multiplied with, for the share of `offsets`.
      newest: the same call of the cache of `Newest` tokens, which are not read here then; or None.
      tree: where the tokens of these queries form one, which; else None.
      side_by_side: whether these are several queries that are no tokens of the cache, and that all
        see its ``lengths``.
    """

    cache: KVCache
    queries: Grouped
    layer: Layer
    positions: Int[Array, "batch tokens"]
    lengths: Int[Array, " batch"]
    softcap: float | None = None
    window: int | None = None
    sink_logits: Float[Array, "kv_heads group"] | None = None
    offset_queries: Float[Array, "batch kv_heads tokens group centres features"] | None = None
    newest: "AttentionCall | None" = None
    tree: Tree | None = None
    side_by_side: bool = False

    @classmethod
    def of(
        cls, cache: KVCache, queries: Grouped, layer: Layer, rotate: bool = True, **fields: Any
    ) -> Self:
        """With queries as the model has them, for the codec to prepare."""
        offsets = offsets_of(cache, layer)
        offset_queries = None if offsets is None else offsets.queries(queries)
        if rotate:
            queries = cache.config.codec.rotate(queries)
        return cls(cache, queries, layer, offset_queries=offset_queries, **fields)

    @property
    def offsets(self) -> Offsets | None:
        """What the layer's vectors were stored less."""
        return offsets_of(self.cache, self.layer)

    def take_queries(self, start: Int[Array, ""] | int, size: int) -> Self:
        """The same for some of its tokens; those past the end are padding."""
        *_, tokens, _, _ = self.queries.shape
        padding = -tokens % size

        def take(array: Array, axis: int, value: int) -> Array:
            widths = [(0, 0)] * array.ndim
            widths[axis] = (0, padding)
            padded = jnp.pad(array, widths, constant_values=value)
            return lax.dynamic_slice_in_dim(padded, start, size, axis)

        offset_queries, tree = self.offset_queries, self.tree
        return dataclasses.replace(
            self,
            queries=take(self.queries, 2, 0),
            positions=take(self.positions, 1, -1),
            offset_queries=None if offset_queries is None else take(offset_queries, 2, 0),
            newest=None if self.newest is None else self.newest.take_queries(start, size),
            tree=None if tree is None else tree._replace(sees=take(tree.sees, 1, False)),
        )

    def keys_and_values(self, start: Int[Array, ""] | int, size: int) -> tuple[Vectors, Vectors]:
        """Logical slots from ``start`` on, decoded to float32; empty slots read as zero.

        Zero probability times NaN is NaN, so what an empty slot holds must not be read at all.
        """
        keys, values = (
            vectors.reshape(len(self.lengths), *vectors.shape[-3:])
            for vectors in read_stored(self.cache, self.layer, start, size, self.lengths)
        )
        if (offsets := self.offsets) is not None:
            each = [self.cache.config.codec.rotate_values(both[1]) for both in offsets.centres]
            values += chosen(each, self.is_second(1, start, size))
        held = jnp.swapaxes(self.key_positions(start, size) >= 0, 1, 2)[..., None]
        return jnp.where(held, keys, 0), jnp.where(held, values, 0)

    def visible(
        self, start: Int[Array, ""] | int, size: int
    ) -> Bool[Array, "batch #kv_heads tokens 1 size"]:
        """Which of those slots each query may read, shaped to mask `Scores`."""
        index, positions = self.cache.index, self.key_positions(start, size)
        kept = index.window, index.sinks, index.aligned
        seen = self._visible(positions, *kept)
        if self.window is not None:
            seen &= self._visible(positions, self.window)
        if self.tree is not None:
            seen &= self.tree.visible(positions)
        if self.newest is not None:
            seen &= ~self._in_newest(positions)
        return seen[:, :, :, None, :]

    def _visible(
        self, positions: Int[Array, "batch #kv_heads slots"], *window: Any
    ) -> Bool[Array, "batch #kv_heads tokens slots"]:
        """What each query may read of the tokens at these positions, if its text has them."""
        in_text = positions if self.tree is None else self.tree.in_text(positions)
        return visible(self.positions[:, None], in_text, *window)

    def _in_newest(
        self, positions: Int[Array, "batch #kv_heads slots"]
    ) -> Bool[Array, "batch #kv_heads tokens slots"]:
        """Which of these tokens each query reads from the cache of `Newest` ones."""
        assert self.newest is not None
        index = self.newest.cache.index.ring
        assert index is not None
        first = index.first_position(self.lengths.reshape(index.lengths.shape)).reshape(-1)
        near = self._visible(positions, index.window)
        return near & (positions >= first[:, None, None])[:, :, None]

    def logits(self, scores: Scores, start: Int[Array, ""] | int, size: int) -> Scores:
        """Those slots' scores, with the share of what keys were stored less, and capped."""
        if (offsets := self.offsets) is not None:
            features = offsets.features(self.key_positions(start, size))
            # On a GPU they would be rounded to TF32.
            share = "bktgcf,bksf->cbktgs", self.offset_queries, features
            first, *second = jnp.einsum(*share, precision="highest")
            is_second = self.is_second(0, start, size)
            if second and is_second is not None:
                by_head = jnp.swapaxes(is_second, 1, 2)[:, :, None, None, :]
                first = jnp.where(by_head, second[0], first)
            scores += first
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def is_second(
        self, side: int, start: Int[Array, ""] | int, size: int
    ) -> Bool[Array, "batch size kv_heads"] | None:
        """Which of those slots' keys, or values, were stored less the second of `offsets`."""
        both = is_second(self.cache, self.layer, start, size)
        return None if both is None else both[side].reshape(len(self.lengths), size, -1)

    def key_positions(
        self, start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "batch #kv_heads size"]:
        index, batch = self.cache.index, len(self.lengths)
        lengths = self.lengths.reshape(index.lengths.shape)
        return index.key_positions(self.layer, lengths, start, size).reshape(batch, -1, size)


def request_of(
    cache: KVCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    layer: Layer,
    num_tokens: NumTokens | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    ancestors: Ancestors | None = None,
    rotate: bool = True,
    cross: bool = False,
    num_seen: Int[Array, "*batch tokens"] | None = None,
) -> AttentionCall:
    """The request of a call of `attend`, or `attend_cross`, whose arguments these are, checked."""
    config = cache.config
    *_, tokens, heads, head_dim = queries.shape
    batch, group = config.batch_size or 1, heads // config.num_kv_heads
    grouped = queries.reshape(batch, tokens, config.num_kv_heads, group, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    scaled = grouped.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)
    seen = None
    if cross:
        cache, num_tokens, seen = _as_its_last(cache, tokens, num_seen)
    added = tokens if num_tokens is None else jnp.asarray(num_tokens, jnp.int32)
    newest = None
    if cache.newest is not None:  # sinks take their share once
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
        options["ancestors"] = ancestors
        newest = request_of(cache.newest, queries, layer, num_tokens, **options)
    if sink_logits is not None:
        sink_logits = sink_logits.astype(jnp.float32).reshape(-1, group)
    positions = token_positions(cache, tokens, num_tokens) if seen is None else seen - 1
    positions, tree = positions.reshape(batch, tokens), None
    if ancestors is not None:
        tree = Tree.of(ancestors, cache.lengths.reshape(batch))
        positions = jnp.where(positions < 0, -1, tree.start[:, None] + tree.depths)
    return AttentionCall.of(
        cache,
        jnp.moveaxis(scaled, 1, 2),
        check_layer(cache, layer),
        rotate,
        positions=positions,
        lengths=(cache.lengths + added).reshape(batch),
        softcap=softcap,
        window=window,
        sink_logits=sink_logits,
        newest=newest,
        tree=tree,
        side_by_side=cross and num_seen is None and tokens > 1,
    )


def _as_its_last(
    cache: KVCache, tokens: int, num_seen: Int[Array, "*batch tokens"] | None
) -> tuple[KVCache, Int[Array, "*batch"], Int[Array, "*batch tokens"]]:
    """For queries that are no tokens of the cache: each stands where the last that it sees does.

    So they see all of those under the one rule that masks have, and a call of one query is that of
    a decode step, which all implementations serve.

    Returns:
      The cache as that step finds it, how many tokens the step brings of each sequence (none where
      there are none to see), and how many tokens each query sees.
    """
    held = jnp.minimum(cache.lengths, cache.index.capacity)[..., None]
    seen = jnp.clip(held if num_seen is None else num_seen, 0, held)
    seen = jnp.broadcast_to(seen, (*cache.lengths.shape, tokens))
    last = seen.max(axis=-1)
    return cache.with_lengths(jnp.maximum(last - 1, 0)), jnp.minimum(last, 1), seen
