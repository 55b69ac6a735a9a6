"""A small model, and two kinds of pools for it, one with all that an engine's cache can have."""

import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.models.shape import Shape
from tests.engine.requests import CHUNK, PAGE

embedding = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)


def model(tokens, cache):
    """Its answer is a mix of all that it sees, and of little else."""
    x = embedding[tokens]
    for layer in range(2):
        heads = x.reshape(*x.shape[:-1], 2, 16)
        cache = jaxkv.append(cache, heads, heads, layer=layer)
        x = jaxkv.attend(cache, heads, layer=layer, scale=0.1).reshape(x.shape)
    return 0.5 * x @ embedding.T, jaxkv.advance(cache, tokens.shape[-1])


SHAPE = {"num_kv_heads": 2, "head_dim": 16}
FIELDS = {"max_context_length": 96, "batch_size": 2, "addressing": jaxkv.Paged(PAGE, 14)}
POOLS = {
    # Of layers that see 20 tokens a pool has the newest alone.
    "windows": Shape(2, **SHAPE)
    .sliding(20, full_every=2)
    .cache_config(codec=jaxkv.Dense("float32"), chunk=CHUNK, **FIELDS),
    # Two copies of the newest tokens that differ, and prompts that do not end with a chunk.
    "newest too": jaxkv.KVCacheConfig(
        2,
        codec=jaxkv.Centred(jaxkv.Rotated(2)),
        newest=jaxkv.Newest(5, jaxkv.Centred(jaxkv.Int8())),
        **SHAPE,
        **FIELDS,
    ),
    "centred int8": jaxkv.KVCacheConfig(2, codec=jaxkv.Centred(jaxkv.Int8()), **SHAPE, **FIELDS),
}


def engine(config, **options):
    hot = jaxkv.Sampling(temperature=1.0)  # or it would say one word over and over
    options = {"prefill_chunk": CHUNK, "decode_steps": 4, "sampling": hot} | options
    return jaxkv.Engine(model, config, **options)
