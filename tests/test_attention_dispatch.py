"""Which implementation serves a call, and what a long prefill costs."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS, products
from jaxkv.attention.blockwise import KEY_BLOCK, QUERY_BLOCK
from jaxkv.native import unavailable
from tests.oracle import Oracle, config_of, layer_step, random_step, step

SHAPE = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16}


# Tokens, context, size of a head, who serves, and why another does not.
CALLS = {
    "decode": (1, 64, 16, "native", "reference: not needed, native comes first"),
    "decode by XLA": (1, 64, 8, "reference", "native: not used, head_dim 8 is not a multiple of"),
    "short prefill": (64, 64, 16, "reference", "blockwise: not needed, reference comes first"),
    "long context": (1, 2 * KEY_BLOCK, 8, "blockwise", "on a CPU it reads all 2048 slots"),
    "long prefill": (8192, 8192, 16, "blockwise", "its scores would take 268.4 MB"),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_first_that_can_serve_serves(monkeypatch, call):
    tokens, context, head_dim, serves, reason = CALLS[call]
    if serves == "native" and (missing := unavailable()):
        pytest.skip(missing)
    shape = SHAPE | {"head_dim": head_dim}
    cache = jaxkv.create(config_of(max_context_length=context, **shape))
    explanation = jaxkv.explain(cache, tokens=tokens)
    assert f"{serves}: used" in explanation
    assert reason in explanation

    # Implementations that answer with their own number show who was asked.
    for number, (name, implementation) in enumerate(list(IMPLEMENTATIONS.items())):
        answer = functools.partial(answer_with, number)
        monkeypatch.setitem(IMPLEMENTATIONS, name, implementation._replace(run=answer))
    queries = jnp.ones((tokens, 2, head_dim))
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


def one_decode(codec, value, implementation, dtype=jnp.float32):
    """A used slot that holds ``value``, and what a query that sees it gets."""
    config = jaxkv.KVCacheConfig(1, 4, 1, 16, codec=codec)
    vectors = jnp.full((1, 1, 16), value, dtype)
    cache = jaxkv.append(jaxkv.create(config), vectors, vectors, layer=0)
    if reason := IMPLEMENTATIONS[implementation].cannot_serve(cache, 1):
        pytest.skip(reason)
    return jaxkv.attend(cache, jnp.ones((1, 1, 16), dtype), layer=0, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("codec", [jaxkv.Dense("float32"), jaxkv.Dense("float16"), jaxkv.Int8()])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_blew_up_is_seen_to_have(implementation, codec, value):
    assert jnp.isnan(one_decode(codec, value, implementation)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_smallest_float16_numbers_are_read(implementation):
    values = one_decode(jaxkv.Dense("float16"), 3e-5, implementation)
    np.testing.assert_allclose(values, np.float16(3e-5), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_double_precision_mode(implementation):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        output = one_decode(jaxkv.Dense("float32"), 0.5, implementation, jnp.float64)
        assert output.dtype == jnp.float64
        np.testing.assert_allclose(output, 0.5)


FORMS = {
    "a head": (products.scores_by_head, products.mix_by_head),
    "sums": (products.summed_scores, products.summed_mix),  # on a GPU, where a group is small
    "packed": (products.packed_scores, products.packed_mix),  # on a CPU, where rows are few
}


@pytest.mark.parametrize("form", FORMS)
def test_the_products_in_each_form(form):
    generator = np.random.default_rng(0)
    arrays = [(2, 3, 2, 4, 16), (2, 50, 3, 16), (2, 3, 2, 4, 50)]
    queries, vectors, weights = (generator.standard_normal(shape, np.float32) for shape in arrays)
    scores, mix = FORMS[form]
    exact = [np.float64(array) for array in (queries, vectors, weights)]
    expected = np.einsum("bktgd,bskd->bktgs", exact[0], exact[1])
    np.testing.assert_allclose(scores(queries, vectors), expected, atol=1e-5)
    expected = np.einsum("bktgs,bskd->bktgd", exact[2], exact[1])
    np.testing.assert_allclose(mix(weights, vectors), expected, atol=1e-5)


def test_the_scores_of_all_query_heads_count():
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 1024, num_kv_heads=1, head_dim=16))
    assert "reference: used" in jaxkv.explain(cache, tokens=512, heads=8)
    assert "scores would take 134.2 MB" in jaxkv.explain(cache, tokens=512, heads=64)


def test_outside_jit_the_blocks_are_compiled_once(compilations):
    config = jaxkv.KVCacheConfig(1, 40, 1, 16, codec=jaxkv.Dense("float32"))
    cache, queries = jaxkv.create(config), jnp.ones((5, 1, 16))
    attend = functools.partial(jaxkv.attend, layer=0, implementation="blockwise")
    attend(cache, queries)
    first = len(compilations)
    attend(cache, queries)
    assert first == len(compilations) > 0


CANNOT_READ = {
    "native": ("jaxkv.attention.native", "cannot_serve"),
    "mosaic": ("jaxkv.attention.mosaic.attend", "cannot_read"),
    "cudnn": ("jaxkv.attention.cudnn.attend", "cannot_read"),
}


@pytest.mark.parametrize("kernel", CANNOT_READ)
def test_kernels_do_not_read_chunks_of_a_text(kernel):
    """Their masks know windows, which would show a chunk's first tokens the chunk before."""
    module, name = CANNOT_READ[kernel]
    cannot_read = getattr(importlib.import_module(module), name)
    shape = {"num_kv_heads": 8, "head_dim": 64, "codec": jaxkv.Dense("bfloat16")}
    ring, chunked = (
        jaxkv.create(jaxkv.KVCacheConfig(1, 256, **shape, addressing=addressing))
        for addressing in (jaxkv.Ring(128), jaxkv.Chunked(128))
    )
    assert cannot_read(ring, 1) is None
    assert cannot_read(chunked, 1) == "it cannot read chunked caches"
