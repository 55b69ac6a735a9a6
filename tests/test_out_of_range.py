"""Arguments out of range inside jit, where nothing can be refused: `check` tells of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxkv
from tests.oracle import assert_same_storage, config_of, filled, jit, random_step, run_step

KEYS = np.ones((3, 2, 4), np.float32)


def append(cache, num_tokens=3, layer=0):
    return jaxkv.append(cache, KEYS, KEYS, layer=layer, num_tokens=num_tokens)


def append_to(cache, layer):
    return append(cache, layer=layer)


def padded_step(cache, num_tokens):
    cache = jaxkv.padded_after(cache, num_tokens)
    return jaxkv.padded_after(jaxkv.advance(append(cache), 3), None)


# A verb, and a number that it cannot do anything with.
MISUSES = {
    "more real tokens than given": (append, 4),
    "fewer than none": (append, -1),
    "a step of fewer than none": (padded_step, -1),
    "a layer too high": (append_to, 3),
    "a layer from the end": (append_to, -1),
    "advance backwards": (jaxkv.advance, -1),
    "advance past int32": (jaxkv.advance, 2**31 - 1),
    "truncate to less than none": (jaxkv.truncate, -3),
}
# Whatever else keeps books of its own.
KINDS = {
    "ring": {"addressing": jaxkv.Ring(8, chunk=5)},
    "pages": {"addressing": jaxkv.Paged(3)},
    "kept": {"addressing": jaxkv.Kept(2, 8, num_layers=3, num_kv_heads=2)},
    "centred": {"codec": jaxkv.Centred(jaxkv.Int8())},
    "newest": {"newest": jaxkv.Newest(3, jaxkv.Dense("float32"))},
    "host memory": {"placement": jaxkv.HostMemory(2, 2, blocks_per_query=4)},
}
CASES = [(misuse, {}) for misuse in MISUSES]
CASES += [("more real tokens than given", kind) for kind in KINDS.values()]


@jit
def one_more(cache):
    return jaxkv.advance(append(cache), 3)


@pytest.mark.slow_cases(r"^(ring|kept|newest)$")
@pytest.mark.parametrize(("misuse", "kind"), CASES, ids=[*MISUSES, *KINDS])
def test_what_cannot_be_writes_nothing_and_is_told_of(misuse, kind):
    cache, expected = filled_as(config_of().replace(**kind), 4)
    verb, number = MISUSES[misuse]
    misused = jit(verb)(cache, jnp.int32(number))
    assert_same_storage(misused, cache)
    after = one_more(misused)  # which hides nothing
    assert_same_storage(after, cache)
    for unsound in (misused, after):
        with pytest.raises(ValueError, match=r"num_tokens, a length, .* out of range inside jit"):
            jaxkv.check(unsound)
    arrays = random_step(cache.config, 4, heads=2, seed=1)
    _, outputs = run_step(jaxkv.check(jaxkv.truncate(after, 4)), *arrays)
    np.testing.assert_allclose(outputs, expected(*arrays), rtol=1e-5, atol=1e-5)


def filled_as(config, tokens):
    """A cache, and what a step must return: the oracle's outputs, or those before the misuse."""
    cache, oracle = filled(config, tokens)
    if config == config_of():
        return cache, oracle.step
    return cache, lambda *arrays: run_step(cache, *arrays)[1]


@pytest.mark.parametrize("misuse", MISUSES)
def test_checkify_sees_it(misuse):
    verb, number = MISUSES[misuse]
    checked = checkify.checkify(
        lambda cache, number: jaxkv.check(verb(cache, number)), errors=checkify.user_checks
    )
    error, _ = jax.jit(checked)(jaxkv.create(config_of()), jnp.int32(number))
    with pytest.raises(checkify.JaxRuntimeError, match="out of range"):
        error.throw()


def test_other_sequences_go_on():
    cache, _ = filled(config_of(batch_size=2), 2)
    counts = jnp.array([4, 2])
    keys = np.stack([KEYS, KEYS])
    write = jax.jit(lambda counts: jaxkv.append(cache, keys, keys, layer=0, num_tokens=counts))
    cache = jaxkv.truncate(jax.jit(jaxkv.advance)(write(counts), counts), jnp.array([2, 3]))
    keys, _ = jaxkv.layer(cache, 0)
    assert jaxkv.check(cache).lengths.tolist() == [2, 3]
    np.testing.assert_array_equal(keys[1, 2], KEYS[0])
    np.testing.assert_array_equal(keys[0, 2], np.zeros_like(KEYS[0]))


def test_rows_that_there_are_not():
    cache, _ = filled(config_of(batch_size=2), 2)
    selected = jax.jit(jaxkv.select)(cache, jnp.array([1, 2, -1, 0]))
    with pytest.raises(ValueError, match=r"out of range inside jit, for sequences \[1, 2\]"):
        jaxkv.check(selected)
    assert selected.misused.tolist() == [False, True, True, False]


@pytest.mark.parametrize("layer", [-1, 3, 2])
def test_a_layer_that_there_is_not_reads_as_nan(layer):
    cache, _ = filled(config_of(), 2)
    attend = jax.jit(lambda cache, layer: jaxkv.attend(cache, KEYS, layer=layer))
    for numbers in (attend(cache, layer), *jax.jit(jaxkv.layer)(cache, layer)):
        assert jnp.isnan(numbers).all() == (layer != 2)
        assert jnp.isnan(numbers).any() == (layer != 2)
