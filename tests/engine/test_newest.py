"""Newest tokens by a finer codec in an engine: of answers, whatever becomes of their rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.engine.pools import POOLS, engine, model
from tests.engine.requests import CHUNK, PROMPTS

CONFIG = POOLS["newest too"]
GREEDY = jaxkv.Sampling()


def prefilled(prompt, pool):
    """All of a prompt but its last token, in chunks, without newest tokens; which come after.

    With the constants of an engine's pool.
    """
    config = CONFIG.replace(addressing=jaxkv.Contiguous(), batch_size=1)
    cache = jaxkv.create(config.replace(newest=None)).with_codec_state(pool.codec_state)
    for start in range(0, len(prompt) - 1, CHUNK):
        _, cache = jax.jit(model)(jnp.array([prompt[start:-1][:CHUNK]]), cache)
    whole, lengths = jaxkv.create(config), cache.lengths
    newest = whole.newest.index.holding_from(lengths, lengths)
    newest = dataclasses.replace(whole.newest, index=newest)
    newest = newest.with_codec_state(pool.newest.codec_state)
    storage, index = cache.storage, cache.index
    placed = dataclasses.replace(whole, storage=storage, index=index, newest=newest)
    return placed.with_codec_state(cache.codec_state)


@pytest.mark.slow
def test_an_answer_is_that_of_a_ring_which_begins_with_it():
    with engine(CONFIG, sampling=GREEDY) as running:
        request = running.submit(PROMPTS[1], max_new_tokens=9)
        running.run()
        cache = prefilled(PROMPTS[1], running.cache)
    token, step = PROMPTS[1][-1], jax.jit(model)
    for expected, logprob in zip(request.tokens, request.logprobs, strict=True):
        logits, cache = step(jnp.array([[token]]), cache)
        logprobs = jax.nn.log_softmax(logits[0, -1])
        token = int(logprobs.argmax())
        assert token == expected
        np.testing.assert_allclose(logprobs[token], logprob, atol=1e-4)


@pytest.mark.slow
def test_a_fork_takes_them_along_and_a_late_one_finds_them_again():
    with engine(CONFIG) as running:
        parent = running.submit(PROMPTS[6], max_new_tokens=30, seed=1)
        while len(parent.tokens) < 9:
            running.step()
        fork, late = running.fork(parent, seed=1), running.fork(parent, seed=1)
        running.run()
        for request in (fork, late):
            assert (request.tokens, request.logprobs) == (parent.tokens, parent.logprobs)
        assert running.figures.repeated_tokens > 0
