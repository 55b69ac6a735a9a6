"""Keys and values to what a cache stores of them, and back."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.cache.kv_cache import KVCache, Layer
from jaxkv.codecs import Leaves, Offsets, State, bitcast, refuse_gradient
from jaxkv.placement import read_slots

Vectors = Float[Array, "*batch size kv_heads _"]


def state_of(cache: KVCache, layer: Layer) -> State:
    """The codec's state of one layer."""
    return {name: array[layer] for name, array in cache.codec_state.items()}


def offsets_of(cache: KVCache, layer: Layer) -> Offsets | None:
    """What one layer's vectors were stored less, see `Codec.offsets`."""
    return cache.config.codec.offsets(state_of(cache, layer))


def encode(
    cache: KVCache,
    layer: Layer,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads value_dim"] | None,
    positions: Int[Array, "*batch tokens"],
    queries: Float[Array, "*batch tokens heads head_dim"] | None = None,
) -> tuple[Leaves, State]:
    """Leaves ``[sides, *batch, tokens, kv_heads, ...]``, and the codec's state of all layers."""
    if not cache.codec_state:
        return cache.config.pair.encode(keys, values), {}
    assert values is not None
    codec = cache.config.codec
    vectors = refuse_gradient(codec, jnp.stack([keys, values]))
    own = state_of(cache, layer)
    if not cache.learns:
        return codec.encode_tokens(vectors, own, positions), cache.codec_state
    also: dict[str, Any] = {"queries": queries} if codec.asks_queries else {}
    if cache.part_of is not None and codec.learns_over_devices:
        also["axis"] = cache.part_of.axes.batch
    own = codec.update_state(own, vectors, positions, cache.lengths, **also)
    encoded = codec.encode_tokens(vectors, own, positions)
    state = {name: whole.at[layer].set(own[name]) for name, whole in cache.codec_state.items()}
    return encoded, state


def read(
    cache: KVCache,
    layer: Layer,
    start: Int[Array, ""] | int,
    size: int,
    dtype: Any,
    *,
    lengths: Int[Array, " batch"] | None = None,
    rotated: bool = False,
) -> tuple[Vectors, Vectors]:
    """Decode ``size`` logical slots of one layer, of sequences that have these lengths by now.

    Values are as wide as `Pair.decode` gives them, for `Pair.cut`.
    """
    codec, shape = cache.config.codec, cache.lengths.shape
    leaves, head_dim = _leaves(cache, layer, start, size), cache.config.head_dim
    if not cache.codec_state:  # which is all that asks for positions
        return cache.config.pair.decode(leaves, dtype, rotated=rotated)
    slots = start + jnp.arange(size, dtype=jnp.int32)
    if (share := cache.index.share) is not None:
        slots = slots * share.size + share.rank
    lengths = cache.lengths if lengths is None else lengths.reshape(shape)
    positions = cache.index.key_positions(layer, lengths, start, size)
    positions = jnp.where(positions < 0, slots, positions)  # tokens that are not counted yet
    positions = positions.reshape(*shape, -1, size).swapaxes(-1, -2)
    state = state_of(cache, layer)
    both = codec.decode_tokens(leaves, head_dim, dtype, state, positions, rotated=rotated)
    return both[0], both[1]


def read_stored(
    cache: KVCache,
    layer: Layer,
    start: Int[Array, ""] | int,
    size: int,
    lengths: Int[Array, " batch"],
) -> tuple[Vectors, Vectors]:
    """The same for attention, float32: rotated by the codec, and less their `offsets_of`."""
    wide = jnp.dtype("float32")
    if offsets_of(cache, layer) is None:
        return read(cache, layer, start, size, wide, lengths=lengths, rotated=True)
    return cache.config.pair.decode(_leaves(cache, layer, start, size), wide, rotated=True)


def is_second(
    cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int
) -> Bool[Array, "2 *batch size kv_heads"] | None:
    """Which of these slots' vectors were stored less the second of `offsets_of`."""
    return cache.config.codec.is_second(_leaves(cache, layer, start, size))


def _leaves(cache: KVCache, layer: Layer, start: Int[Array, ""] | int, size: int) -> Leaves:
    """As read from the buffers, in the dtypes that the codec gave them."""
    return {
        name: bitcast(read_slots(cache.index, cache.storage[name], layer, start, size), spec.dtype)
        for name, spec in cache.config.pair.leaves.items()
    }
