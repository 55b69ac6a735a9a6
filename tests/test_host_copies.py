"""A cache whose leaves are numpy arrays, as `jax.device_get` and pickle give them."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.oracle import config_of, filled, layer_step, random_step

CACHES = {
    "bfloat16 batch": {"codec": "bfloat16", "batch_size": 2},
    "centred ring": {"codec": "rotated2-centred", "addressing": "ring"},
    "int8 pages": {"codec": "int8", "addressing": "paged"},
    "newest": {"newest": jaxkv.Newest(2, jaxkv.Dense("float32"))},
    "host memory": {"placement": jaxkv.HostMemory(resident=2, block=2)},
}
VERBS = {
    "advance": lambda cache: jaxkv.advance(cache, 1),
    "truncate": lambda cache: jaxkv.truncate(cache, 3),
    "reset": jaxkv.reset,
    "check": jaxkv.check,
    "layer": lambda cache: jaxkv.layer(cache, 1),
    "next_positions": lambda cache: jaxkv.next_positions(cache, 2),
    "fork": lambda cache: jaxkv.fork(cache, 2),
    "copy_pages": lambda cache: jaxkv.copy_pages(cache, np.int32([0]), np.int32([1])),
    "compress": lambda cache: jaxkv.compress(cache, jaxkv.policies.KeyDiff(), keep=2, new=2),
    "offload": lambda cache: jaxkv.prefetch(jaxkv.offload(cache)),
    "repr": repr,
    "html": lambda cache: cache._repr_html_(),
    "explain": jaxkv.explain,
}


@functools.cache
def original(kind):
    return filled(config_of(**CACHES[kind]), 5)[0]


def copied(cache):
    return pickle.loads(pickle.dumps(jax.device_get(cache)))


@pytest.mark.slow_cases(r"bfloat16|True-(int8|host)|False-(centred|newest)")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_copy_goes_on_as_the_original_would(kind, jitted):
    cache, oracle = filled(config_of(**CACHES[kind]), 5)
    run = jax.jit(layer_step) if jitted else layer_step
    for seed in (1, 2):
        arrays = random_step(cache.config, 1, heads=4, seed=seed)
        expected, cache, outputs = oracle.step(*arrays), copied(cache), []
        for layer, (queries, keys, values) in enumerate(zip(*arrays, strict=True)):
            cache, output = run(cache, layer, queries, keys, values)
            outputs.append(output)
        cache = jaxkv.advance(cache, 1)
        np.testing.assert_allclose(jnp.stack(outputs), expected, rtol=1e-5, atol=1e-5)


def answer(verb, cache):
    try:
        return verb(cache)
    except (TypeError, ValueError) as refusal:
        return f"{type(refusal)}: {refusal}"


@pytest.mark.slow_cases(r"bfloat16|newest|host memory")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", VERBS)
def test_verbs_take_a_copy_as_they_take_the_original(kind, name):
    cache = original(kind)
    copy = copied(cache)
    if cache.config.placement is not None:  # where it would be brought to the device
        copy = jaxkv.offload(copy)
    expected, actual = answer(VERBS[name], cache), answer(VERBS[name], copy)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", CACHES)
def test_a_copy_saves_the_same_file(tmp_path, kind):
    jaxkv.save(original(kind), tmp_path / "original")
    jaxkv.save(copied(original(kind)), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "original").read_bytes()
