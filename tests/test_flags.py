"""Flags that users of JAX run whole programs with: the main job is right under each of them."""

import contextlib
import functools

import jax
import numpy as np
import pytest

import jaxkv
from tests.decoders import sharp_decoder
from tests.oracle import Oracle, config_of, jit, layer_step, random_step


@contextlib.contextmanager
def types_shapes_and_constants():
    """What may break in every kind of cache, under three flags that do not hide one another."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        yield


FLAGS = {
    "x64, rank promotion, transfer guard": types_shapes_and_constants,
    "dtype promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": lambda: jax.checking_leaks(),
    "no jit": lambda: jax.disable_jit(),
    "key reuse": lambda: jax.debug_key_reuse(True),
    "matmul precision": lambda: jax.default_matmul_precision("float32"),
    "threefry": lambda: jax.threefry_partitionable(False),
    "custom keys": lambda: jax.enable_custom_prng(True),
}
CACHES = {
    "float32": {"batch_size": 2, "head_dim": 16},
    "int8 pages": {"codec": "int8", "addressing": "paged", "head_dim": 16},
    "centred ring": {"codec": "rotated2-centred", "addressing": "ring", "batch_size": 2},
    "host memory": {"codec": "int8", "placement": jaxkv.HostMemory(3, 4)},
    "newest": {"newest": jaxkv.Newest(3, jaxkv.Dense("float32"))},
}
EVERYWHERE = next(iter(FLAGS))
CASES = [(EVERYWHERE, kind) for kind in CACHES]
CASES += [(flag, "float32") for flag in FLAGS if flag != EVERYWHERE]


@functools.cache
def steps_of(kind):
    """Arrays of steps, how many of their tokens are real, and what the oracle answers."""
    config = config_of(num_layers=1, **CACHES[kind])
    oracle, steps = Oracle(config), []
    for tokens, count in ((5, [3, 5]), (1, None), (1, None)):
        arrays = random_step(config, tokens, heads=4, seed=len(steps))
        real = None if count is None else np.int32(count)[: config.batch_size or 1]
        real = real if config.batch_size or real is None else real[0]
        expected = oracle.step(*arrays, real)[0]
        if not steps:
            oracle.truncate(2)
        steps.append(([np.float64(array[0]) for array in arrays], real, expected))
    return config, steps


@pytest.mark.slow_cases(r"^(?!x64.*-(float32|centred ring))")
@pytest.mark.parametrize(("flag", "kind"), CASES)
def test_steps_inside_and_outside_jit(flag, kind):
    config, steps = steps_of(kind)
    jitted = jit(layer_step, static_argnums=1)
    with FLAGS[flag]():
        cache = jaxkv.create(config)
        runs = (jitted, jitted, layer_step)
        for number, (arrays, num_tokens, expected) in enumerate(steps):
            arrays, num_tokens = jax.device_put((arrays, num_tokens))
            cache, outputs = runs[number](cache, 0, *arrays, num_tokens)
            np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
            cache = jaxkv.advance(cache, 1 if num_tokens is None else num_tokens)
            if number == 0:
                cache = jaxkv.truncate(cache, 2)
        jaxkv.layer(jaxkv.check(cache), 0)
        assert f"{[4, 4] if config.batch_size else 4} of 8 tokens" in repr(cache)
        if config.placement is None:
            assert jaxkv.fork(cache, 2).lengths.shape == (2 * (config.batch_size or 1),)
        assert not jaxkv.reset(cache).lengths.any()


@functools.cache
def model():
    return sharp_decoder()


def generated():
    prompts = [[5, 6, 7], [8]]
    result = jaxkv.generate(model(), prompts, max_new_tokens=3, max_context_length=16)
    config = model().cache_config(
        max_context_length=16, batch_size=2, addressing=jaxkv.Paged(4, num_pages=8)
    )
    with jaxkv.Engine(model(), config, sampling=jaxkv.Sampling(temperature=1.0)) as engine:
        requests = [engine.submit(prompt, max_new_tokens=3, seed=1) for prompt in prompts]
        engine.run()
    return result.tokens, [request.tokens for request in requests]


@functools.cache
def expected_generated():
    return generated()


@pytest.mark.slow_cases(r"^(?!x64)")
@pytest.mark.parametrize("flag", FLAGS)
def test_generate_and_an_engine(flag):
    expected = expected_generated()
    with FLAGS[flag]():
        actual = generated()
    assert actual[0] == expected[0]
    assert flag == "threefry" or actual[1] == expected[1]  # which is another generator
