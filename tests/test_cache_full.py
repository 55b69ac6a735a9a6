"""A full cache: refused outside jit, dropped and told of inside, and never a lost token."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

import jaxkv
from tests.oracle import (
    EACH_ONCE,
    ROTATED,
    Oracle,
    assert_same_storage,
    config_of,
    filled,
    jit,
    poisoned,
    random_step,
    run_step,
    step,
)

THREE_TOKENS = {
    "append": lambda cache, vectors: jaxkv.append(cache, vectors, vectors, layer=0),
    "advance": lambda cache, vectors: jaxkv.advance(cache, 3),
}


@pytest.mark.parametrize("verb", THREE_TOKENS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_full_outside_jit_raises_before_anything_changes(verb, batch_size):
    cache = jaxkv.create(config_of(batch_size=batch_size))
    cache = jaxkv.advance(cache, 6 if batch_size is None else jnp.array([1, 6, 4]))
    before = jax.tree.map(np.array, cache)
    vectors = jnp.ones((*cache.config.batch_shape, 3, 2, 4))
    which = "KV cache full: " if batch_size is None else "KV cache full: sequence 1 "
    message = f"{which}holds 6 of 8 tokens, and 3 more were given"
    with pytest.raises(jaxkv.CacheFullError, match=message):
        THREE_TOKENS[verb](cache, vectors)
    chex.assert_trees_all_equal(cache, before)
    if batch_size:  # the same call fits when the full sequence's tokens are padding
        room = jnp.array([3, 2, 3])
        cache = jaxkv.append(cache, vectors, vectors, layer=0, num_tokens=room)
        assert jaxkv.check(jaxkv.advance(cache, room)).lengths.tolist() == [4, 8, 7]


@pytest.mark.slow_cases(r"float16|float8|int8-")
@pytest.mark.parametrize(
    ("codec", "addressing"), [kind for kind in EACH_ONCE if kind[0] not in ROTATED]
)
def test_full_inside_jit_drops_and_says_so(codec, addressing):
    config = config_of(codec, addressing, num_layers=1, batch_size=3)
    cache, oracle = poisoned(jaxkv.create(config)), Oracle(config)
    run = jit(step)
    lengths = np.array([6, 2, 8], np.int32)
    prefill = random_step(config, 8, heads=2)
    oracle.step(*prefill, lengths)
    cache, _ = run(cache, *prefill, lengths)
    assert jaxkv.check(cache) is cache

    chunk = random_step(config, 4, heads=2, seed=1)
    overfull, _ = run(cache, *chunk, np.full(3, 4, np.int32))
    assert overfull.overflowed.tolist() == [True, False, True]
    with pytest.raises(jaxkv.CacheFullError, match=r"\[10, 6, 12\] tokens long.*holds 8 each"):
        jaxkv.check(overfull)
    sides = [np.asarray(jaxkv.layer(each, 0)) for each in (cache, overfull)]
    for sequence, length in enumerate(lengths):
        before, after = (side[:, sequence, :length] for side in sides)
        np.testing.assert_array_equal(after, before)

    healed = jaxkv.check(jaxkv.truncate(overfull, lengths))
    fits = np.minimum(8 - lengths, 4)
    healed, outputs = run(healed, *chunk, fits)
    np.testing.assert_allclose(outputs, oracle.step(*chunk, fits), rtol=1e-5, atol=1e-5)
    assert_same_storage(overfull, healed)  # the tokens that fit had been written


def test_full_in_a_loop_keeps_earlier_tokens():
    config = config_of()
    cache, _ = filled(config, 5)
    arrays = random_step(config, 3, heads=2, seed=1)
    full, _ = run_step(cache, *arrays)
    more = random_step(config, 6, heads=2, seed=2)
    tokens = [array.reshape(3, 6, 1, 2, 4).swapaxes(0, 1) for array in more]
    overfull, _ = jax.jit(
        lambda cache: lax.scan(lambda cache, token: step(cache, *token), cache, tokens)
    )(full)
    assert_same_storage(overfull, full)
    assert overfull.lengths == 14


# A context of 24 tokens, and where one past its end could be read or hide others.
PAST_THE_END = {
    "ring": {"addressing": jaxkv.Ring(7, chunk=32)},
    "ring in host memory": {
        "addressing": jaxkv.Ring(7, chunk=32),
        "placement": jaxkv.HostMemory(4, 4),
    },
    "the last page": {"addressing": jaxkv.Paged(5)},
    "newest": {"newest": jaxkv.Newest(5, jaxkv.Dense("float32"))},
}


@pytest.mark.parametrize("kind", PAST_THE_END)
def test_a_prompt_that_is_padded_past_the_end(kind):
    """As `generate` does it: all of a chunk is appended, and all but what is real rolled back."""
    config = config_of(num_layers=1, max_context_length=24).replace(**PAST_THE_END[kind])
    cache, oracle = poisoned(jaxkv.create(config)), Oracle(config)
    run = jit(step)
    for seed, real in enumerate((9, 7, 1)):
        arrays = random_step(config, 29, heads=2, seed=seed)
        length = int(cache.lengths) + real
        cache, outputs = run(cache, *arrays)
        expected = oracle.step(*(array[:, :real] for array in arrays))
        np.testing.assert_allclose(outputs[:, :real], expected, rtol=1e-5, atol=1e-5)
        cache = jaxkv.truncate(cache, length)


def test_full_under_checkify():
    config = config_of()

    def checked_step(cache, *arrays):
        return jaxkv.check(step(cache, *arrays)[0])

    run = jax.jit(checkify.checkify(checked_step, errors=checkify.user_checks))
    arrays = random_step(config, 5, heads=2)
    error, cache = run(jaxkv.create(config), *arrays)
    assert error.get() is None
    error, _ = run(cache, *arrays)
    with pytest.raises(checkify.JaxRuntimeError, match="KV cache full: tokens were dropped"):
        error.throw()
    assert jax.jit(checked_step)(cache, *arrays).lengths == 10  # without checkify: no check
