"""The verbs of a cache: pure functions from value to value.

Under `jax.jit` with the cache donated every update is in place. Outside jit an update
copies, as for any immutable array.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from jaxkv.cache.ancestors import Ancestors, check_ancestors, depths_of
from jaxkv.cache.checks import (
    check_alive,
    check_chunk,
    check_counts,
    check_intact,
    check_layer,
    check_pair,
    check_queries,
    check_room,
    layer_exists,
)
from jaxkv.cache.groups import (
    changing_its_group,
    in_every_group,
    in_every_kind,
    in_its_group,
)
from jaxkv.cache.host import append_to_host
from jaxkv.cache.hybrid import AnyCache, SameCache
from jaxkv.cache.kv_cache import OUT_OF_RANGE, KVCache, Layer, NumTokens, buffer_of
from jaxkv.cache.shards import beside_storage, books_of, in_each_shard, resharded
from jaxkv.cache.vectors import encode, read
from jaxkv.codecs import bitcast
from jaxkv.devices import is_concrete
from jaxkv.errors import CacheFullError
from jaxkv.placement import in_host_memory, scatter_tokens
from jaxkv.programs import one_program

_MISUSED = "num_tokens, a length, a layer or a row was out of range inside jit"


@changing_its_group
def append(
    cache: KVCache,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads value_dim"] | None = None,
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
    queries: Float[Array, "*batch tokens heads head_dim"] | None = None,
) -> KVCache:
    """Write the keys and values of the next tokens into one layer. Lengths do not move.

    Args:
      keys, values: ``[tokens, kv_heads, head_dim]``, with a leading ``[batch]`` exactly when
        the config has a ``batch_size``. Any float dtype; the codec rounds. Values have
        ``value_dim`` numbers where the config says so, and are None where they are in the keys.
      layer: which layer; may be traced.
      num_tokens: how many of ``tokens`` are real, for prompts padded on the right. All if None.
      queries: of the same tokens, ``[tokens, heads, head_dim]`` likewise. A codec that learns which
        numbers of keys matter (`Stair`) reads those of the first tokens; all others leave them.

    Raises:
      CacheFullError: outside jit, when a sequence has not enough slots left. Inside jit the
        tokens that do not fit are dropped and `check` says so once `advance` has counted them.
      IndexError, TypeError, ValueError: a bad layer, dtype, shape or ``num_tokens``. Inside jit
        nothing is written then, and `check` says so.

    >>> import jax.numpy as jnp, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> cache = jaxkv.append(cache, jnp.ones((3, 1, 4)), jnp.zeros((3, 1, 4)), layer=0)
    >>> keys, values = jaxkv.layer(cache, 0)
    >>> keys[:4, 0, 0].tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    num_layer = check_layer(cache, layer)
    check_pair(cache, keys, values)
    if not cache.config.codec.asks_queries:
        queries = None
    elif queries is not None:
        check_queries(cache, queries)
    tokens = keys.shape[-3]
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    check_chunk(cache, tokens)
    real = real_of(cache, tokens, num_tokens)
    check_room(cache, tokens if real is None else real)
    if tokens == 0:
        return cache
    # Of a padded step `advance` asks, once for all layers.
    cache = where_in_range(cache, _in_range(cache, num_layer, num_tokens, tokens))
    return _append(cache, keys, values, num_layer, real, queries)


def where_in_range(cache: KVCache, in_range: Bool[Array, "#*batch"] | bool) -> KVCache:
    """A sequence whose arguments are out of range is `misused`, and takes no tokens."""
    return cache if isinstance(in_range, bool) else _where_in_range(cache, in_range)


@beside_storage
@one_program()
@in_each_shard()
def _where_in_range(cache: KVCache, in_range: Array) -> KVCache:
    return cache.with_lengths(jnp.where(in_range, cache.lengths, OUT_OF_RANGE))


