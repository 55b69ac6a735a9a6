"""An answer depends on its prompt alone: not on neighbours, their order, or padding."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import CODECS
from tests.decoders import TABLE

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [7], [2, 6, 5, 3]]
NEW = 3


def model(tokens, cache):
    """Attention over rows of a table, some of which are far from the others."""
    far = jnp.where(tokens % 3 > 0, 4.0, 0.0)[..., None, None]
    vectors = jnp.asarray(TABLE)[tokens] + far
    cache = jaxkv.append(cache, vectors, 2 * vectors, layer=0, queries=vectors)
    mixed = jaxkv.attend(cache, vectors, layer=0)
    logits = jnp.einsum("btkd,vkd->btv", mixed, jnp.asarray(TABLE))
    return logits, jaxkv.advance(cache, tokens.shape[-1])


def config_of(codec, batch_size, **fields):
    return jaxkv.KVCacheConfig(1, 32, 2, 16, batch_size, CODECS[codec], **fields)


def generated(codec, prompts):
    config = config_of(codec, len(prompts))
    result = jaxkv.generate(model, prompts, max_new_tokens=NEW, config=config, prefill_chunk=8)
    return list(zip(result.tokens, result.logprobs, strict=True))


def served(codec, prompts):
    config = config_of(codec, 3, addressing=jaxkv.Paged(8, num_pages=12))
    with jaxkv.Engine(model, config, prefill_chunk=8) as engine:
        requests = [engine.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
        engine.run()
    return [(request.tokens, request.logprobs) for request in requests]


@pytest.mark.full_cases(r"float|int8$|-rotated[234]$|[23]-centred|stair[23]")
@pytest.mark.slow_cases("generated-(?!int8-centred)|served")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("answers", [generated, served], ids=["generated", "served"])
def test_an_answer_does_not_depend_on_its_neighbours(answers, codec):
    together = answers(codec, PROMPTS)
    turned = answers(codec, PROMPTS[::-1])[::-1]
    alone = [answers(codec, [prompt])[0] for prompt in PROMPTS[:2]]
    for others in (turned, alone):
        for (tokens, logprobs), (own_tokens, own) in zip(others, together, strict=False):
            assert tokens == own_tokens
            np.testing.assert_allclose(logprobs, own, atol=1e-5)


def test_constants_of_another_config_are_refused():
    constants = jaxkv.calibrate(model, [3, 1, 4], config=config_of("int8-centred", None))
    other = config_of("stair4", 1)
    with pytest.raises(ValueError, match="constants must have the shapes"):
        jaxkv.generate(model, [[1]], max_new_tokens=1, config=other, constants=constants)
    with pytest.raises(ValueError, match="no tokens"):
        jaxkv.calibrate(model, [], config=other)


def test_given_constants_are_those_of_the_cache():
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    constants = jaxkv.calibrate(model, text, config=config_of("int8-centred", None))
    config = config_of("int8-centred", 2, addressing=jaxkv.Paged(8, num_pages=12))
    with jaxkv.Engine(model, config, constants=constants, prefill_chunk=8) as engine:
        engine.submit([7, 7], max_new_tokens=1)
        engine.run()
        for name, array in constants[0].items():
            assert np.asarray(array).any()
            np.testing.assert_array_equal(engine.cache.codec_state[name], array)


@pytest.mark.parametrize("answers", [generated, served], ids=["generated", "served"])
def test_a_codec_that_learns_has_each_program_compiled_once(answers, caplog):
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        answers("int8-centred", [[3, 1, 4], [1, 5]])
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    for function in ("prefill", "decode"):
        names = f"jit({function})", f"jit(_{function})"
        assert sum(any(name in message for name in names) for message in compiled) == 1, compiled


def test_what_is_made_of_a_cache_learns_no_more_than_that():
    """Else a program of constants that were given has the search for them in it."""
    config = jaxkv.KVCacheConfig(1, 16, 1, 8, batch_size=2, codec=jaxkv.Centred(jaxkv.Int8()))
    cache = jaxkv.advance(dataclasses.replace(jaxkv.create(config), learns=False), 8)
    for made in (
        jaxkv.select(cache, [0, 0]),
        jaxkv.select(cache, [1]),
        jaxkv.compress(cache, jaxkv.policies.SinksAndRecent(), keep=4),
        jaxkv.truncate(cache, 2),
    ):
        assert not made.learns
