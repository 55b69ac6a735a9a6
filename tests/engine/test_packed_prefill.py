"""Chunks of several prompts in one step: no bit of a request depends on who is beside it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.requests import CHUNK, engine, outcome

ROWS = 3
LENGTHS = (5, CHUNK, 3 * CHUNK + 2, 5 * CHUNK)


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 64, length).tolist()


@pytest.fixture(scope="module", params=["float32", "int8"])
def running(request, model):
    with engine(model, num_pages=60, codec=request.param, prefill_rows=ROWS) as engine_:
        yield engine_


@pytest.fixture(scope="module")
def misses(running):
    """What each prompt leaves where it is alone and nothing is found."""
    found = {}
    for length in LENGTHS:
        running.pages.forget()
        found[length] = outcome(running, prompt_of(length), 0)[1]
    return found


@settings(max_examples=12, deadline=None)
@given(
    length=st.sampled_from(LENGTHS),
    shared=st.integers(0, 5 * CHUNK),
    others=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), max_size=3),
)
def test_an_answer_is_that_without_neighbours_and_without_a_hit(
    running, misses, length, shared, others
):
    running.pages.forget()
    prompt = prompt_of(length)
    if shared:  # a part of it is found
        running.submit([*prompt[:shared], 63], max_new_tokens=1)
        running.run()
    for common, rest in others:
        running.submit([*prompt[:common], *prompt_of(rest)], max_new_tokens=rest % 7 + 1)
    _, (tokens, logprobs, stored) = outcome(running, prompt, 0)
    running.run()
    expected = misses[length]
    assert (tokens, logprobs) == expected[:2]
    for name, leaf in expected[2].items():
        assert stored[name].tobytes() == leaf.tobytes()


def test_a_step_takes_chunks_of_several_prompts_or_of_one(running):
    running.pages.forget()
    before = running.figures.prefill_steps
    for length in (2 * CHUNK, CHUNK // 2, 6 * CHUNK + 1):
        running.submit([length % 64, *prompt_of(length)], max_new_tokens=1)
    running.run()
    assert running.figures.prefill_steps - before == 4  # of 2 + 1 + 7 chunks, 3 a step