@one_program()
@in_each_shard()
def _append(
    cache: KVCache,
    keys: Array,
    values: Array | None,
    num_layer: Layer,
    num_tokens: NumTokens | None,
    grouped_queries: Array | None = None,
) -> KVCache:
    tokens = keys.shape[-3]
    positions = token_positions(cache, tokens, num_tokens)
    encoded, codec_state = encode(cache, num_layer, keys, values, positions, grouped_queries)
    newest = cache.newest
    if newest is not None:
        newest = append(
            newest,
            keys,
            values,
            layer=num_layer,
            num_tokens=num_tokens,
            queries=grouped_queries,
        )
    cache = dataclasses.replace(cache, codec_state=codec_state, newest=newest)
    if in_host_memory(buffer_of(cache)):
        return append_to_host(cache, num_layer, encoded, keys, positions)
    slots = cache.index.slots(positions)
    storage = {
        name: scatter_tokens(leaf, slots, bitcast(encoded[name], leaf.dtype), num_layer)
        for name, leaf in cache.storage.items()
    }
    return dataclasses.replace(cache, storage=storage)


@in_every_group
def advance(cache: KVCache, num_tokens: NumTokens) -> KVCache:
    """Count the appended tokens, once a step, after the last layer.

    Raises:
      CacheFullError: outside jit, when that is more than a sequence can hold.
      ValueError: a bad shape of ``num_tokens`` or, outside jit, a negative number (inside jit,
        `check` says so after).

    >>> import jax, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4, batch_size=2))
    >>> cache = jaxkv.advance(jaxkv.advance(cache, 3), jax.numpy.array([1, 0]))
    >>> cache.lengths.tolist()
    [4, 3]
    """
    check_counts(cache, "num_tokens", num_tokens)
    check_alive(cache)
    check_room(cache, num_tokens)
    return _advance(cache, num_tokens)


@beside_storage
@one_program()
@in_each_shard()
def _advance(cache: KVCache, num_tokens: NumTokens) -> KVCache:
    more = jnp.asarray(num_tokens, jnp.int32)
    if cache.real_tokens is not None:
        more = jnp.minimum(more, cache.real_tokens)
        cache = dataclasses.replace(cache, real_tokens=cache.real_tokens - more)
    in_range = (more >= 0) & (more < OUT_OF_RANGE)
    lengths = jnp.minimum(cache.lengths + jnp.where(in_range, more, 0), OUT_OF_RANGE)
    return cache.with_lengths(jnp.where(in_range, lengths, OUT_OF_RANGE))


@in_every_group
def padded_after(cache: KVCache, num_tokens: NumTokens | None) -> KVCache:
    """The cache for a step whose padding is said once, not in each verb; None ends the step.

    `append`, `attend` and `advance` then take the first ``num_tokens`` of all tokens of the step
    for real, and no more. So padding enters neither slots nor means, and a model needs to know
    nothing of it.

    Args:
      num_tokens: how many tokens of the step are real, of each sequence of a batch. None where
        none are padding, as after a step.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4))
    >>> cache = jaxkv.padded_after(cache, 3)
    >>> int(jaxkv.advance(cache, 5).lengths)
    3
    """
    real = None if num_tokens is None else jnp.asarray(num_tokens, jnp.int32)
    return dataclasses.replace(cache, real_tokens=real)


def real_of(cache: KVCache, tokens: int, num_tokens: NumTokens | None) -> NumTokens | None:
    """How many of the next ``tokens`` are real: as many as is said, and no padding of the step."""
    if cache.real_tokens is None:
        return num_tokens
    most = tokens if num_tokens is None else num_tokens
    return jnp.minimum(cache.real_tokens, jnp.asarray(most, jnp.int32))


def next_positions(
    cache: AnyCache, num_tokens: int, *, ancestors: Ancestors | None = None
) -> Int[Array, "*batch tokens"]:
    """The positions of the next ``num_tokens`` tokens, for rope or a position embedding.

    Args:
      num_tokens: how many.
      ancestors: where they form a tree, as in `attend`; each stands after its ancestors alone.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 3)
    >>> jaxkv.next_positions(cache, 2).tolist()
    [3, 4]
    """
    check_alive(cache)
    if ancestors is not None:
        check_ancestors(cache, num_tokens, ancestors)
        return _positions_in_tree(cache.lengths, ancestors)
    return _next_positions(cache.lengths, num_tokens=num_tokens)


