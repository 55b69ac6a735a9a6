"""What the verbs refuse, before anything changes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxkv.cache.hybrid import AnyCache, check_static_layer
from jaxkv.cache.kv_cache import KVCache, Layer, NumTokens, buffer_of, is_readable
from jaxkv.cache.shards import books_of
from jaxkv.devices import is_concrete
from jaxkv.errors import CacheClosedError, CacheFullError


def check_layer(cache: KVCache, layer: Layer) -> Layer:
    """The layer of a call on a cache that is still alive."""
    check_alive(cache)
    return check_static_layer(cache.config, layer) if is_concrete(layer) else layer


def layer_exists(cache: KVCache, layer: Layer) -> Bool[Array, ""] | bool:
    """Whether there is such a layer, of one that is traced."""
    if is_concrete(layer):
        return True
    return (layer >= 0) & (layer < cache.config.num_layers)


def check_counts(
    cache: AnyCache, what: str, counts: NumTokens | None, most: int | None = None
) -> None:
    """Refuse token counts that are not one for all sequences or one for each."""
    if counts is None:
        return
    numbers: Any = counts if isinstance(counts, jax.Array) else np.asarray(counts)
    shape, batch_shape = numbers.shape, cache.config.batch_shape
    allowed = "an int" + (f" or int32{list(batch_shape)}" if batch_shape else "")
    if shape not in ((), batch_shape) or not jnp.issubdtype(numbers.dtype, jnp.integer):
        got = f"{numbers.dtype}{list(shape)}"
        raise ValueError(f"{what} must be {allowed}, got {got}.")
    if not is_concrete(counts):
        return
    # Inside jit, numpy's own functions trace even a constant.
    given = np.asarray(jax.device_get(counts))
    if given.min() < 0 or (most is not None and given.max() > most):
        limits = "at least 0" if most is None else f"from 0 to {most}, the tokens given"
        raise ValueError(f"{what} must be {limits}, got {given.tolist()}.")


def check_rows(cache: KVCache, rows: Array) -> None:
    """Refuse rows of a batch that are not a list, or that do not exist."""
    count = cache.config.batch_size or 1
    if rows.ndim != 1 or rows.size == 0:
        raise ValueError(f"rows must be int32[rows], at least one, got shape {list(rows.shape)}.")
    if not is_concrete(rows):
        return
    given = np.asarray(jax.device_get(rows))
    if given.min() < 0 or given.max() >= count:
        raise IndexError(f"rows must be from 0 to {count - 1}, got {given.tolist()}.")


def rows_exist(cache: KVCache, rows: Array) -> Bool[Array, " rows"] | bool:
    """Whether there are such rows, of some that are traced."""
    if is_concrete(rows):
        return True
    return (rows >= 0) & (rows < (cache.config.batch_size or 1))


def check_pair(cache: KVCache, keys: Array, values: Array | None) -> None:
    """Refuse keys and values that are not of the cache's shape, or values that it does not keep."""
    config = cache.config
    _check_vectors(cache, "keys", keys, config.head_dim)
    if config.values_in_keys and values is not None:
        raise ValueError(
            "values must be left out: this cache has values_in_keys, so each is the first "
            f"{config.pair.value_dim} numbers of its key. Got values {list(values.shape)}."
        )
    if values is None:
        if config.values_in_keys:
            return
        raise ValueError("values must be given: this cache keeps them beside its keys. Got None.")
    tokens = keys.shape[-3]
    _check_vectors(cache, "values", values, config.pair.value_dim, tokens)


def _check_vectors(
    cache: KVCache, what: str, vectors: Array, size: int, num_tokens: int | None = None
) -> None:
    config, shape = cache.config, vectors.shape
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise TypeError(f"{what} must be a float array, got {vectors.dtype}.")
    tokens: Any = num_tokens
    if tokens is None:
        tokens = shape[-3] if len(shape) >= 3 else "tokens"
    expected = (*config.batch_shape, tokens, config.num_kv_heads, size)
    if shape != expected:
        last = "head_dim" if size == config.head_dim else "value_dim"
        axes = ["batch"] * len(config.batch_shape) + ["tokens", "kv_heads", last]
        raise ValueError(
            f"{what} must be [{', '.join(axes)}] = {list(expected)}, got {list(shape)}."
        )


