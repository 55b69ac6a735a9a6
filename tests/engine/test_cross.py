"""Requests about audio and images of their own: each answers what it would alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.drafts import NGram
from tests.models.crossing import LENGTHS, cache_config, decoder_of, encoded, texts, write

KIND, COUNT = "whisper", 6
# Which of three encoders' outputs each request is about; None for a text about nothing.
ABOUT = (0, 1, 2, None, 1, 0)
STATES, SIZES = encoded(KIND), np.asarray(LENGTHS[KIND], np.int32)
PROMPTS = [[*texts(KIND)[number % 3, : 3 + number % 4].tolist()] for number in range(len(ABOUT))]


@functools.cache
def writer():
    return jax.jit(functools.partial(write, KIND), donate_argnums=0)


def prepare_of(about):
    """Written into a batch of one, as an engine asks for it."""
    if about is None:
        return None
    return lambda cache: writer()(cache, STATES[about][None], SIZES[about][None])


@functools.cache
def alone():
    """The greedy answer of each request by itself, each token by computing all anew."""
    step = jax.jit(decoder_of(KIND))
    answers = []
    for prompt, about in zip(PROMPTS, ABOUT, strict=True):
        cache, text = jaxkv.create(cache_config(KIND, batch_size=1)), list(prompt)
        if about is not None:
            cache = prepare_of(about)(cache)
        for _ in range(COUNT):
            ids = np.array([text + [0] * (16 - len(text))], np.int32)
            logits, _ = step(jnp.asarray(ids), cache)
            text.append(int(np.argmax(logits[0, len(text) - 1])))
        answers.append(text[len(prompt) :])
    return answers


def engine_of(num_pages=24, rows=2, **options):
    config = jaxkv.cache_config(
        {"model_type": "whisper", "d_model": 64, "decoder_layers": 3, "decoder_attention_heads": 4},
        max_context_length=16,
        max_encoder_length=12,
        codec="float32",
        batch_size=rows,
        addressing=jaxkv.Paged(4, num_pages),
    )
    given = {"prefill_chunk": 4, "decode_steps": 2, "stop_tokens": ()} | options
    return jaxkv.Engine(decoder_of(KIND), config, **given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_pages": 5}, marks=pytest.mark.slow),
        pytest.param({"num_pages": 5, "swap_space": 1 << 20}, marks=pytest.mark.slow),
        pytest.param({"prefill_rows": 3, "rows": 4}, marks=pytest.mark.slow),
        pytest.param({"draft": NGram()}, marks=pytest.mark.slow),
    ],
    ids=["plain", "preempted", "swapped", "several chunks", "with a draft"],
)
def test_each_request_answers_what_it_would_alone(options):
    """More requests than rows, so that rows change hands, one of them to a text about nothing."""
    with engine_of(**options) as engine:
        requests = [
            engine.submit(prompt, max_new_tokens=COUNT, prepare=prepare_of(about))
            for prompt, about in zip(PROMPTS, ABOUT, strict=True)
        ]
        engine.run()
        assert [request.tokens for request in requests] == alone()
        preempted = sum(request.num_preemptions for request in requests)
        assert (preempted > 0) == ("num_pages" in options)
        engine.pages.check()


@pytest.mark.slow
def test_pages_are_shared_by_those_that_say_that_they_are_about_the_same():
    """A hit equals a miss, and neither salt nor source means that there is one."""
    prompt, wanted = texts(KIND)[0, :9].tolist(), {"max_new_tokens": 4}
    with engine_of() as engine:
        found = []
        for about, salt in ((0, b"a"), (0, b"a"), (1, b"b"), (0, b""), (0, b""), (None, b"")):
            request = engine.submit(prompt, prepare=prepare_of(about), salt=salt, **wanted)
            engine.run()
            found.append((request.num_cached, request.tokens, request.logprobs))
        assert [cached for cached, *_ in found] == [0, 8, 0, 0, 0, 0]
        for same in (1, 3, 4):
            assert found[same][1:] == found[0][1:]
        assert found[2][2] != found[0][2] != found[5][2]


@pytest.mark.slow
def test_a_fork_is_about_the_same():
    with engine_of(rows=3) as engine:
        request = engine.submit(PROMPTS[1], max_new_tokens=COUNT, prepare=prepare_of(ABOUT[1]))
        engine.step()
        forks = [engine.fork(request, seed=seed) for seed in (1, 2, 3)]  # one of them waits
        engine.run()
        assert [each.tokens for each in (request, *forks)] == [alone()[1]] * 4


def test_what_prepare_gives_back_is_looked_at():
    """It fails as often as it is tried, and others go on once it is cancelled."""
    with engine_of() as engine:
        bad = engine.submit(PROMPTS[0], max_new_tokens=1, prepare=lambda cache: None)
        good = engine.submit(PROMPTS[1], max_new_tokens=COUNT, prepare=prepare_of(ABOUT[1]))
        for _ in range(2):
            with pytest.raises(ValueError, match="request 0: prepare must give back the cache"):
                engine.run()
            engine.pages.check()
        engine.cancel(bad)
        engine.run()
        assert good.tokens == alone()[1]