@one_program("num_tokens")
def _next_positions(lengths: Int[Array, "*batch"], *, num_tokens: int) -> Array:
    return lengths[..., None] + jnp.arange(num_tokens, dtype=jnp.int32)


@one_program()
def _positions_in_tree(lengths: Int[Array, "*batch"], ancestors: Ancestors) -> Array:
    return lengths[..., None] + depths_of(ancestors)


def layer(
    cache: AnyCache, layer: Layer
) -> tuple[
    Float[Array, "*batch ctx kv_heads head_dim"], Float[Array, "*batch ctx kv_heads value_dim"]
]:
    """The decoded keys and values of one layer, all slots of each sequence, in logical order.

    Slots at or past a sequence's length hold zeros or tokens that were rolled back: mask
    them. `attend` does, and reads less. In a ring a position comes round again:
    ``cache.index.key_positions`` says which one a slot holds.

    Raises:
      IndexError: no such layer; all numbers are NaN where it is traced.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 8, num_kv_heads=1, head_dim=4))
    >>> keys, values = jaxkv.layer(cache, 1)
    >>> keys.shape, values.dtype.name
    ((8, 1, 4), 'bfloat16')
    """
    return _layer(cache, layer=layer)


@in_its_group
def _layer(cache: KVCache, *, layer: Layer) -> tuple[Array, Array]:
    number = check_layer(cache, layer)
    exists = layer_exists(cache, number)
    keys, values = _read_all(cache, number)
    return or_nan(keys, exists), or_nan(values, exists)


@one_program()
def _read_all(cache: KVCache, number: Layer) -> tuple[Array, Array]:
    keys, values = _read_dealt(cache, number)
    spread = cache.spread
    if spread is None:
        return keys[..., 0, :, :], values[..., 0, :, :]
    axis = len(cache.config.batch_shape)
    heads = "heads" if spread.copies(cache.config) == 1 else None
    together = spread.spec(*["batch"] * axis, None, None, heads, None)

    def in_order(vectors: Array) -> Array:
        vectors = resharded(spread, together, vectors)
        slots = vectors.shape[axis] * vectors.shape[axis + 1]
        return vectors.reshape(*vectors.shape[:axis], slots, *vectors.shape[-2:])

    return in_order(keys), in_order(values)


_DEALT = ("batch", None, "context", "kv_heads", None)


@in_each_shard(_DEALT, _DEALT)
def _read_dealt(cache: KVCache, number: Layer) -> tuple[Array, Array]:
    """``[*batch, slots, 1, kv_heads, head_dim]``, with an axis for the devices' shares."""
    keys, values = read(cache, number, 0, cache.index.extent, _decoded_dtype(cache))
    values = cache.config.pair.cut(values)
    return keys[..., None, :, :], values[..., None, :, :]


@in_every_group
def truncate(cache: KVCache, length: NumTokens) -> KVCache:
    """Roll back to the first ``length`` tokens: the rest is forgotten and written over.

    A ring can take back ``chunk`` tokens, or all but its sinks. What cross-attention reads stays,
    for another text about it; `reset` forgets it too.

    Raises:
      ValueError: a bad shape of ``length`` or, outside jit, a negative one or one whose next query
        would see tokens that are lost (inside jit, `check` says so after). One beyond the cache's
        own changes nothing.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.truncate(cache, 3).lengths.tolist(), jaxkv.truncate(cache, 7).lengths.tolist()
    (3, 5)
    """
    check_alive(cache)
    check_counts(cache, "length", length)
    rolled_back = _truncate(cache, length)
    check_intact(rolled_back)
    return rolled_back


