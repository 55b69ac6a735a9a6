"""`attend` against the oracle, over the whole product of what a cache can be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from tests.oracle import (
    HEADS,
    KINDS,
    OPTIONS,
    SINKS,
    SMALL,
    Oracle,
    assert_same_storage,
    config_of,
    jit,
    layer_step,
    padded,
    poisoned,
    random_step,
    shuffled,
    step,
)

# Each step's width, and how many of its tokens are real in each sequence: a ragged prefill
# with an empty sequence, an uneven chunk, and tokens one at a time.
STEPS = [(5, (5, 3, 0)), (5, (2, 5, 1)), (1, (1, 0, 1)), (1, (1, 1, 0))]

SHAPE = {"num_layers": 2, "max_context_length": 10, "head_dim": 16}

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# For caches that are streamed: three tokens are resident, blocks end where others do not.
HOST = jaxkv.HostMemory(resident=3, block=4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and of slots, the last of each not full, in every test."""
    monkeypatch.setattr("jaxkv.attention.blockwise.QUERY_BLOCK", 2)
    monkeypatch.setattr("jaxkv.attention.blockwise.KEY_BLOCK", 4)


def able(implementation, cache, tokens):
    """The implementation, or the reference for a width that it cannot serve."""
    cannot_serve = IMPLEMENTATIONS[implementation].cannot_serve
    if reason := cannot_serve(cache, 1):
        pytest.skip(reason)
    return "reference" if cannot_serve(cache, tokens) else implementation


@functools.partial(jit, static_argnames=("options", "implementation"))
def run_layer(options, implementation, *arguments):
    """With a traced layer."""
    return layer_step(*arguments, implementation=implementation, **OPTIONS[options])


def assert_equals_oracle(config, implementation, *, heads, poison=np.nan, options="plain"):
    """Play `STEPS` on a cache full of garbage, with garbage for padding, and on the oracle."""
    if implementation == "streamed":
        config = config.replace(placement=HOST)
    cache, oracle = shuffled(poisoned(jaxkv.create(config), poison)), Oracle(config)
    for number, (width, counts) in enumerate(STEPS):
        arrays = random_step(config, width, heads=heads, seed=number)
        num_tokens = np.array(counts if config.batch_size else counts[0], np.int32)
        expected = oracle.step(*arrays, num_tokens, **OPTIONS[options])
        arrays = [padded(array, num_tokens, poison) for array in arrays]
        name = able(implementation, cache, width)
        run = functools.partial(run_layer, options, name)
        cache, outputs = step(cache, *arrays, num_tokens, run=run)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert not np.any(np.where(expected == 0, outputs, 0)), "padding must give exact zeros"


def pairs():
    """Every codec and addressing, and of two codecs all heads; implementations take turns."""
    product = itertools.product(KINDS, SMALL, [None, 3], HEADS)
    for number, case in enumerate(product):
        if case[0] not in ("float32", "int8") and number % 6 not in (1, 4):  # GQA alone
            continue
        turn = number + number // len(IMPLEMENTATIONS)  # not in step with the kinds of heads
        yield *case, list(IMPLEMENTATIONS)[turn % len(IMPLEMENTATIONS)]


@pytest.mark.slow_cases(
    r"float16|rotated|float8-(ring|paged)|float8.*native|streamed|bfloat16-(ring|paged)|8-chunked"
)
@pytest.mark.parametrize(
    ("codec", "addressing", "batch_size", "heads", "implementation"), list(pairs())
)
def test_every_pair_equals_the_oracle(codec, addressing, batch_size, heads, implementation):
    query_heads, kv_heads = HEADS[heads]
    config = config_of(codec, **SHAPE, batch_size=batch_size, num_kv_heads=kv_heads)
    config = config.replace(addressing=SMALL[addressing])
    if implementation != "streamed":
        cannot_serve = IMPLEMENTATIONS[implementation].cannot_serve(jaxkv.create(config), 1)
        implementation = "blockwise" if cannot_serve else implementation
    assert_equals_oracle(config, implementation, heads=query_heads)


# Addressings of the table, and some with a window of their own that are no rings.
WINDOWED = {
    "pages, window": jaxkv.Paged(page_size=4, window=4),
    "pages, chunks": jaxkv.Paged(page_size=4, window=3, aligned=True),
}
CALLS = [("contiguous", options) for options in list(OPTIONS)[1:]]
CALLS += itertools.product(["ring", "paged"], ["window", "together"])
CALLS += itertools.product(["pages, window"], ["plain", "window", "together"])
CALLS += [("pages, chunks", "together")]


@pytest.mark.slow_cases(r"streamed")
@implementations
@pytest.mark.parametrize(("addressing", "options"), CALLS)
def test_every_option_equals_the_oracle(addressing, options, implementation):
    addressing = (SMALL | WINDOWED)[addressing]
    config = config_of(**SHAPE, batch_size=3).replace(addressing=addressing)
    assert_equals_oracle(config, implementation, heads=4, options=options)


@pytest.mark.slow_cases(r"streamed")
@implementations
@pytest.mark.parametrize("poison", [np.inf, -np.inf, 3e38])
def test_garbage_never_reaches_an_output(poison, implementation):
    assert_equals_oracle(config_of(**SHAPE, batch_size=3), implementation, heads=4, poison=poison)


