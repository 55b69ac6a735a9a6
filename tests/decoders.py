"""A model for tests that compare tokens."""

from flax import nnx

from jaxkv.models import Decoder, DecoderConfig


def sharp_decoder(**fields):
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = DecoderConfig(64, 32, 48, **shape, **fields)
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Sharper than at the start of training, so that the most likely token is never a near tie.
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...] * 30
    return model
