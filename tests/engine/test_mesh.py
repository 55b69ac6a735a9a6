"""An engine over a mesh: what one device answers, whichever rank a request runs on."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxkv
from tests.decoders import sharp_decoder
from tests.engine.requests import CHUNK, CONTEXT, HOT, PAGE, PAGES, PROMPTS, run

pytestmark = pytest.mark.devices(8)

NEW = 10
# Axis sizes by what they split; 4 KV heads, so 8 devices hold each twice.
SPLITS = {
    "batch 2 x heads 4": {"batch": 2, "heads": 4},
    "batch 8": {"batch": 8},
    "heads 8": {"heads": 8},
}


@pytest.fixture(scope="module")
def model():
    return sharp_decoder(num_heads=8, num_kv_heads=4)


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of each prompt by `generate`, one at a time, on one device."""

    @functools.cache
    def tokens(number, seed, sampling):
        options = {"max_new_tokens": NEW, "max_context_length": CONTEXT, "sampling": sampling}
        return jaxkv.generate(model, [PROMPTS[number]], seed=seed, **options).tokens[0]

    return tokens


def engine(model, split, axis_type=AxisType.Auto, num_rows=8, num_pages=PAGES, **options):
    """With so many pages on each rank."""
    sizes = SPLITS[split]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))
    config = model.cache_config(
        max_context_length=CONTEXT,
        batch_size=num_rows,
        codec=jaxkv.Dense("float32"),
        addressing=jaxkv.Paged(PAGE, num_pages * sizes.get("batch", 1)),
    )
    options = {"prefill_chunk": CHUNK, "decode_steps": 4, "token_budget": 48} | options
    axes = jaxkv.Axes(**{what: what for what in sizes})
    return jaxkv.Engine(model, config, mesh=mesh, axes=axes, **options)


@pytest.mark.parametrize("sampling", [jaxkv.Sampling(), HOT], ids=["greedy", "seeded"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_those_of_each_request_alone(model, alone, split, axis_type, sampling):
    with engine(model, split, axis_type, sampling=sampling) as running:
        requests = [
            running.submit(prompt, max_new_tokens=NEW, seed=seed)
            for seed, prompt in enumerate(PROMPTS)
        ]
        run(running)
        expected = [alone(number, number, sampling) for number in range(len(PROMPTS))]
        assert [request.tokens for request in requests] == expected
        assert {request.rank for request in requests} == set(range(len(running.pages)))