@beside_storage
@one_program()
@in_each_shard()
def _truncate(cache: KVCache, length: NumTokens) -> KVCache:
    wanted = jnp.asarray(length, jnp.int32)
    lengths = jnp.where(wanted < 0, OUT_OF_RANGE, jnp.minimum(cache.lengths, wanted))
    return cache.with_lengths(lengths)


def reset(cache: SameCache) -> SameCache:
    """The same buffers, empty: of text, states, and the encoder's tokens of cross-attention.

    Old tokens stay in memory until written over, never to be read.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.reset(cache).lengths.tolist()
    0
    """
    emptied = truncate(cache, 0)
    cross = [truncate(each, 0) for each in cache.cross]
    return emptied.with_groups(emptied.groups, emptied.states, cross)  # type: ignore[return-value]


@in_every_kind
def check(cache: KVCache) -> KVCache:
    """Return the cache if it is sound.

    Inside jit this does nothing, unless the function is run under `checkify`.

    Raises:
      CacheFullError: tokens were dropped inside jit because their sequence was full.
      CacheClosedError: the buffers were donated or deleted.
      ValueError: inside jit a cache was rolled back to tokens that it had lost, or a verb was given
        ``num_tokens``, a length, a layer or a row out of range.

    >>> import jax, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4))
    >>> full = jax.jit(jaxkv.advance)(jaxkv.check(cache), 9)  # inside jit nothing can be raised
    >>> jaxkv.check(full)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CacheFullError: Tokens were dropped: ...
    """
    if not is_concrete(cache.lengths):
        checkify.debug_check(~cache.misused.any(), f"KV cache: {_MISUSED}")
        checkify.debug_check(~cache.overflowed.any(), "KV cache full: tokens were dropped")
        checkify.debug_check(jnp.all(cache.index.intact), "KV cache rolled back to lost tokens")
        return cache
    check_alive(cache)
    lengths, every_room, _ = books_of(cache)
    if (misused := lengths >= OUT_OF_RANGE).any():
        which = f", for sequences {np.flatnonzero(misused).tolist()}" if misused.ndim else ""
        raise ValueError(
            f"{_MISUSED}{which}. Nothing was written. Go on from the cache before that call, or "
            "truncate this one to the tokens that it had."
        )
    if (lengths > every_room).any():
        each = np.unique(every_room).tolist()
        room = each[0] if len(each) == 1 else every_room.tolist()
        raise CacheFullError(
            f"Tokens were dropped: sequences are {lengths.tolist()} tokens long, "
            f"and the cache holds {room} each. The first {room} are intact; truncate to them, or "
            "create a cache with a larger max_context_length."
        )
    check_intact(cache)
    return cache


def token_positions(
    cache: KVCache, tokens: int, num_tokens: NumTokens | None
) -> Int[Array, "*batch tokens"]:
    """`next_positions`, with -1 for padding: the tokens from ``num_tokens`` on."""
    positions = next_positions(cache, tokens)
    if num_tokens is None:
        return positions
    real = jnp.arange(tokens, dtype=jnp.int32) < jnp.asarray(num_tokens, jnp.int32)[..., None]
    return jnp.where(real, positions, -1)


def or_nan(numbers: Array, exists: Bool[Array, ""] | bool) -> Array:
    """The numbers, or as many that are NaN where what they were read from does not exist."""
    return numbers if exists is True else jnp.where(exists, numbers, jnp.nan)


def _in_range(
    cache: KVCache, layer: Layer, num_tokens: NumTokens | None, tokens: int
) -> Bool[Array, "*batch"] | bool:
    """Whether a traced layer exists, and traced numbers of real tokens are of those given."""
    exists = layer_exists(cache, layer)
    if num_tokens is None or is_concrete(num_tokens):
        return exists
    counts = jnp.asarray(num_tokens, jnp.int32)
    return exists & (counts >= 0) & (counts <= tokens)


def _decoded_dtype(cache: KVCache) -> jnp.dtype:
    return jnp.dtype(cache.config.codec.dtype or "float32")
