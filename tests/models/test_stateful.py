"""Layers with a state: logits are those of transformers however a text is cut, and so are bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models import load, save
from jaxkv.models.recurrence import CHUNK, Terms, convolve, run
from tests.models.variants import NUM_TOKENS, goldens, model_of, token_ids

VARIANTS = ("lfm2", "qwen3_next", "bamba")
MORE = ("lfm2 as released", "qwen3_next dense", "bamba bias")


def each(fast, variants=VARIANTS):
    """Every variant, of which some are tried each time."""
    cases = [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in variants]
    return pytest.mark.parametrize("variant", cases)


@jax.jit
def step(model, tokens, cache, num_tokens=None):
    return model(tokens, cache, num_tokens=num_tokens)


def assert_golden(logits, variant, tokens):
    np.testing.assert_allclose(logits, goldens()[variant][tokens], atol=2e-4, rtol=0)


@each(["qwen3_next", "bamba"], [*VARIANTS, *MORE])
def test_chunks_with_padding_and_one_token_at_a_time(variant):
    """Chunks of 8 whose last tokens are padding, which leaves no trace, then single tokens."""
    model, tokens = model_of(variant), token_ids(variant)
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS))
    for start, real in ((0, 8), (8, 5), (13, 1)):
        chunk = np.zeros(8, np.int32)
        chunk[:real] = tokens[start : start + real]
        logits, cache = step(model, chunk, cache, jnp.int32(real))
        assert_golden(logits[:real], variant, slice(start, start + real))
    for place in range(14, NUM_TOKENS):
        logits, cache = step(model, tokens[place : place + 1], cache)
        assert_golden(logits[0], variant, place)
    assert jaxkv.check(cache).lengths == NUM_TOKENS


@each(["lfm2"], ["lfm2", "qwen3_next"])
def test_a_ragged_batch_equals_single_texts(variant):
    model, tokens = model_of(variant), np.tile(token_ids(variant), (3, 1))
    lengths = np.array([5, 23, 1], np.int32)
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, batch_size=3))
    padded = np.where(np.arange(NUM_TOKENS) < lengths[:, None], tokens, 0)
    prompt, cache = step(model, padded, cache, lengths)
    following, cache = step(model, np.take_along_axis(tokens, lengths[:, None], axis=1), cache)
    for row, length in enumerate(lengths):
        assert_golden(prompt[row, :length], variant, slice(length))
        assert_golden(following[row, 0], variant, length)
    # A row that is given anew begins from nothing.
    cache = jaxkv.reset(cache)
    logits, _ = step(model, tokens[:, :8], cache)
    assert_golden(logits[1], variant, slice(8))


@each(["bamba"], ["bamba", "qwen3_next"])
def test_a_fork_a_copy_and_a_file_go_on_bit_for_bit(variant, tmp_path):
    model, tokens = model_of(variant), token_ids(variant)
    cache = jaxkv.create(model.cache_config(max_context_length=NUM_TOKENS, batch_size=1))
    _, cache = step(model, tokens[None, :9], cache)
    copied = jaxkv.copy_state(cache)
    jaxkv.save(cache, tmp_path / "file", model=model)
    expected, longer = step(model, tokens[None, 9:10], cache)
    back = jaxkv.restore_state(step(model, tokens[None, 10:11], longer)[1], copied)
    for found in (back, jaxkv.load(tmp_path / "file", model=model)):
        assert (step(model, tokens[None, 9:10], found)[0] == expected).all()
    forked, _ = step(model, tokens[None, 9:10].repeat(2, axis=0), jaxkv.fork(cache, 2))
    np.testing.assert_allclose(forked, np.tile(expected, (2, 1, 1)), atol=1e-5)


@each(["lfm2"])
def test_generate_says_what_the_model_says_without_a_cache(variant):
    """Ragged prompts, in chunks of 8: greedy tokens are the arguments of the largest logits."""
    model = model_of(variant)
    prompts = [np.resize(token_ids(variant), length).tolist() for length in (13, 1, 20)]
    result = jaxkv.generate(
        model, prompts, max_new_tokens=6, prefill_chunk=8, max_context_length=32
    )
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        logits, _ = step(model, np.array(prompt + tokens, np.int32), None)
        assert jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == tokens
    if variant == VARIANTS[0]:
        with pytest.raises(jaxkv.ConfigError, match="layers with a state cannot go back"):
            jaxkv.generate(model, prompts, max_new_tokens=6, draft=jaxkv.drafts.NGram())


@each(VARIANTS)
def test_bfloat16_keeps_sums_in_float32(variant):
    config = model_of(variant).cache_config(max_context_length=8, codec="bfloat16")
    (state,) = config.states
    assert {array.name: array.dtype for array in state.arrays}["conv"] == "float32"  # the model's
    half = jaxkv.cache_config(dict(model_of(variant).config.to_hf()), max_context_length=8)
    kept = {array.name: array.dtype for array in half.states[0].arrays}
    assert kept.pop("conv") == "bfloat16"
    assert set(kept.values()) <= {"float32"}


@each(["lfm2"], [*VARIANTS, *MORE])
def test_a_model_is_saved_as_it_was_loaded(variant, tmp_path):
    model = model_of(variant)
    save(model, tmp_path)
    again, _ = load(tmp_path)
    assert again.config == model.config
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        assert (found == expected).all()


# Released models: keys and values per token, and the state of each sequence, both of bfloat16 but
# sums. A convolution keeps one input less than transformers does, the one that a step brings.
LFM2_1_2B = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
QWEN3_NEXT_80B = {"model_type": "qwen3_next"}
BAMBA_9B = {"model_type": "bamba", "attn_layer_indices": [9, 18, 27]}
BYTES = {
    "LFM2-1.2B": (LFM2_1_2B, 6 * 2 * 8 * 64 * 2, 10 * 2 * 2048 * 2),
    "Qwen3-Next-80B-A3B": (
        QWEN3_NEXT_80B,
        12 * 2 * 2 * 256 * 2,
        36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2),
    ),
    "Bamba-9B": (
        BAMBA_9B | {"mamba_d_state": 128},
        3 * 2 * 8 * 128 * 2,
        29 * (128 * 64 * 128 * 4 + 3 * (8192 + 2 * 128) * 2),
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_released_models(name):
    config, per_token, per_sequence = BYTES[name]
    for context, batch in ((1, 1), (4096, 3)):
        cache = jaxkv.cache_config(config, max_context_length=context, batch_size=batch)
        assert cache.size_bytes == batch * (context * per_token + per_sequence)
        assert cache.states[0].bytes_per_sequence == per_sequence
    plan = jaxkv.plan(cache, "80GB")
    assert plan.needed_bytes == cache.size_bytes + cache.index_bytes
    assert "layers of state" in str(plan)
    free = 10 * (4096 * per_token + per_sequence + 12) + 11
    assert jaxkv.plan(cache, free).max_batch_size == 10


@pytest.mark.filterwarnings("ignore")
@each([])
def test_what_transformers_keeps(variant):
    """The numbers of its own cache after five tokens, but for the oldest input of convolutions."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    fields = model_of(variant).config.to_hf()
    config = transformers.AutoConfig.for_model(**fields)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    own = {}
    if variant == "bamba":  # it makes none itself
        from transformers.models.bamba.modeling_bamba import HybridMambaAttentionDynamicCache

        own = {"past_key_values": HybridMambaAttentionDynamicCache(config, 1, torch.float32)}
    with torch.no_grad():
        kept = theirs(torch.ones((1, 5), dtype=torch.long), use_cache=True, **own).past_key_values
    ours = jaxkv.cache_config(fields, max_context_length=5)
    counted = {"kv": 0, "conv": 0, "recurrent": 0}
    kinds = {"conv_cache": "conv", "conv_states": "conv", "recurrent_states": "recurrent"}
    kinds |= {"ssm_states": "recurrent", "key_cache": "kv", "value_cache": "kv"}
    for name, kind in kinds.items():
        arrays = enumerate(getattr(kept, name, ()))
        counted[kind] += sum(
            array.numel()
            for layer, array in arrays
            if array is not None and (kind == "kv" or layer in ours.states[0].layers)
        )
    shapes = {array.name: array.shape for array in ours.states[0].arrays}
    width, channels = shapes["conv"]
    assert counted["conv"] == ours.states[0].num_layers * (width + 1) * channels
    assert counted["recurrent"] == ours.states[0].num_layers * np.prod(
        shapes.get("recurrent", (0,))
    )
    assert 2 * counted["kv"] == ours.groups[0].size_bytes


