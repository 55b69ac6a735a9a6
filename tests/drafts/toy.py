"""A model that compiles in a moment, whose tokens depend on all that its cache holds."""

import jax.numpy as jnp
import numpy as np

import jaxkv

HEADS, HEAD_DIM, VOCABULARY = 2, 16, 12
_RANDOM = np.random.default_rng(5)
_VECTORS = _RANDOM.standard_normal((VOCABULARY, HEADS, HEAD_DIM), np.float32)
_HEAD = 4 * _RANDOM.standard_normal((HEADS * HEAD_DIM, VOCABULARY), np.float32)


def toy(tokens, cache):
    """One layer of attention over the vectors of tokens, and a head."""
    vectors = jnp.asarray(_VECTORS)[tokens]
    cache = jaxkv.append(cache, vectors, vectors[..., ::-1], layer=0)
    seen = jaxkv.attend(cache, vectors, layer=0) + vectors
    logits = jnp.einsum("btf,fv->btv", seen.reshape(*tokens.shape, -1), jnp.asarray(_HEAD))
    return logits, jaxkv.advance(cache, tokens.shape[-1])


def config_of(batch_size, **fields):
    return jaxkv.KVCacheConfig(1, 64, HEADS, HEAD_DIM, batch_size=batch_size, **fields)
