"""A model that all engines run, and what it answers to each prompt alone."""

import pytest
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig
from tests.engine.requests import CONTEXT, HOT, NEW, PROMPTS


@pytest.fixture(scope="package")
def model():
    config = DecoderConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Sharper than at the start of training, so that the most likely token is never a near tie.
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...] * 30
    return model


@pytest.fixture(scope="package")
def alone(model):
    """Tokens of each prompt by `generate`, one at a time, greedy and seeded."""

    def run(sampling):
        return [
            jaxkv.generate(
                model,
                [prompt],
                max_new_tokens=NEW,
                sampling=sampling,
                seed=seed,
                max_context_length=CONTEXT,
            ).tokens[0]
            for seed, prompt in enumerate(PROMPTS)
        ]

    return {sampling: run(sampling) for sampling in (jaxkv.Sampling(), HOT)}