@functools.cache
def one_shot():
    arrays = random_step(config_of(**SHAPE), 7, heads=4)
    run = functools.partial(run_layer, "plain", "reference")
    return arrays, step(jaxkv.create(config_of(**SHAPE)), *arrays, run=run)


@pytest.mark.slow_cases(r"streamed")
@implementations
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.sets(st.integers(1, 6)))
def test_any_split_equals_one_shot(implementation, cuts):
    arrays, (expected_cache, expected) = one_shot()
    placement = HOST if implementation == "streamed" else None
    cache, outputs = jaxkv.create(config_of(**SHAPE, placement=placement)), []
    for chunk in zip(*(np.split(array, sorted(cuts), axis=1) for array in arrays), strict=True):
        name = able(implementation, cache, chunk[0].shape[1])
        cache, output = step(cache, *chunk, run=functools.partial(run_layer, "plain", name))
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=1e-5, atol=1e-6)
    assert_same_storage(cache, expected_cache)


def plain_attention(queries, keys, values, sink_logits):
    """Causal attention without a cache, for its gradient. Arrays are ``[tokens, heads, dim]``."""
    tokens, heads, head_dim = queries.shape
    keys, values = (jnp.repeat(array, heads // array.shape[1], axis=1) for array in (keys, values))
    logits = jnp.einsum("thd,shd->hts", queries, keys) * head_dim**-0.5
    logits = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), logits, -jnp.inf)
    sink = jnp.broadcast_to(sink_logits[:, None, None], (heads, tokens, 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1))[..., :-1]
    return jnp.einsum("hts,shd->thd", weights, values)


def gradients(attention, queries, keys, values):
    """Of a weighted sum of the outputs, with respect to all four inputs."""

    def loss(queries, keys, values, sink_logits):
        outputs = attention(queries, keys, values, sink_logits)
        return jnp.sum(outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape))

    gradient = jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    return gradient(queries, keys, values, jnp.asarray(SINKS))


@pytest.mark.slow_cases("blockwise|streamed|native")
@implementations
def test_gradient_equals_plain_attention_whatever_is_unused(implementation):
    """A ragged chunk of 3 tokens, then one token, in a cache full of NaN."""
    config, counts = config_of(**SHAPE, batch_size=3), np.array([[3, 1], [0, 0], [2, 1]], np.int32)
    cache = poisoned(jaxkv.create(config))
    queries, keys, values = (array[0] for array in random_step(config, 4, heads=4))

    def cached(queries, keys, values, sink_logits):
        grown, outputs = cache, []
        for chunk, num_tokens in zip((slice(0, 3), slice(3, 4)), counts.T, strict=True):
            name = able(implementation, cache, chunk.stop - chunk.start)
            arrays = queries[:, chunk], keys[:, chunk], values[:, chunk]
            grown, output = layer_step(
                grown, 0, *arrays, num_tokens, sink_logits=sink_logits, implementation=name
            )
            grown = jaxkv.advance(grown, num_tokens)
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    def one_by_one(queries, keys, values, sink_logits):
        outputs = jnp.zeros(queries.shape)
        for sequence, tokens in enumerate(real):
            vectors = (array[sequence, tokens] for array in (queries, keys, values))
            outputs = outputs.at[sequence, tokens].set(plain_attention(*vectors, sink_logits))
        return outputs

    real = [np.r_[:chunk, 3 : 3 + token] for chunk, token in counts]
    expected = gradients(one_by_one, queries, keys, values)
    unused = np.ones((3, 4, 1, 1), bool)
    for sequence, tokens in enumerate(real):
        unused[sequence, tokens] = False
    keys, values = (np.where(unused, np.float32(np.nan), array) for array in (keys, values))
    for actual, wanted in zip(gradients(cached, queries, keys, values), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@implementations
def test_pages_in_any_order_give_the_bits_that_one_run_of_slots_gives(implementation):
    config = config_of(**SHAPE, batch_size=3)
    addressings = SMALL["contiguous"], SMALL["paged"]
    kinds = [jaxkv.create(config.replace(addressing=each)) for each in addressings]
    arrays = random_step(config, 1, heads=4)
    run = functools.partial(run_layer, "plain", able(implementation, kinds[0], 1))
    one_run, pages = (step(cache, *arrays, run=run)[1] for cache in map(shuffled, kinds))
    np.testing.assert_array_equal(pages, one_run)


def test_an_old_name_of_an_argument_is_understood_with_a_warning():
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 2, 4, codec=jaxkv.Dense("float32")))
    vectors = jnp.ones((3, 2, 4))
    cache, logits = jaxkv.append(cache, vectors, vectors, layer=0), jnp.array([0.5, -1.0])
    expected = jaxkv.attend(cache, vectors, layer=0, sink_logits=logits)
    with pytest.warns(DeprecationWarning, match="sinks= is now called sink_logits="):
        np.testing.assert_array_equal(jaxkv.attend(cache, vectors, layer=0, sinks=logits), expected)
    with pytest.raises(TypeError, match="Got both"):
        jaxkv.attend(cache, vectors, layer=0, sinks=logits, sink_logits=logits)
