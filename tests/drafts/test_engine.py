"""An `Engine` with a draft answers what it answers without, whoever makes room for whom."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.drafts import DraftModel, NGram
from tests.drafts.toy import config_of, toy

PREFIX = [1, 2, 3, 1, 2, 3, 1, 2]
PROMPTS = [[*PREFIX, 4], [7, 7, 7, 4, 7, 7], [5], [*PREFIX, 9, 2], [*PREFIX, 4]]
STOPS = [(), (6, 3), (), (8,), ()]
OWN = [None, jaxkv.Sampling(1.2, top_k=3), None, None, jaxkv.Sampling(0.8, top_p=0.7)]
NEW, POOL = 22, jaxkv.Paged(page_size=4, num_pages=14)


def answers(sampling, **options):
    config = config_of(3, codec=jaxkv.Int8(), addressing=POOL)
    chunks = {"prefill_chunk": 8, "decode_steps": 6}
    with jaxkv.Engine(toy, config, sampling=sampling, **chunks, **options) as engine:
        requests = [
            engine.submit(prompt, max_new_tokens=NEW, seed=seed, stop_tokens=stops, sampling=own)
            for seed, (prompt, stops, own) in enumerate(zip(PROMPTS, STOPS, OWN, strict=True))
        ]
        engine.run()
        engine.pages.check()
        for hit in (0, len(PREFIX)):  # whatever was rejected meanwhile
            again = engine.submit(PROMPTS[0], max_new_tokens=NEW, seed=0)
            engine.run()
            assert again.num_cached >= hit
            assert again.tokens == requests[0].tokens
        return requests, engine.figures


@pytest.mark.slow_cases("model|greedy")
@pytest.mark.parametrize(
    ("draft", "temperature", "swap_space"),
    [
        (NGram(1), 1.5, 0),
        (NGram(1), 0.0, 1 << 20),
        (DraftModel(toy, config_of(3)), 0.0, 0),
    ],
    ids=["ngram, sampled", "ngram, greedy, swapped", "model, greedy"],
)
def test_answers_are_those_without_a_draft(draft, temperature, swap_space):
    sampling = jaxkv.Sampling(temperature=temperature)
    plain, _ = answers(sampling)
    drafted, figures = answers(sampling, draft=draft, num_guesses=3, swap_space=swap_space)
    assert figures.preemptions > 0
    assert 0 < figures.right_guesses <= figures.checked_guesses
    for mine, other in zip(drafted, plain, strict=True):
        assert mine.tokens == other.tokens
        assert mine.finish_reason == other.finish_reason
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=14),
        st.integers(1, 22),
        st.integers(0, 1000),
        st.lists(st.integers(0, 11), max_size=2),
    ),
    min_size=4,
    max_size=7,
)


def test_any_requests_are_answered_as_without():
    config = config_of(3, addressing=jaxkv.Paged(page_size=4, num_pages=14))
    options = {"prefill_chunk": 8, "decode_steps": 6, "sampling": jaxkv.Sampling(temperature=1.5)}
    counts = np.zeros(2, int)  # preemptions, and guesses that came true

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(REQUESTS)
    def holds(asked):
        found = []
        for more in ({}, {"draft": NGram(1), "num_guesses": 3}):
            with jaxkv.Engine(toy, config, **options, **more) as engine:
                requests = [
                    engine.submit(prompt, max_new_tokens=new, seed=seed, stop_tokens=stops)
                    for prompt, new, seed, stops in asked
                ]
                engine.run()
                engine.pages.check()
            found.append([(request.tokens, request.finish_reason) for request in requests])
        assert found[0] == found[1]
        counts[:] += engine.figures.preemptions, engine.figures.right_guesses

    holds()
    assert (counts > 0).all()


def test_a_cache_that_cannot_go_back_is_refused():
    config = config_of(3, addressing=POOL, newest=jaxkv.Newest(4))
    with pytest.raises(jaxkv.ConfigError, match="newest= do not go together"):
        jaxkv.Engine(toy, config, draft=NGram())