def by_token(queries, keys, values, decay, beta, state):
    """One token after the other, in float64."""
    outputs = []
    for token in range(len(queries)):
        state = state * np.exp(decay[token])[:, None, None]
        value = values[token]
        if beta is not None:
            value = beta[token][:, None] * (value - np.einsum("hk,hkv->hv", keys[token], state))
        state = state + keys[token][..., None] * value[:, None]
        outputs.append(np.einsum("hk,hkv->hv", queries[token], state))
    return np.array(outputs), state


@pytest.mark.parametrize("delta", [True, False], ids=["delta rule", "sums"])
@pytest.mark.parametrize("tokens", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_recurrences_by_chunks_are_those_by_tokens(delta, tokens):
    """In a batch whose second text ends in padding."""
    rng = np.random.default_rng(tokens)
    shape = (2, tokens, 3)
    queries, keys = (rng.standard_normal((*shape, 4)) for _ in range(2))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values, state = rng.standard_normal((*shape, 5)), rng.standard_normal((2, 3, 4, 5))
    decay, beta = -rng.exponential(0.3, shape), rng.uniform(0, 1, shape)
    real = max(tokens - 2, 1)
    decay[1, real:], beta[1, real:] = 0, 0
    if not delta:
        values[1, real:] = 0
    terms = Terms(queries, keys, values, decay, beta if delta else None)
    narrow = jax.tree.map(lambda term: jnp.asarray(term, jnp.float32), (terms, state))
    output, after = jax.jit(run)(*narrow)
    for row, end in enumerate((tokens, real)):
        own = [None if term is None else term[row, :end] for term in terms]
        expected, left = by_token(*own, state[row])
        np.testing.assert_allclose(output[row, :end], expected, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(after[row], left, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolutions_see_the_newest_inputs(width):
    rng = np.random.default_rng(width)
    kept, inputs, weight, bias = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, width - 1, 3), (2, 5, 3), (3, width), (3,))
    )
    real = np.arange(5) < np.array([[5], [2]])
    outputs, rest = convolve(*map(jnp.asarray, (inputs, kept, weight, bias, real)))
    window = np.concatenate([kept, inputs], axis=1)
    expected = [(window[:, place : place + width] * weight.T).sum(1) + bias for place in range(5)]
    np.testing.assert_allclose(outputs, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    for row, count in enumerate((5, 2)):
        assert (rest[row] == window[row, count : count + width - 1]).all()
