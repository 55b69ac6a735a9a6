"""KIVI (Liu et al., 2024), emulated in a float32 cache.

It rounds a group of 32 tokens' numbers of one key channel together, and so keeps new tokens in
full precision until there are 32 of them: no codec of this project, which stores every token at
once and for good. Here the exact cache's tokens are rounded in place when KIVI would have, with
the smallest residual that it allows; a prompt attends to itself in full precision, as in KIVI.
What is counted is what it would have stored: 2 bits, a scale and a zero of 16 bits for 32 numbers,
and the residual, 16 tokens on average, in 16 bits.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

import jaxkv

GROUP = 32  # tokens of a key channel, or channels of a token's value


def kivi_bits(head_dim: int, tokens: int, *, bits: int) -> float:
    """A number, of a cache of so many tokens."""
    rounded = max(tokens - GROUP / 2, 0)
    return (rounded * (bits + 32 / GROUP) + (tokens - rounded) * 16) / tokens


def kivi_flushed(cache: jaxkv.KVCache, chunk: int, *, bits: int) -> jaxkv.KVCache:
    """The cache after a chunk was added: whole groups of tokens are rounded."""
    data = cache.storage["data"]  # [layers, 2, ctx, kv_heads, head_dim]
    held = jnp.arange(data.shape[2]) < cache.lengths // GROUP * GROUP
    rounded = jnp.stack([rounded_keys(data[:, 0], bits), rounded_values(data[:, 1], bits)], axis=1)
    data = jnp.where(held[:, None, None], rounded, data)
    return dataclasses.replace(cache, storage={"data": data})


def rounded_keys(keys: Array, bits: int) -> Array:
    """``[..., tokens, heads, head_dim]``, 32 tokens of a channel together."""
    *batch, tokens, heads, head_dim = keys.shape
    grouped = keys.reshape(*batch, tokens // GROUP, GROUP, heads, head_dim)
    return _rounded(grouped, bits, axis=-3).reshape(keys.shape)


def rounded_values(values: Array, bits: int) -> Array:
    """32 channels of a token together."""
    size = min(GROUP, values.shape[-1])
    grouped = values.reshape(*values.shape[:-1], -1, size)
    return _rounded(grouped, bits, axis=-1).reshape(values.shape)


def _rounded(groups: Array, bits: int, axis: int) -> Array:
    """Asymmetric, to ``2 ** bits`` steps; a group that was rounded before stays as it is."""
    low, high = groups.min(axis=axis, keepdims=True), groups.max(axis=axis, keepdims=True)
    step, low = (
        lax.reduce_precision(number, exponent_bits=8, mantissa_bits=7)
        for number in ((high - low) / ((1 << bits) - 1), low)
    )
    codes = jnp.round((groups - low) / jnp.where(step == 0, 1, step))
    return jnp.clip(codes, 0, (1 << bits) - 1) * step + low
