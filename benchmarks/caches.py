"""Caches that hold a long context already, without a prefill of minutes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxkv


@functools.partial(jax.jit, static_argnames="num_tokens", donate_argnames="cache")
def _fill(cache: jaxkv.KVCache, seed: jax.Array, num_tokens: int) -> jaxkv.KVCache:
    config = cache.config
    shape = (*config.batch_shape, num_tokens, config.num_kv_heads)

    def one_layer(cache, layer):
        key = jax.random.fold_in(jax.random.key(seed), layer)
        own = jax.random.split(key)
        keys = jax.random.normal(own[0], (*shape, config.head_dim), jnp.float32)
        values = jax.random.normal(own[1], (*shape, config.pair.value_dim), jnp.float32)
        values = None if config.values_in_keys else values
        return jaxkv.append(cache, keys, values, layer=layer), None

    cache, _ = lax.scan(one_layer, cache, jnp.arange(config.num_layers))
    return jaxkv.advance(cache, num_tokens)


def filled(config: jaxkv.KVCacheConfig, num_tokens: int) -> jaxkv.KVCache:
    """A cache that holds ``num_tokens`` tokens of normal noise in every layer.

    A paged one has its pages in random order, as after a while of use.
    """
    cache = jaxkv.create(config)
    if isinstance(cache.index, jaxkv.addressing.PagedIndex):
        pages = np.random.default_rng(0).permutation(cache.index.table.size).astype(np.int32)
        index = cache.index.with_table(pages.reshape(cache.index.table.shape))
        cache = dataclasses.replace(cache, index=index)
    return _fill(cache, jnp.int32(0), num_tokens)


def compile_fill(config: jaxkv.KVCacheConfig, num_tokens: int) -> None:
    """So that `filled` need not."""
    cache = jax.eval_shape(functools.partial(jaxkv.create, config))
    _fill.lower(cache, jax.ShapeDtypeStruct((), jnp.int32), num_tokens).compile()


def layer_vectors(cache: jaxkv.KVCache, layer: int) -> np.ndarray:
    """What one layer holds, float32: ``[2, *batch, ctx, kv_heads, head_dim]``, for a peer."""
    return np.stack([np.asarray(part, np.float32) for part in jaxkv.layer(cache, layer)])
