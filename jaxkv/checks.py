"""What the verbs refuse, before anything changes."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.errors import CacheClosedError, CacheFullError
from jaxkv.kv_cache import KVCache, Layer, NumTokens


def check_layer(cache: KVCache, layer: Layer) -> Layer:
    """The layer of a call on a cache that is still alive."""
    check_alive(cache)
    if isinstance(layer, jax.core.Tracer):
        return layer
    number, count = operator.index(layer), cache.config.num_layers
    if not 0 <= number < count:
        raise IndexError(f"layer {number} is out of range: the cache has layers 0 to {count - 1}.")
    return number


def check_counts(
    cache: KVCache, what: str, counts: NumTokens | None, most: int | None = None
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
    if isinstance(counts, jax.core.Tracer):
        return
    given = np.asarray(counts)  # inside jit, numpy's own functions trace even a constant
    if given.min() < 0 or (most is not None and given.max() > most):
        limits = "at least 0" if most is None else f"from 0 to {most}, the tokens given"
        raise ValueError(f"{what} must be {limits}, got {given.tolist()}.")


def check_vectors(
    cache: KVCache, what: str, vectors: Array, expected_shape: tuple[int, ...] | None = None
) -> None:
    config = cache.config
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise TypeError(f"{what} must be a float array, got {vectors.dtype}.")
    shape = vectors.shape
    tokens = shape[-3] if len(shape) >= 3 else "tokens"
    expected = (*config.batch_shape, tokens, config.num_kv_heads, config.head_dim)
    if shape != (expected_shape or expected) or shape != expected:
        axes = ["batch"] * len(config.batch_shape) + ["tokens", "kv_heads", "head_dim"]
        raise ValueError(
            f"{what} must be [{', '.join(axes)}] = {list(expected_shape or expected)}, "
            f"got {list(shape)}."
        )


def check_alive(cache: KVCache) -> None:
    leaves = jax.tree.leaves(cache)
    arrays = (leaf for leaf in leaves if isinstance(leaf, jax.Array))
    if any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in arrays):
        raise CacheClosedError(
            "This cache was donated or deleted: its buffers live on in the cache that the jitted "
            "function returned. Rebind it, as in `logits, cache = step(params, tokens, cache)`."
        )


def check_room(cache: KVCache, num_tokens: NumTokens) -> None:
    """Outside jit, refuse tokens that do not fit, before anything changes."""
    if isinstance(cache.lengths, jax.core.Tracer) or isinstance(num_tokens, jax.core.Tracer):
        return
    lengths, capacity = np.asarray(cache.lengths), cache.index.capacity
    after = lengths + np.asarray(num_tokens)
    if (after > capacity).any():
        sequence = "" if after.ndim == 0 else f"sequence {int(np.argmax(after))} "
        fullest = lengths.ravel()[np.argmax(after)] if after.ndim else lengths
        raise CacheFullError(
            f"KV cache full: {sequence}holds {fullest} of {capacity} tokens, and "
            f"{int(after.max() - fullest)} more were given. Nothing was written. truncate or "
            "reset the cache, or create one with a larger max_context_length."
        )
