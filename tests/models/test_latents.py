"""Multi-head latent attention, absorbed, against the expanded form by its definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import load, save
from tests.models.variants import NUM_TOKENS, hf_config, token_ids, weights
from tests.models.variants import write_checkpoint as written
from tests.oracle import jit


@jit
def step(model, tokens, cache, num_tokens=None):
    return model(tokens, cache, num_tokens=num_tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(written("youtu", tmp_path_factory.mktemp("checkpoint")))[0]


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turned(vectors, theta):
    """Pairs of neighbours, turned by the angles of their token."""
    dim = vectors.shape[-1]
    angles = np.arange(len(vectors))[:, None] * theta ** -(np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * angles)[:, None]
    pairs = (vectors[..., ::2] + 1j * vectors[..., 1::2]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def expanded_logits(variant="youtu"):
    """Keys and values of every head made of the latents, and attended to head by head."""
    config = hf_config(variant)
    tensors = {name: tensor.astype(np.float64) for name, tensor in weights(variant).items()}
    heads, rank, plain = (
        config[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim")
    )
    theta = config["rope_theta"]
    causal = np.tril(np.ones((NUM_TOKENS, NUM_TOKENS), bool))
    x = tensors["model.embed_tokens.weight"][token_ids(variant)]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor.T
            for name, tensor in tensors.items()
        }
        attention = {name.removeprefix("self_attn."): tensor for name, tensor in own.items()}
        h = norm(x, own["input_layernorm"], config["rms_norm_eps"])
        made_of = norm(h @ attention["q_a_proj"], attention["q_a_layernorm"], 1e-6)
        queries = (made_of @ attention["q_b_proj"]).reshape(NUM_TOKENS, heads, -1)
        both = h @ attention["kv_a_proj_with_mqa"]
        latents = norm(both[:, :rank], attention["kv_a_layernorm"], 1e-6)
        made = (latents @ attention["kv_b_proj"]).reshape(NUM_TOKENS, heads, -1)
        rope_keys = np.repeat(turned(both[:, None, rank:], theta), heads, axis=1)
        keys = np.concatenate([made[..., :plain], rope_keys], axis=-1)
        rope_queries = turned(queries[..., plain:], theta)
        queries = np.concatenate([queries[..., :plain], rope_queries], axis=-1)
        scores = np.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
        shares = np.exp(np.where(causal, scores, -np.inf))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khv->qhv", shares, made[..., plain:])
        x = x + mixed.reshape(NUM_TOKENS, -1) @ attention["o_proj"]
        h = norm(x, own["post_attention_layernorm"], config["rms_norm_eps"])
        gate = h @ own["mlp.gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["mlp.up_proj"])) @ own["mlp.down_proj"]
    x = norm(x, tensors["model.norm.weight"], config["rms_norm_eps"])
    return x @ tensors["lm_head.weight"].T


def test_absorbed_equals_expanded(model):
    """At once without a cache, and in chunks and tokens from latents of which no head is made."""
    expected, tokens = expanded_logits(), jnp.asarray(token_ids("youtu"))
    logits, _ = model(tokens)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    config = model.cache_config(max_context_length=NUM_TOKENS)
    assert (config.num_kv_heads, config.head_dim, config.value_dim) == (1, 12 + 4, 12)
    assert config.bytes_per_token == 2 * (12 + 4) * 4
    cache, start = jaxkv.create(config), 0
    for size in (20, 1, 1, 1, 1):
        logits, cache = step(model, tokens[start : start + size], cache)
        np.testing.assert_allclose(logits, expected[start : start + size], atol=2e-5)
        start += size


def test_absorbed_attention_equals_expanded():
    """One step over latents, and over the keys and values that are made of them."""
    heads, rank, rope, plain, values = 4, 32, 16, 24, 20
    rng = np.random.default_rng(0)
    latents, rope_keys = (rng.standard_normal((50, 1, size)) for size in (rank, rope))
    queries = rng.standard_normal((50, heads, plain + rope))
    to_keys, to_values = (
        rng.standard_normal((rank, heads, size)) * rank**-0.5 for size in (plain, values)
    )
    made = np.einsum("nor,rhp->nhp", latents, to_keys)
    keys = np.concatenate([made, np.repeat(rope_keys, heads, axis=1)], axis=-1)
    whole = [keys, np.einsum("nor,rhv->nhv", latents, to_values)]
    absorbed = np.einsum("nhp,rhp->nhr", queries[..., :plain], to_keys)
    absorbed = np.concatenate([absorbed, queries[..., plain:]], axis=-1)

    def attended(config, queries, *vectors):
        cache = jaxkv.create(config)
        given = [jnp.asarray(each, jnp.float32) for each in (queries, *vectors)]
        cache = jaxkv.append(cache, *given[1:], layer=0)
        return jaxkv.attend(cache, given[0], layer=0, scale=0.2)

    shared = {"num_layers": 1, "max_context_length": 50, "codec": jaxkv.Dense("float32")}
    latent = {"num_kv_heads": 1, "head_dim": rank + rope, "value_dim": rank}
    config = jaxkv.KVCacheConfig(**shared, **latent, values_in_keys=True)
    mixed = attended(config, absorbed, np.concatenate([latents, rope_keys], axis=-1))
    output = np.einsum("nhr,rhv->nhv", mixed, to_values)
    apart = {"num_kv_heads": heads, "head_dim": plain + rope, "value_dim": values}
    expected = attended(jaxkv.KVCacheConfig(**shared, **apart), queries, *whole)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.slow
def test_yarn_of_deepseek_v2_is_that_of_v3():
    """As in DeepSeek's own code; transformers leaves the temperature out of V2's logits."""
    fields = hf_config("deepseek_v3 yarn") | {"first_k_dense_replace": 3}
    own = hf_config("deepseek_v2") | {"first_k_dense_replace": 3}
    own |= {name: fields[name] for name in ("rope_scaling", "rope_theta")}
    tokens, logits = jnp.asarray(token_ids("deepseek_v2")), []
    for each in (fields, own, own | {"rope_scaling": None}):
        config = jaxkv.models.DecoderConfig.from_hf(each)
        model = jaxkv.models.Decoder(config, rngs=nnx.Rngs(0))
        logits.append(step(model, tokens, None)[0])
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0


def test_a_pool_serves_latents_and_a_prefix_that_is_found_changes_nothing(model):
    """Two requests with one beginning, one after the other, as greedy without a cache."""
    pool = jaxkv.Paged(page_size=4, num_pages=24)
    config = model.cache_config(max_context_length=40, batch_size=2, addressing=pool)
    prompts = [token_ids("youtu")[:20].tolist(), [*token_ids("youtu")[:16].tolist(), 3]]
    with jaxkv.Engine(model, config, prefill_chunk=8, decode_steps=4) as engine:
        for prompt in prompts:
            request = engine.submit(prompt, max_new_tokens=4)
            engine.run()
            text = jnp.asarray(np.resize(np.array(prompt + request.tokens, np.int32), 24))
            greedy = step(model, text, None)[0].argmax(-1)[len(prompt) - 1 :][:4]
            assert request.tokens == greedy.tolist()
        assert request.num_cached == 16


def test_a_model_that_is_saved_is_the_same(model, tmp_path):
    save(model, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config == model.config
    tokens = jnp.asarray(token_ids("youtu"))
    np.testing.assert_array_equal(step(loaded, tokens, None)[0], step(model, tokens, None)[0])


def test_a_config_without_its_numbers_is_refused():
    fields = dict(hf_config("youtu"), kv_lora_rank=0)
    with pytest.raises(jaxkv.CheckpointError, match="rank must be"):
        jaxkv.models.DecoderConfig.from_hf(fields)
