"""Which implementation serves a call, and what a long prefill costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.attention.blockwise import KEY_BLOCK, QUERY_BLOCK
from tests.oracle import Oracle, config_of, layer_step, random_step, step

SHAPE = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16}


# Tokens, context, who serves on several CPU devices, and why another does not.
CALLS = {
    "decode": (1, 64, "reference", "native: not used, this process has 8 CPU devices"),
    "short prefill": (64, 64, "reference", "blockwise: not needed, reference comes first"),
    "long context": (1, 2 * KEY_BLOCK, "blockwise", "on a CPU it reads all 2048 slots"),
    "long prefill": (8192, 8192, "blockwise", "its scores would take 268.4 MB"),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_first_that_can_serve_serves(monkeypatch, call):
    tokens, context, serves, reason = CALLS[call]
    cache = jaxkv.create(config_of(max_context_length=context, **SHAPE))
    explanation = jaxkv.explain(cache, tokens=tokens)
    assert f"{serves}: used" in explanation
    assert reason in explanation

    # Implementations that answer with their own number show who was asked.
    for number, (name, implementation) in enumerate(list(IMPLEMENTATIONS.items())):
        answer = functools.partial(answer_with, number)
        monkeypatch.setitem(IMPLEMENTATIONS, name, implementation._replace(run=answer))
    queries = jnp.ones((tokens, 2, 16))
    for name in (None, *IMPLEMENTATIONS):
        if name is None or not IMPLEMENTATIONS[name].cannot_serve(cache, tokens):
            output = jaxkv.attend(cache, queries, layer=0, implementation=name)
            assert (output == list(IMPLEMENTATIONS).index(name or serves)).all()


def answer_with(number, request):
    return jnp.full_like(request.queries, number)


def test_prefill_over_many_blocks_equals_the_oracle():
    prefill, chunk = 3 * QUERY_BLOCK + 32, QUERY_BLOCK + 44  # neither fills its last block
    config = config_of(max_context_length=KEY_BLOCK + 100, **SHAPE)
    cache, oracle = jaxkv.create(config), Oracle(config)
    for tokens in (prefill, chunk):
        arrays = random_step(config, tokens, heads=2)
        cache, outputs = step(cache, *arrays, run=jax.jit(layer_step))
        np.testing.assert_allclose(outputs, oracle.step(*arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [4096, 16384])
def test_a_long_prefill_never_holds_all_scores(context):
    tokens, heads = 4096, 8
    config = config_of(max_context_length=context, **SHAPE | {"num_kv_heads": heads})
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    arrays = jax.ShapeDtypeStruct((tokens, heads, 16), jnp.float32)
    compiled = (
        jax.jit(layer_step, donate_argnums=0).lower(cache, 0, arrays, arrays, arrays).compile()
    )
    all_scores = 4 * heads * tokens * context
    block = 4 * heads * QUERY_BLOCK * KEY_BLOCK
    inputs = 4 * heads * tokens * 16
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 4 * block + 8 * inputs, "does not depend on the context"
    assert temp < all_scores / 8


def test_no_tokens_give_no_outputs():
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 16))
    assert jaxkv.attend(cache, jnp.zeros((0, 2, 16)), layer=0).shape == (0, 2, 16)
