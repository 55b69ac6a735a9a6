"""Decoders with cross-attention give transformers' logits, however their texts are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.models.crossing import (
    CONFIGS,
    LENGTHS,
    NUM_TOKENS,
    VOCABULARY,
    cache_config,
    decoder_of,
    encoded,
    goldens,
    texts,
    write,
)

TOLERANCE = 2e-4
each_kind = pytest.mark.parametrize("kind", CONFIGS)


@functools.cache
def step_of(kind):
    return jax.jit(decoder_of(kind), donate_argnums=1)


def begun(kind, rows=None):
    """A cache in which the encoder's tokens are written: of all texts, or of one alone."""
    config = cache_config(kind, batch_size=3 if rows is None else None)
    chosen = slice(None) if rows is None else rows
    lengths = np.asarray(LENGTHS[kind], np.int32)[chosen]
    run = jax.jit(functools.partial(write, kind), donate_argnums=0)
    return run(jaxkv.create(config), encoded(kind)[chosen], lengths)


@pytest.mark.parametrize("size", [NUM_TOKENS, 4, 1], ids=["one shot", "chunks", "token by token"])
@each_kind
def test_logits_equal_transformers(kind, size):
    """A batch of ragged sources, one of an mllama without any."""
    cache, ids = begun(kind), texts(kind)
    for start in range(0, NUM_TOKENS, size):
        part = slice(start, start + size)
        logits, cache = step_of(kind)(jnp.asarray(ids[:, part]), cache)
        np.testing.assert_allclose(logits, goldens()[kind][:, part], atol=TOLERANCE, rtol=0)
    assert cache.lengths.tolist() == [NUM_TOKENS] * 3
    assert jaxkv.check(cache).cross[0].lengths.tolist() == list(LENGTHS[kind])


@pytest.mark.slow
@each_kind
def test_a_single_text_equals_transformers(kind):
    logits, _ = step_of(kind)(jnp.asarray(texts(kind)[0]), begun(kind, rows=0))
    np.testing.assert_allclose(logits, goldens()[kind][0], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@each_kind
def test_another_text_about_the_same(kind):
    """What the encoder wrote stays when the text is taken back: Whisper tries again so."""
    cache, ids = begun(kind), jnp.asarray(texts(kind))
    _, cache = step_of(kind)(ids[:, ::-1], cache)
    logits, _ = step_of(kind)(ids, jaxkv.truncate(cache, 0))
    np.testing.assert_allclose(logits, goldens()[kind], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("draft", [None, jaxkv.drafts.NGram()], ids=["plain", "with a draft"])
@pytest.mark.slow_cases("draft|bart|t5|mllama")
@each_kind
def test_generate_goes_on_from_what_was_written(kind, draft):
    """Ragged prompts, greedy: what computing each text anew, from its beginning, says."""
    count, prompts = 5, [texts(kind)[row, : row + 2].tolist() for row in range(3)]
    if kind == "mllama":  # the model asks which row it is of by its place in the batch
        prompts = [prompt[:2] for prompt in prompts]
    states, lengths = jnp.asarray(encoded(kind)), np.asarray(LENGTHS[kind], np.int32)

    def prepare(cache):
        return write(kind, cache, states, lengths)

    found = jaxkv.generate(
        decoder_of(kind),
        prompts,
        max_new_tokens=count,
        config=cache_config(kind, batch_size=3),
        prepare=jax.jit(prepare, donate_argnums=0),
        stop_tokens=(),
        draft=draft,
    )
    whole = [list(prompt) for prompt in prompts]
    for _ in range(count):
        ids = np.array([text + [0] * (16 - len(text)) for text in whole], np.int32)
        logits, _ = step_of(kind)(jnp.asarray(ids), begun(kind))
        for row, text in enumerate(whole):
            text.append(int(np.argmax(logits[row, len(text) - 1])))
    assert [text[-count:] for text in whole] == found.tokens
    assert all(0 <= token < VOCABULARY for tokens in found.tokens for token in tokens)
