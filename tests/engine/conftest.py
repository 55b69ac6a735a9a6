"""A model that all engines run, and what it answers to each prompt alone."""

import pytest

import jaxkv
from tests.decoders import sharp_decoder
from tests.engine.requests import CONTEXT, HOT, NEW, PROMPTS


@pytest.fixture(scope="package")
def model():
    return sharp_decoder()


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
