"""The tokens that policies keep are those that kvpress keeps, on the same random Llama."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models import load
from jaxkv.policies import select
from tests.models.variants import write_checkpoint
from tests.oracle import jit
from tests.policies.golden_cases import (
    CASES,
    GOLDENS,
    KVZIP_CHUNK,
    NUM_TOKENS,
    PREFIX_IDS,
    RATIO,
    VARIANT,
    context_ids,
)

KEEP = int(NUM_TOKENS * (1 - RATIO))


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_checkpoint(VARIANT, tmp_path_factory.mktemp("checkpoint")))[0]


@pytest.fixture(scope="module")
def prefilled(model):
    """The cache after the context, and the queries of all its tokens."""
    cache = jaxkv.create(model.cache_config(max_context_length=2 * NUM_TOKENS))
    observed = jit(lambda model, tokens, cache: jaxkv.observed(model)(tokens, cache))
    _, cache, queries = observed(model, jnp.asarray(context_ids()), cache)
    return cache, queries


@pytest.mark.parametrize("name", [name for name in CASES if name != "kvzip"])
def test_a_policy_keeps_what_kvpress_keeps(name, goldens, prefilled):
    cache, queries = prefilled
    policy = CASES[name][2]
    positions = jnp.broadcast_to(jnp.arange(NUM_TOKENS), (2, NUM_TOKENS))
    for layer, expected in enumerate(goldens[name]):
        keys, values = (vectors[:NUM_TOKENS] for vectors in jaxkv.layer(cache, layer))
        scores = jit(policy)(keys, values, queries[layer], positions)
        slots, kept = select(scores, positions, KEEP)
        np.testing.assert_array_equal(kept, expected)
        np.testing.assert_array_equal(slots, expected)


def test_kvzip_scores_what_kvpress_keeps(goldens, model, prefilled):
    cache, _ = prefilled
    scores = jaxkv.reconstruction_scores(
        model, jnp.asarray(context_ids()), cache, prompt=PREFIX_IDS, chunk=KVZIP_CHUNK
    )
    positions = jnp.broadcast_to(jnp.arange(NUM_TOKENS), (2, NUM_TOKENS))
    kept = [select(of_layer, positions, KEEP)[1] for of_layer in scores]
    np.testing.assert_array_equal(np.stack(kept), goldens["kvzip"])
