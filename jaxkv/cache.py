"""The cache and its verbs: a value, and pure functions from value to value.

Under `jax.jit` with the cache donated every update is in place. Outside jit an update
copies, as for any immutable array.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from jaxkv.addressing import Index
from jaxkv.codecs import Dense, Leaves, bitcast, container_dtype, decode_stored
from jaxkv.config import KVCacheConfig, sequences
from jaxkv.errors import CacheClosedError, CacheFullError

# A static layer number, or a traced one inside a scan over layers.
Layer = int | Int[Array, ""]
# Tokens processed: one number for all sequences, or one for each of a ragged batch.
NumTokens = int | Int[Array, "*batch"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["storage", "index"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class KVCache:
    """Keys and values of every token so far, and where they are. Made by `create`.

    Attributes:
      storage: one buffer a codec leaf, ``[layers, 2, ctx, kv_heads, ...]``; axis 1 is keys,
        values. On a CPU a bfloat16 buffer has dtype uint16 (see `container_dtype`); use
        `layer` to get numbers.
      index: which slot holds which token; `lengths` is part of it.
      config: the static description.
    """

    storage: Leaves
    index: Index
    config: KVCacheConfig

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence. More than the capacity once a write was dropped."""
        return self.index.lengths

    @property
    def overflowed(self) -> Bool[Array, "*batch"]:
        """True for a sequence that was given more tokens than it can hold."""
        return self.lengths > self.index.capacity

    @property
    def size_bytes(self) -> int:
        """Bytes of the keys and values; equal to ``config.size_bytes``."""
        return sum(leaf.nbytes for leaf in self.storage.values())

    def __repr__(self) -> str:
        config = self.config
        batch = "" if config.batch_size is None else f"{sequences(config.batch_size)}, "
        return (
            f"KVCache({config.num_layers} layers, {config.num_kv_heads} KV heads x "
            f"{config.head_dim}, {config.codec.name}, {config.addressing.name}, {batch}"
            f"{_tokens_held(self)} of {config.max_context_length} tokens, "
            f"{format_bytes(config.size_bytes)})"
        )


def create(config: KVCacheConfig, *, device: Any = None) -> KVCache:
    """An empty cache: every buffer preallocated and zero.

    Args:
      config: its shape.
      device: a `jax.Device` or `jax.sharding.Sharding` for the buffers; JAX's default if None.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 16, 1, 4, codec=jaxkv.Dense("float32")))
    >>> cache.storage["data"].shape
    (2, 2, 16, 1, 4)
    """
    platform = _platform(device)
    prefix = (config.num_layers, 2, config.num_slots, config.num_kv_heads)
    storage = {
        name: jnp.zeros((*prefix, *shape), container_dtype(dtype, platform), device=device)
        for name, (shape, dtype) in config.codec.leaves(config.head_dim).items()
    }
    index = config.addressing.init(config.max_context_length, config.batch_size)
    if isinstance(device, jax.Device):
        index = jax.device_put(index, device)
    return KVCache(storage, index, config)


def append(
    cache: KVCache,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
) -> KVCache:
    """Write the keys and values of the next tokens into one layer. Lengths do not move.

    Args:
      keys, values: ``[tokens, kv_heads, head_dim]``, with a leading ``[batch]`` exactly when
        the config has a ``batch_size``. Any float dtype; the codec rounds.
      layer: which layer; may be traced.
      num_tokens: how many of ``tokens`` are real, for prompts padded on the right. All if None.

    Raises:
      CacheFullError: outside jit, when a sequence has not enough slots left. Inside jit the
        tokens that do not fit are dropped and `check` says so once `advance` has counted them.
      IndexError, TypeError, ValueError: a bad layer, dtype or shape.
    """
    num_layer = check_layer(cache, layer)
    _check_vectors(cache, "keys", keys)
    _check_vectors(cache, "values", values, expected_shape=keys.shape)
    tokens = keys.shape[-3]
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    _check_room(cache, tokens if num_tokens is None else num_tokens)

    slots = cache.index.slots(token_positions(cache, tokens, num_tokens))
    # Places that do not exist get numbers past the end, each its own: the scatter drops
    # them, and may still be told that no two writes meet.
    past_the_end = cache.config.num_slots + jnp.arange(slots.size, dtype=jnp.int32)
    slots = jnp.where(slots < 0, past_the_end.reshape(slots.shape), slots)
    encoded = cache.config.codec.encode(jnp.stack([keys, values], axis=-3))
    storage = {
        name: leaf.at[num_layer, :, slots].set(
            bitcast(encoded[name], leaf.dtype), mode="drop", unique_indices=True
        )
        for name, leaf in cache.storage.items()
    }
    return dataclasses.replace(cache, storage=storage)


def advance(cache: KVCache, num_tokens: NumTokens) -> KVCache:
    """Count the appended tokens, once a step, after the last layer.

    Raises:
      CacheFullError: outside jit, when that is more than a sequence can hold.
      ValueError: a bad shape of ``num_tokens`` or, outside jit, a negative number.
    """
    check_counts(cache, "num_tokens", num_tokens)
    _check_alive(cache)
    _check_room(cache, num_tokens)
    lengths = cache.lengths + jnp.asarray(num_tokens, jnp.int32)
    return dataclasses.replace(cache, index=cache.index.with_lengths(lengths))


