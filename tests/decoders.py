"""Models for tests: one to compare tokens of, and one of which every key is known."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig

TABLE = np.random.default_rng(0).standard_normal((16, 2, 16), np.float32)


def sharp_decoder(**fields):
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = DecoderConfig(64, 32, 48, **shape | fields)
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Sharper than at the start of training, so that the most likely token is never a near tie.
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...] * 30
    return model


def look_up(tokens, cache):
    """Keys and values of its one layer are rows of a table, those of padding (token 0) too."""
    vectors = jnp.asarray(TABLE)[tokens]
    cache = jaxkv.append(cache, vectors, vectors, layer=0)
    return vectors.reshape(*tokens.shape, -1), jaxkv.advance(cache, tokens.shape[-1])
