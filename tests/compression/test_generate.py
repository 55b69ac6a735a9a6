"""`generate` with a policy against a loop anybody could write: prefill, compress, decode."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.policies import POLICIES, QueryWindow
from tests.decoders import sharp_decoder

NEW, CONTEXT = 6, 64
# Of 1 to 4 chunks; the last token is the first that decode takes.
MESH = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
PROMPTS = [np.random.default_rng(n).integers(0, 64, n).tolist() for n in (41, 17, 1, 33)]


def loudest(keys, values, queries, positions):
    return jnp.linalg.norm(values, axis=-1).T


@pytest.fixture(scope="module")
def model():
    return sharp_decoder()


def by_hand(model, prompt, policy, keep):
    """One sequence, its prompt at once, then a token at a time."""
    *start, last = prompt
    cache = jaxkv.create(model.cache_config(max_context_length=CONTEXT))
    _, cache, queries = jax.jit(jaxkv.observed(model))(jnp.array(start, jnp.int32), cache)
    cache = jaxkv.compress(cache, policy, keep=keep, new=NEW, queries=queries)
    step, tokens, logprobs = jax.jit(model), [], []
    while len(tokens) < NEW:
        logits, cache = step(jnp.array([last], jnp.int32), cache)
        last = int(logits[-1].argmax())
        tokens.append(last)
        logprobs.append(float(jax.nn.log_softmax(logits[-1])[last]))
    return tokens, logprobs


# SnapKV's own window is longer than these prompts.
@pytest.mark.slow_cases(r"keydiff|loudest|tova|snapkv|h2o")
@pytest.mark.parametrize(
    "policy", [QueryWindow(window=5, pool=3), "h2o", "keydiff", "tova", "snapkv", loudest]
)
def test_it_is_the_loop_of_prefill_compress_decode(model, policy):
    own = POLICIES[policy] if isinstance(policy, str) else policy
    tracker = jaxkv.MemoryTracker()
    result = jaxkv.generate(
        model,
        PROMPTS[:3],
        max_new_tokens=NEW,
        max_context_length=CONTEXT,
        prefill_chunk=16,
        policy=policy,
        keep=0.5,
        tracker=tracker,
    )
    plain = jaxkv.generate(model, PROMPTS[:3], max_new_tokens=NEW, max_context_length=CONTEXT)
    for number, prompt in enumerate(PROMPTS[:2]):
        tokens, logprobs = by_hand(model, prompt, own, 0.5)
        assert result.tokens[number] == tokens
        np.testing.assert_allclose(result.logprobs[number], logprobs, atol=1e-4)
    assert np.abs(np.subtract(result.logprobs[0], plain.logprobs[0])).max() > 3e-4
    assert result.tokens[2] == plain.tokens[2]  # of a prompt of one token, nothing can go
    assert result.config.num_slots == 3 * (20 + NEW)
    assert tracker.total_usage() == 0


def test_a_number_of_tokens_compiles_decode_once(model, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for prompt in (PROMPTS[0], PROMPTS[3]):
            options = {"max_new_tokens": 5, "max_context_length": CONTEXT + 1}
            jaxkv.generate(model, [prompt], policy="streaming_llm", keep=8, **options)
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    assert sum("jit(_decode)" in message for message in compiled) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "snapkv"}, "Give both, such as policy='snapkv', keep=0.5"),
        ({"keep": 0.5}, "Give both, such as policy='snapkv', keep=0.5"),
        ({"policy": "snapvk", "keep": 0.5}, "no policy 'snapvk'; there are streaming_llm, snapkv"),
        ({"policy": "oracle", "keep": 0.5}, "'oracle' needs queries that are to come"),
        ({"policy": "expected_attention", "keep": 8}, "needs the frequencies of the model's rope"),
        ({"policy": "snapkv", "keep": 0.5, "mesh": MESH}, "takes no policy over a mesh"),
    ],
)
def test_what_is_refused(model, options, message):
    if "mesh" in options:
        options |= {"axes": jaxkv.Axes(batch="data")}
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(model, [[1, 2]] * 2, max_new_tokens=1, **options)
