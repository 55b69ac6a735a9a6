"""Decoder and GPT2 beside the goldens: what they refuse, gradients, initialization, no copies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import GPT2, Decoder, DecoderConfig, GPT2Config, layers
from tests.compiled import compiled_as_users_do
from tests.oracle import jit

# Few different shapes: each costs a compilation of the random generator.
LLAMA = DecoderConfig(64, 64, 64, num_layers=1, num_heads=4, num_kv_heads=2)
TIED = DecoderConfig(64, 64, 64, 1, 4, 2, tie_word_embeddings=True)
GEMMA2 = DecoderConfig(
    *(64, 64, 64, 2, 4, 2), architecture="Gemma2ForCausalLM", windows=(4, None),
    attention_softcap=2.0, logit_softcap=4.0, tie_word_embeddings=True,
)  # fmt: skip
GPT_OSS = DecoderConfig(
    *(64, 64, 64, 1, 4, 2), architecture="GptOssForCausalLM", windows=(4,),
    num_experts=4, experts_per_token=2,
)  # fmt: skip
SMALL_GPT2 = GPT2Config(64, 64, 1, num_heads=4, max_positions=16, intermediate_size=64)


@functools.cache
def make(config, dtype="float32"):
    kind = GPT2 if isinstance(config, GPT2Config) else Decoder
    return kind(config, rngs=nnx.Rngs(0), dtype=dtype)


@jax.jit
def uncached(model, tokens):
    return model(tokens)


def test_cache_config_fits_the_model():
    config = make(LLAMA, "bfloat16").cache_config(max_context_length=32, batch_size=3)
    assert config == jaxkv.KVCacheConfig(1, 32, 2, 16, 3, jaxkv.Dense("bfloat16"))
    codec = jaxkv.Dense("float16")
    assert make(SMALL_GPT2).cache_config(max_context_length=8, codec=codec).codec == codec
    assert make(LLAMA).vocab_size == 64


@pytest.mark.parametrize("config", [LLAMA, SMALL_GPT2], ids=["llama", "gpt2"])
def test_bad_tokens_are_refused(config):
    model = make(config)
    single = jaxkv.create(model.cache_config(max_context_length=8))
    batch = jaxkv.create(model.cache_config(max_context_length=8, batch_size=2))
    with pytest.raises(TypeError, match="tokens must be an integer array, got float32"):
        model(jnp.ones(3))
    with pytest.raises(ValueError, match=r"tokens must be \[tokens\], got \[2, 3\]"):
        model(jnp.ones((2, 3), jnp.int32), single)
    with pytest.raises(ValueError, match=r"tokens must be \[2, tokens\], got \[3\]"):
        model(jnp.ones(3, jnp.int32), batch)
    with pytest.raises(jaxkv.CacheFullError, match="holds 0 of 8 tokens, and 9 more"):
        model(jnp.ones(9, jnp.int32), single)


def test_gpt2_refuses_positions_that_it_did_not_learn():
    model = make(SMALL_GPT2)
    with pytest.raises(ValueError, match="16 learned positions, and the context is 17"):
        model(jnp.ones(17, jnp.int32))
    cache = jaxkv.create(model.cache_config(max_context_length=32))
    with pytest.raises(ValueError, match="at most 16, as max_context_length"):
        model(jnp.ones(1, jnp.int32), cache)


def test_an_unknown_token_is_not_read_as_another():
    logits, _ = uncached(make(LLAMA), jnp.array([[1, 63], [1, 64]]))
    assert jnp.isfinite(logits[0]).all()
    assert jnp.isnan(logits[1, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *((TIED, "float32"), (SMALL_GPT2, "float32")),
        *((config, "bfloat16") for config in (TIED, SMALL_GPT2, GEMMA2, GPT_OSS)),
    ],
    ids=lambda value: getattr(value, "architecture", None),
)
def test_random_model_starts_near_uniform_and_every_weight_learns(config, dtype):
    model = make(config, dtype)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))

    @jit
    @jax.value_and_grad
    def loss(model):
        logits, _ = model(tokens[:, :-1])
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    value, grads = loss(model)
    assert value == pytest.approx(math.log(64), rel=0.02)
    for path, grad in nnx.to_flat_state(nnx.state(grads)):
        assert jnp.isfinite(grad[...]).all(), path
        # A key's bias moves all logits of a query alike, and softmax does not see it.
        assert "c_attn" in path or jnp.abs(grad[...]).max() > 0, path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_step_copies_no_weight(tied, dtype, tokens):
    """Nor converts one, as XLA's CPU backend does for a single row of bfloat16."""
    model = make(DecoderConfig(128, 128, 128, 1, 4, tie_word_embeddings=tied), dtype)
    cache = jaxkv.create(model.cache_config(max_context_length=16))
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache), donate_argnames="cache")
    compiled = compiled_as_users_do(step.lower(model, jnp.ones(tokens, jnp.int32), cache))
    smallest_matrix = min(leaf.nbytes for leaf in jax.tree.leaves(model) if leaf.ndim == 2)
    assert compiled.memory_analysis().temp_size_in_bytes < smallest_matrix


@pytest.mark.parametrize("tokens", [1, 3])
def test_bfloat16_follows_float32(tokens):
    """The rounded weights, computed with in float32, are what bfloat16 must come near to."""
    narrow = make(LLAMA, "bfloat16")
    wide = jax.tree.map(lambda weight: weight.astype(jnp.float32), narrow)
    ids = jnp.arange(tokens)
    got, _ = uncached(narrow, ids)
    expected, _ = uncached(wide, ids)
    assert got.dtype == jnp.float32
    assert jnp.abs(got - expected).max() < 0.02 * jnp.abs(expected).max()


@pytest.mark.parametrize("features", [64, 48])  # in 32 parts, and in none
def test_a_row_that_is_summed_in_parts_has_the_same_norm(monkeypatch, features):
    """The GPU's form, on the CPU."""
    row = 3 * np.random.default_rng(0).standard_normal((1, 1, features), np.float32)
    expected = row / np.sqrt((row.astype(np.float64) ** 2).mean() + 1e-6)
    monkeypatch.setattr(layers, "by_platform", lambda runs, given: runs["gpu"](given))
    layers.unit.clear_cache()
    found = layers.unit(jnp.asarray(row), 1e-6)
    layers.unit.clear_cache()
    assert found.shape == row.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)
