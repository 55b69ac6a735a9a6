"""Logits equal transformers' in every variant, and equal each other however they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxkv
from jaxkv.models import RopeConfig, load, save
from tests.models.variants import (
    NUM_TOKENS,
    VARIANTS,
    goldens,
    model_of,
    token_ids,
    write_checkpoint,
)
from tests.oracle import jit

TOLERANCE = 2e-4


@pytest.fixture
def model(request):
    return model_of(request.param)


def for_each(*variants):
    return pytest.mark.parametrize(
        ("variant", "model"), [(v, v) for v in variants], indirect=["model"], ids=variants
    )


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "youtu", "deepseek_v2", "deepseek_v3")
EXPERTS = ("mixtral", "qwen3_moe", "glm4_moe")
PLAIN = ("olmo2", "phi3", "glm4", "smollm3", "granite", "cohere", "stablelm", "gpt_neox")
SLIDING = ("mistral", "qwen3 sliding", "gemma2", "gemma3", "gpt_oss", "olmo3", "cohere2")
SLIDING += ("llama4", "gemma3n")
# Biases, activations and widths do not meet the cache; these do.
HEADS_AND_SCALES = ("llama mha", "llama mqa", "gpt2 unscaled", "gpt2 by layer")
SCALED_ROPES = tuple(
    v
    for v in VARIANTS
    if {"rope_scaling", "rope_parameters"} & set(VARIANTS[v]) and "gpt_oss" not in v
)


@jit
def step(model, tokens, cache, num_tokens=None):
    return model(tokens, cache, num_tokens=num_tokens)


def assert_golden(logits, variant, tokens=slice(None)):
    np.testing.assert_allclose(logits, goldens()[variant][tokens], atol=TOLERANCE, rtol=0)


NEWER = "|".join((*FAMILIES[-2:], *EXPERTS, *PLAIN, "cohere2", "llama4", "gemma3n"))


@pytest.mark.slow_cases(rf"({NEWER}) |cohere$|cohere-|olmo3|olmoe|seed|arcee|neox")
@for_each(*VARIANTS)
def test_uncached_logits_equal_transformers(variant, model):
    logits, cache = model(jnp.asarray(token_ids(variant)))
    assert cache is None
    assert logits.dtype == jnp.float32
    assert_golden(logits, variant)


@pytest.mark.slow
@for_each(*FAMILIES, *EXPERTS, *PLAIN, *SLIDING, *HEADS_AND_SCALES, *SCALED_ROPES)
def test_logits_of_chunks_equal_transformers(variant, model):
    """Where layers slide, 24 tokens go round a ring of 7 - 1 + 8 slots."""
    tokens, model = jnp.asarray(token_ids(variant)), model.for_context(NUM_TOKENS)
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, chunk=8))
    for start in range(0, NUM_TOKENS, 8):
        chunk = slice(start, start + 8)
        logits, cache = model(tokens[chunk], cache)
        assert_golden(logits, variant, chunk)
    assert cache.lengths == NUM_TOKENS


# Variants, and the most tokens that a text can have for its rope to be that of shorter ones.
LENGTH_DEPENDENT = [("llama longrope short", 32), ("llama longrope", 16), ("llama dynamic", 16)]


@pytest.mark.parametrize(("variant", "trained"), LENGTH_DEPENDENT)
def test_room_that_a_text_does_not_use_changes_nothing(variant, trained):
    """A cache with room for longer texts, whose rope is another, is refused until one is chosen."""
    model, tokens = model_of(variant), jnp.asarray(token_ids(variant))
    short = model.for_context(trained)
    expected, _ = model(tokens[:10])  # as transformers: by the text's own length
    roomy = jaxkv.create(short.cache_config(max_context_length=trained + 1))
    for refused in (
        lambda: model.cache_config(max_context_length=trained + 1),
        lambda: model(tokens[:10], roomy),
        lambda: model(jnp.tile(tokens, 2)[: trained + 1], num_tokens=jnp.int32(10)),
    ):
        with pytest.raises(
            ValueError, match=rf"more than {trained} tokens .*for_context\({trained}"
        ):
            refused()
    np.testing.assert_allclose(short(tokens[:10], roomy)[0], expected, atol=TOLERANCE)
    fitting = jaxkv.create(model.cache_config(max_context_length=trained))
    np.testing.assert_allclose(model(tokens[:10], fitting)[0], expected, atol=TOLERANCE)


@pytest.mark.parametrize(("variant", "trained"), LENGTH_DEPENDENT)
def test_a_rope_that_was_chosen_is_saved(variant, trained, tmp_path):
    chosen = model_of(variant).for_context(trained + 8)
    save(chosen, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config == chosen.config
    assert (loaded.config != model_of(variant).config) == (
        trained < NUM_TOKENS or "short" in variant
    )


@pytest.mark.slow_cases("llama4|gemma3n")
@for_each("llama", "qwen3", "gpt2", "gemma3", "gpt_oss", "youtu", "llama4", "gemma3n")
def test_one_shot_and_one_token_at_a_time(variant, model):
    tokens = jnp.asarray(token_ids(variant))
    chunk = NUM_TOKENS if variant == "llama4" else None  # chunks of the text are not masks alone
    empty = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, chunk=chunk))
    one_shot, cache = step(model, tokens, empty)
    assert_golden(one_shot, variant)
    assert cache.lengths == NUM_TOKENS
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, chunk=1))
    for position, token in enumerate(tokens):
        logits, cache = step(model, token[None], cache)
        assert_golden(logits[0], variant, position)


@pytest.mark.slow_cases("llama4|gemma3n")
@for_each("llama", "gpt2", "gemma2", "gpt_oss", "youtu", "llama4", "gemma3n")
@pytest.mark.parametrize("padding", ["dropped", "truncated"])
def test_ragged_batch_equals_single(variant, model, padding):
    """A prompt padded on the right, then one token more, whatever the neighbours are."""
    tokens = np.tile(token_ids(variant), (3, 1))
    lengths = np.array([5, 23, 1], np.int32)
    padded = np.where(np.arange(NUM_TOKENS) < lengths[:, None], tokens, 0)
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, batch_size=3))
    if padding == "dropped":
        prompt_logits, cache = step(model, padded, cache, lengths)
    else:
        prompt_logits, cache = step(model, padded, cache)
        cache = jaxkv.truncate(cache, lengths)
    next_tokens = np.take_along_axis(tokens, lengths[:, None], axis=1)
    next_logits, cache = step(model, next_tokens, cache)
    assert cache.lengths.tolist() == [6, 24, 2]
    for sequence, length in enumerate(lengths):
        assert_golden(prompt_logits[sequence, :length], variant, slice(length))
        assert_golden(next_logits[sequence, 0], variant, length)


def test_uncached_forward_takes_any_leading_axes():
    model = model_of("llama")
    tokens = jnp.asarray(token_ids("llama"))
    logits, _ = model(jnp.broadcast_to(tokens, (2, 3, NUM_TOKENS)))
    assert logits.shape == (2, 3, NUM_TOKENS, 64)
    assert_golden(logits[1, 2], "llama")


@pytest.mark.parametrize("variant", [v for v in SCALED_ROPES if "default" not in v])
def test_goldens_tell_scalings_apart(variant):
    """With the plain frequencies the logits are others, unless the variant says it is short."""
    changed = nnx.clone(model_of(variant))
    plain = RopeConfig(changed.config.rope.head_dim, theta=changed.config.rope.theta)
    changed.config = dataclasses.replace(changed.config, rope=plain)
    logits, _ = changed(jnp.asarray(token_ids(variant)))
    off = np.abs(logits - goldens()[variant]).max()
    assert off < TOLERANCE if variant == "llama dynamic short" else off > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral", {"windows": ()}),
        ("qwen2 sliding", {"windows": (7, 7)}),
        ("gemma2", {"windows": (None, 7)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"windows": (7, 7, 7)}),
        ("gemma3", {"local_rope": RopeConfig(16, theta=1000.0)}),
        ("gemma3", {"rope": RopeConfig(16, theta=50.0)}),
        ("gpt_oss", {"windows": ()}),
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("llama4", {"windows": (None,) * 3}),
        ("llama4", {"grows_queries": False}),
        ("llama4", {"rope_layers": (True,) * 3}),
        ("gemma3n", {"sources": ()}),
        ("gemma3n", {"attention_multiplier": 0.25}),
    ],
)
def test_goldens_tell_options_apart(variant, changes):
    changed = nnx.clone(model_of(variant))
    config = dataclasses.replace(changed.config, **changes)
    for _, module in nnx.iter_modules(changed):
        if hasattr(module, "config"):
            module.config = config
    logits, _ = changed(jnp.asarray(token_ids(variant)))
    assert np.abs(logits - goldens()[variant]).max() > 100 * TOLERANCE


@for_each("gpt_oss")
def test_sinks_take_attention(variant, model):
    changed = nnx.clone(model)
    for layer in changed.layers:
        layer.self_attn.sinks[...] -= 30.0
    logits, _ = changed(jnp.asarray(token_ids(variant)))
    assert np.abs(logits - goldens()[variant]).max() > 100 * TOLERANCE


@for_each("gemma2")
def test_generate_goes_round_the_rings(variant, model):
    """Greedy tokens are those of the uncached model, far past the window and the ring."""
    prompts = [np.resize(token_ids(variant), length).tolist() for length in (150, 3)]
    result = jaxkv.generate(model, prompts, max_new_tokens=8, max_context_length=160)
    ring, full = result.config.groups
    assert (ring.num_slots, full.num_slots) == (2 * 136, 2 * 160)  # 7 - 1 + 128, in eights
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        padded = np.resize(np.array(prompt + tokens, np.int32), 160)
        logits, _ = step(model, padded, None)
        seen = logits[len(prompt) - 1 : len(prompt) + len(tokens) - 1]
        assert jnp.argmax(seen, axis=-1).tolist() == tokens


@pytest.mark.slow_cases("llama4 other|gemma3n")
@for_each("llama4", "llama4 other layers", "gemma3n")
def test_an_engine_says_what_the_model_says_without_a_cache(variant, model):
    """Prompts with common starts, in pages of pools of two kinds, of which some are given back."""
    texts = np.random.default_rng(1).integers(0, 64, (2, 30))
    prompts = [[*texts[i % 2, :length].tolist(), i] for i, length in enumerate((26, 9, 17, 30, 2))]
    pool = jaxkv.Paged(page_size=4, num_pages=24)
    config = model.cache_config(max_context_length=48, batch_size=2, addressing=pool, chunk=8)
    with jaxkv.Engine(model, config, prefill_chunk=8, decode_steps=4) as engine:
        requests = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        engine.run()
        engine.pages.check()
        assert engine.pages.usage().hit_tokens > 0
    for prompt, request in zip(prompts, requests, strict=True):
        text = np.array(prompt + request.tokens, np.int32)
        logits = step(model, np.resize(text, 48), None)[0][len(prompt) - 1 : len(text) - 1]
        assert jnp.argmax(logits, axis=-1).tolist() == request.tokens


def test_chunks_of_the_text_are_not_read_from_a_cache_of_another_kind():
    model = model_of("llama4")
    shape = model.config.shape._replace(aligned=False)
    sliding = jaxkv.create(shape.cache_config(max_context_length=8, codec="float32"))
    with pytest.raises(ValueError, match=r"within chunks of 7 .* has Ring\(.*jaxkv.Chunked\(7\)"):
        model(jnp.arange(3), sliding)


@for_each("gemma2", "gpt_oss")
@pytest.mark.parametrize("chunk", [8, None])
def test_windows_beside_pages_and_in_them(variant, model, chunk):
    """Full layers in pages beside rings; or all layers in pages, where windows only mask."""
    addressing = jaxkv.Paged(page_size=4)
    config = model.cache_config(
        max_context_length=NUM_TOKENS, batch_size=1, addressing=addressing, chunk=chunk
    )
    groups = [config] if chunk is None else list(config.groups)
    rings = [] if chunk is None else [jaxkv.Ring(7, chunk=8)]
    assert [group.addressing for group in groups] == [*rings, addressing]
    cache, tokens = jaxkv.create(config), jnp.asarray(token_ids(variant))[None]
    for start in range(0, NUM_TOKENS, 8):
        logits, cache = step(model, tokens[:, start : start + 8], cache)
        assert_golden(logits[0], variant, slice(start, start + 8))


@pytest.mark.slow
@pytest.mark.devices(4)
@pytest.mark.parametrize("variant", ["deepseek_v3", "olmo2", "llama4"])
def test_a_model_over_a_mesh(variant, tmp_path):
    """Heads and inner features over four devices; a latent, and a head of two, is on several."""
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    axes = jaxkv.Axes(heads="heads")
    model, _ = load(write_checkpoint(variant, tmp_path), mesh=mesh, axes=axes)
    config = model.cache_config(max_context_length=NUM_TOKENS, chunk=12)
    cache, tokens = jaxkv.create(config, mesh=mesh, axes=axes), jnp.asarray(token_ids(variant))
    for part in (slice(12), slice(12, 23), slice(23, 24)):
        logits, cache = step(model, tokens[part], cache)
        assert_golden(logits, variant, part)


@pytest.mark.slow
@for_each("gemma3")
def test_a_codec_a_layer(variant, model):
    """Rings in two codecs and a full layer: three groups, each as large as its own kind."""
    codecs = jaxkv.wide_at_the_ends(3, jaxkv.Int8(), jaxkv.Dense("float32"))
    config = model.cache_config(max_context_length=NUM_TOKENS, chunk=8, codec=codecs)
    assert config.group_of_layer == (0, 1, 2)
    per_token = 2 * 2 * 4 * 16  # keys and values, KV heads, bytes, head_dim
    assert config.size_bytes == 14 * per_token + 14 * 2 * 2 * (16 + 2) + NUM_TOKENS * per_token
    cache, tokens = jaxkv.create(config), jnp.asarray(token_ids(variant))
    for start in range(0, NUM_TOKENS, 8):
        chunk = slice(start, start + 8)
        logits, cache = model(tokens[chunk], cache)
        np.testing.assert_allclose(logits, goldens()[variant][chunk], atol=0.3)