def check_queries(cache: KVCache, queries: Array) -> None:
    config = cache.config
    if not jnp.issubdtype(queries.dtype, jnp.floating):
        raise TypeError(f"queries must be a float array, got {queries.dtype}.")
    shape, axes = (
        queries.shape,
        ["batch"] * len(config.batch_shape) + ["tokens", "heads", "head_dim"],
    )
    fits = (
        len(shape) == len(axes)
        and shape[:-3] == config.batch_shape
        and shape[-1] == config.head_dim
        and shape[-2] % config.num_kv_heads == 0
    )
    if not fits:
        expected = [
            *config.batch_shape,
            "tokens",
            f"a multiple of {config.num_kv_heads}",
            config.head_dim,
        ]
        raise ValueError(
            f"queries must be [{', '.join(axes)}] = [{', '.join(map(str, expected))}], "
            f"got {list(shape)}."
        )


def check_alive(cache: AnyCache) -> None:
    leaves = jax.tree.leaves(cache)
    arrays = (leaf for leaf in leaves if isinstance(leaf, jax.Array))
    if any(is_concrete(leaf) and leaf.is_deleted() for leaf in arrays):
        raise CacheClosedError(
            "This cache was donated or deleted: its buffers live on in the cache that the jitted "
            "function returned. Rebind it, as in `logits, cache = step(params, tokens, cache)`."
        )


def check_stateless(cache: AnyCache, verb: str, instead: str) -> None:
    """Refuse a cache with layers that keep a state, for what cannot do anything about them."""
    if cache.states:
        layers = [layer for each in cache.config.states for layer in each.layers]
        raise ValueError(
            f"{verb}: layers {layers} of this cache keep a state, which is of no tokens that could "
            f"be told apart. {instead}"
        )


def check_here(cache: KVCache) -> None:
    """Refuse a cache of which this process holds a part, where all of it is to be read."""
    leaf = buffer_of(cache)
    here = is_readable(leaf)
    if not here:
        raise ValueError(
            "This cache is spread over several processes, and each holds a part of it. Gather it "
            "first, in all of them: "
            "jax.experimental.multihost_utils.process_allgather(cache, tiled=True)."
        )


def check_chunk(cache: KVCache, tokens: int) -> None:
    """Refuse more tokens at once than the addressing was made for."""
    chunk = cache.index.chunk
    if chunk is not None and tokens > chunk:
        raise ValueError(
            f"this {cache.config.addressing.name} takes {chunk} tokens at a time, got {tokens}: "
            f"later ones would write over what earlier ones still see. Prefill in chunks of "
            f"{chunk}, or create the cache with a larger chunk."
        )


def check_room(cache: KVCache, num_tokens: NumTokens) -> None:
    """Outside jit, refuse tokens that do not fit, before anything changes."""
    if not is_concrete(cache.lengths, num_tokens):
        return
    lengths, room, _ = books_of(cache)
    given = np.asarray(jax.device_get(num_tokens))
    if cache.real_tokens is not None:  # the rest of a padded step takes no room
        given = np.minimum(given, jax.device_get(cache.real_tokens))
    after = lengths + given
    if (after > room).any():
        worst = int(np.argmax(after - room))
        sequence = "" if after.ndim == 0 else f"sequence {worst} "
        held, most = lengths.ravel()[worst], room.ravel()[worst]
        cure = "create one with a larger max_context_length"
        if most < cache.index.capacity:
            cure = "assign it more pages"
            if cache.index.per_head:
                cure = "make room with jaxkv.evict, or compress with a larger new"
        raise CacheFullError(
            f"KV cache full: {sequence}holds {held} of {most} tokens, and "
            f"{int(after.ravel()[worst] - held)} more were given. Nothing was written. truncate "
            f"or reset the cache, or {cure}."
        )


def check_intact(cache: KVCache) -> None:
    """Outside jit, refuse a rollback to tokens that the next query would see, and that are lost."""
    if not is_concrete(cache.lengths):
        return
    lengths, _, intact = books_of(cache)
    if intact.all():
        return
    raise ValueError(f"cannot roll back to {lengths.tolist()} tokens: {cache.how_lost}")


def checked_prompt(
    prompt: Sequence[int], vocabulary: int | None, what: str = "a prompt"
) -> np.ndarray:
    """The ids of a prompt, int32, all of them in the vocabulary if that is known.

    Raises:
      ValueError: an empty prompt, what are no ints, or a token outside the vocabulary.
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        got = "an empty one" if ids.size == 0 else f"{ids.dtype} of shape {ids.shape}"
        raise ValueError(f"{what} must be a list of at least one token id, got {got}.")
    bad = ids[(ids < 0) | (ids >= (vocabulary or np.iinfo(np.int32).max))]
    if bad.size:
        raise ValueError(
            f"{what} has token {bad[0]}, outside the vocabulary of {vocabulary} tokens."
        )
    return ids.astype(np.int32)
