"""Parts of attention: outputs with log-sum-exps, which merged are attention over all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from tests.oracle import SINKS, attention, config_of, jit

FIRST, SECOND, HEAD_DIM = 5, 4, 16  # tokens of each part
OPTIONS = {"plain": {}, "all": {"softcap": 0.8, "scale": 0.7, "sink_logits": SINKS}}


def vectors(tokens, heads, seed):
    shape = (2, tokens, heads, HEAD_DIM)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def holding(config, keys, values):
    """A cache of these tokens, whose next query is that of the newest."""
    cache = jaxkv.append(jaxkv.create(config), keys, values, layer=1)
    return jaxkv.advance(cache, keys.shape[1] - 1)


def merged(outputs, logs):
    return (jax.nn.softmax(logs, axis=0)[..., None] * outputs).sum(axis=0)


@functools.partial(jit, static_argnames=("name", "softcap", "scale"))
def part(cache, queries, name, **options):
    return jaxkv.attend(cache, queries, layer=1, implementation=name, partial=True, **options)


@pytest.mark.slow_cases(r"all-int8|streamed-plain")
@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["native", "reference", "blockwise", "streamed"])
def test_two_parts_are_the_whole(name, options, codec):
    config = config_of(codec, batch_size=2, max_context_length=8, head_dim=HEAD_DIM)
    if name == "streamed":
        config = config.replace(placement=jaxkv.HostMemory(2, 4))
    keys, values = (vectors(FIRST + SECOND, 2, seed) for seed in (0, 1))
    queries, options = vectors(1, 4, 2), dict(OPTIONS[options])
    sink_logits = options.pop("sink_logits", None)  # of one part alone
    stored, parts, logs = [], [], []
    for span, own in ((slice(0, FIRST), sink_logits), (slice(FIRST, None), None)):
        cache = holding(config, keys[:, span], values[:, span])
        if reason := IMPLEMENTATIONS[name].cannot_serve(cache, 1):
            pytest.skip(reason)
        stored.append([each[:, : keys[:, span].shape[1]] for each in jaxkv.layer(cache, 1)])
        output, log = part(cache, queries, name, sink_logits=own, **options)
        parts.append(output)
        logs.append(log)
    keys, values = (
        np.concatenate(each, axis=1, dtype=np.float64) for each in zip(*stored, strict=True)
    )
    result = merged(jnp.stack(parts), jnp.stack(logs))
    for row in range(2):
        tokens = list(zip(keys[row], values[row], strict=True))
        right = attention(queries[row, 0], tokens, sink_logits=sink_logits, **options)
        np.testing.assert_allclose(result[row, 0], right, rtol=1e-5, atol=1e-5)
    # That of the second part, by its definition.
    scores = np.einsum("bhd,bshd->bhs", queries[:, 0], keys[:, FIRST:].repeat(2, axis=2))
    scores = scores * options.get("scale", 0.25)
    if cap := options.get("softcap"):
        scores = cap * np.tanh(scores / cap)
    np.testing.assert_allclose(logs[1][:, 0], np.log(np.exp(scores).sum(-1)), rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_has_no_share():
    config = config_of(batch_size=2, max_context_length=8, head_dim=HEAD_DIM)
    cache = holding(config, vectors(3, 2, 0), vectors(3, 2, 1))
    queries = vectors(1, 4, 2)
    output, log = jaxkv.attend(cache, queries, layer=1, num_tokens=np.array([1, 0]), partial=True)
    assert not output[1].any()
    assert (log[1] == -1e30).all()
    assert (log[0] > -100).all()


def test_the_gradient_of_merged_parts_is_that_of_the_whole():
    config = config_of(batch_size=2, max_context_length=16, head_dim=HEAD_DIM)
    keys, values, queries = vectors(9, 2, 0), vectors(9, 2, 1), vectors(1, 4, 2)

    def of_parts(keys, values, queries):
        caches = (
            holding(config, keys[:, span], values[:, span])
            for span in (slice(0, FIRST), slice(FIRST, None))
        )
        parts = (jaxkv.attend(each, queries, layer=1, partial=True) for each in caches)
        outputs, logs = (jnp.stack(each) for each in zip(*parts, strict=True))
        return jnp.sin(merged(outputs, logs)).sum()

    def of_all(keys, values, queries):  # by the definition
        keys, values = (jnp.repeat(each, 2, axis=2) for each in (keys, values))
        scores = jnp.einsum("bqhd,bshd->bqhs", queries, keys) / 4
        return jnp.sin(jnp.einsum("bqhs,bshd->bqhd", jax.nn.softmax(scores), values)).sum()

    ours, right = (
        jax.jit(jax.grad(each, argnums=(0, 1, 2)))(keys, values, queries)
        for each in (of_parts, of_all)
    )
    for one, other in zip(ours, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_who_gives_no_log_sum_exp_says_so(monkeypatch):
    config = config_of(batch_size=2, max_context_length=8, head_dim=HEAD_DIM)
    cache, queries = holding(config, vectors(3, 2, 0), vectors(3, 2, 1)), vectors(2, 4, 2)
    _, right = jaxkv.attend(cache, queries, layer=1, partial=True)
    none = IMPLEMENTATIONS["reference"]._replace(part=None)
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", none)
    with pytest.raises(ValueError, match="it gives no log-sum-exp"):
        jaxkv.attend(cache, queries, layer=1, implementation="reference", partial=True)
    _, log = jaxkv.attend(cache, queries, layer=1, partial=True)  # by the next one
    np.testing.assert_allclose(log, right, rtol=1e-5, atol=1e-5)
