"""transformers' QuantizedCache with its two backends, HQQ and quanto, emulated in a float32 cache.

Of transformers 5.24 (`cache_utils.QuantizedLayer`) with its defaults: groups of 64 along axis 0,
and up to 128 new tokens as they came. Once there are 128, all tokens held are decoded, joined with
them and rounded anew, the old ones once more. HQQ rounds as `hqq.core.quantize.Quantizer` of hqq
0.2.8 does, quanto as its `MaxOptimizer` of optimum-quanto 0.2.7.

A prompt attends to itself as it came, and so does each token to those after the last rounding: as
there. What is counted is what is stored: codes, a scale and a zero of 16 bits for 64 numbers, and
64 tokens, which wait on average, in 16 bits. Scales and zeros are not rounded, in their favour.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

import jaxkv

WINDOW = 128  # tokens after which all are rounded
_GROUP = 64  # numbers that share a scale
# Of HQQ's search for zeros (Badri and Shaji, 2023): ``|error| ** 0.7`` is made small.
_NORM, _BETA, _STEPS = 0.7, 10.0, 20
_LARGEST_SCALE = 2e4


def quantized_cache_bits(head_dim: int, tokens: int, *, bits: int) -> float:
    """A number, of a cache of so many tokens."""
    waiting = min(WINDOW // 2, tokens)
    return ((tokens - waiting) * (bits + 32 / _GROUP) + waiting * 16) / tokens


def hqq_flushed(cache: jaxkv.KVCache, chunk: int, *, bits: int) -> jaxkv.KVCache:
    """The cache after `WINDOW` tokens were added."""
    return _flushed(cache, functools.partial(_hqq, bits=bits))


def quanto_flushed(cache: jaxkv.KVCache, chunk: int, *, bits: int) -> jaxkv.KVCache:
    """Likewise."""
    return _flushed(cache, functools.partial(_quanto, bits=bits))


def _flushed(cache: jaxkv.KVCache, rounded: Callable[[Array, Array], Array]) -> jaxkv.KVCache:
    data = cache.storage["data"]  # [layers, 2, ctx, kv_heads, head_dim]
    sides = data.reshape(-1, *data.shape[2:])
    sides = lax.map(lambda side: rounded(side, cache.lengths), sides)
    return dataclasses.replace(cache, storage={"data": sides.reshape(data.shape)})


def _quanto(side: Array, length: Array, *, bits: int) -> Array:
    """Along axis 0 of ``[1, kv_heads, tokens, head_dim]``: 64 numbers in a row share a scale."""
    groups = side.reshape(-1, _GROUP)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / ((1 << bits) - 1)
    codes = jnp.round((groups - low) / jnp.where(scale == 0, 1, scale))
    held = jnp.arange(len(side)) < length
    return jnp.where(held[:, None, None], (codes * scale + low).reshape(side.shape), side)


def _hqq(side: Array, length: Array, *, bits: int) -> Array:
    """Axis 0 there: number i of 64 equal parts, one after the other, of all that is held.

    For whole windows these are 64 numbers of one channel, from tokens of all heads.
    """
    ctx, kv_heads, _ = side.shape
    count = kv_heads * length // _GROUP  # vectors in each of the parts
    within = jnp.arange(kv_heads * ctx // _GROUP)
    vector = jnp.arange(_GROUP)[:, None] * count + within
    token = jnp.where(within < count, vector % length, ctx)  # past the end where there is none
    head = vector // length
    held = (within < count)[None, :, None]
    groups = jnp.where(held, side.at[token, head].get(mode="fill", fill_value=0), 0)
    return side.at[token, head].set(_hqq_rounded(groups, held, bits), mode="drop")


def _hqq_rounded(groups: Array, held: Array, bits: int) -> Array:
    """Each group on the first axis; the search ends when the mean error of all does not fall."""
    most = (1 << bits) - 1
    low, high = groups.min(axis=0), groups.max(axis=0)
    scale = jnp.where(high - low <= 1e-4, 1, most / (high - low))
    scale = jnp.minimum(scale, _LARGEST_SCALE)

    def coded(zero: Array) -> Array:
        return jnp.clip(jnp.round(groups * scale + zero), 0, most)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        zero, least, _, number = state
        codes = coded(zero)
        errors = groups - (codes - zero) / scale
        sizes = jnp.abs(errors)
        power = jnp.exp((_NORM - 1) * jnp.log(jnp.where(sizes > 0, sizes, 1)))
        shrunk = jnp.maximum(sizes - power / _BETA, 0)
        moved = (codes - (groups - jnp.sign(errors) * shrunk) * scale).mean(axis=0)
        error = jnp.sum(jnp.where(held, sizes, 0))
        return moved, jnp.minimum(error, least), error < least, number + 1

    first = (-low * scale, jnp.float32(jnp.inf), jnp.bool_(True), jnp.int32(0))
    zero, *_ = lax.while_loop(lambda state: state[2] & (state[3] < _STEPS), step, first)
    return (coded(zero) - zero) / scale