def next_positions(cache: KVCache, num_tokens: int) -> Int[Array, "*batch tokens"]:
    """The positions of the next ``num_tokens`` tokens, for rope or a position embedding.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 3)
    >>> jaxkv.next_positions(cache, 2).tolist()
    [3, 4]
    """
    _check_alive(cache)
    return cache.lengths[..., None] + jnp.arange(num_tokens, dtype=jnp.int32)


def layer(
    cache: KVCache, layer: Layer
) -> tuple[
    Float[Array, "*batch ctx kv_heads head_dim"], Float[Array, "*batch ctx kv_heads head_dim"]
]:
    """The decoded keys and values of one layer, all slots, in logical order.

    Slots at or past a sequence's length hold zeros or tokens that were rolled back: mask
    them. `attend` does, and reads less.

    Raises:
      IndexError: no such layer.
    """
    number = check_layer(cache, layer)
    keys, values = read(cache, number, 0, cache.index.capacity, _decoded_dtype(cache))
    return keys, values


def truncate(cache: KVCache, length: NumTokens) -> KVCache:
    """Roll back to the first ``length`` tokens: the rest is forgotten and written over.

    Raises:
      ValueError: a bad shape of ``length`` or, outside jit, a negative one. One beyond the
        cache's own changes nothing.
    """
    _check_alive(cache)
    check_counts(cache, "length", length)
    lengths = jnp.minimum(cache.lengths, jnp.asarray(length, jnp.int32))
    return dataclasses.replace(cache, index=cache.index.with_lengths(lengths))


def reset(cache: KVCache) -> KVCache:
    """The same buffers, empty. Old tokens stay in memory until written over, never to be read."""
    return truncate(cache, 0)


def check(cache: KVCache) -> KVCache:
    """Return the cache if it is sound.

    Inside jit this does nothing, unless the function is run under `checkify`.

    Raises:
      CacheFullError: tokens were dropped inside jit because their sequence was full.
      CacheClosedError: the buffers were donated or deleted.
    """
    if isinstance(cache.lengths, jax.core.Tracer):
        checkify.debug_check(~cache.overflowed.any(), "KV cache full: tokens were dropped")
        return cache
    _check_alive(cache)
    if cache.overflowed.any():
        raise CacheFullError(
            f"Tokens were dropped: sequences are {np.asarray(cache.lengths).tolist()} tokens long, "
            f"and the cache holds {cache.index.capacity} each. The first {cache.index.capacity} "
            "are intact; truncate to them, or create a cache with a larger max_context_length."
        )
    return cache


def token_positions(
    cache: KVCache, tokens: int, num_tokens: NumTokens | None
) -> Int[Array, "*batch tokens"]:
    """`next_positions`, with -1 for padding: the tokens from ``num_tokens`` on."""
    positions = next_positions(cache, tokens)
    if num_tokens is None:
        return positions
    real = jnp.arange(tokens) < jnp.asarray(num_tokens)[..., None]
    return jnp.where(real, positions, -1)


def read(
    cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int, dtype: Any
) -> Float[Array, "2 *batch size kv_heads head_dim"]:
    """Decode ``size`` logical slots of one layer."""
    config = cache.config
    stored = {
        name: cache.index.read(leaf, layer, start, size) for name, leaf in cache.storage.items()
    }
    return decode_stored(config.codec, stored, config.head_dim, dtype)


def format_bytes(size: float) -> str:
    """Bytes as people read them, in decimal units: ``536.9 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _platform(device: Any) -> str:
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    if isinstance(device, jax.sharding.Sharding):
        device = next(iter(device.device_set))
    return jax.default_backend() if device is None else device.platform


def _decoded_dtype(cache: KVCache) -> jnp.dtype:
    codec = cache.config.codec
    return jnp.dtype(codec.dtype if isinstance(codec, Dense) else "float32")


def _tokens_held(cache: KVCache) -> str:
    lengths = cache.lengths
    if isinstance(lengths, jax.core.Tracer) or not isinstance(lengths, jax.Array):
        return "?"
    if lengths.is_deleted():
        return "donated, ?"
    held = np.asarray(lengths).tolist()
    return str(held if isinstance(held, int) or len(held) <= 8 else f"{min(held)} to {max(held)}")


def check_layer(cache: KVCache, layer: Layer) -> Layer:
    """The layer of a call on a cache that is still alive."""
    _check_alive(cache)
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
    shape, batch_shape = jnp.shape(counts), cache.config.batch_shape
    allowed = "an int" + (f" or int32{list(batch_shape)}" if batch_shape else "")
    if shape not in ((), batch_shape) or not jnp.issubdtype(jnp.result_type(counts), jnp.integer):
        got = f"{jnp.result_type(counts)}{list(shape)}"
        raise ValueError(f"{what} must be {allowed}, got {got}.")
    if isinstance(counts, jax.core.Tracer):
        return
    given = np.asarray(counts)  # inside jit, numpy's own functions trace even a constant
    if given.min() < 0 or (most is not None and given.max() > most):
        limits = "at least 0" if most is None else f"from 0 to {most}, the tokens given"
        raise ValueError(f"{what} must be {limits}, got {given.tolist()}.")


def _check_vectors(
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


def _check_alive(cache: KVCache) -> None:
    leaves = jax.tree.leaves(cache)
    if any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves):
        raise CacheClosedError(
            "This cache was donated or deleted: its buffers live on in the cache that the jitted "
            "function returned. Rebind it, as in `logits, cache = step(params, tokens, cache)`."
        )


def _check_room(cache: KVCache, num_tokens: NumTokens) -> None:
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
