"""Vectors less their mean: the algebra, when means are set, and the rope that keys are under."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.integrations.attention import cached_attention
from jaxkv.models import Decoder, DecoderConfig, RopeConfig
from jaxkv.models.rope import rotate, rotation
from jaxkv.serve import decode
from tests.decoders import TABLE, look_up
from tests.oracle import assert_same_storage, jit, layer_step, poisoned

HEAD_DIM = 16
ROPES = {
    "plain": RopeConfig(HEAD_DIM, theta=100.0),
    "partial": RopeConfig(HEAD_DIM, theta=100.0, partial_rotary_factor=0.5),
    "scaled": RopeConfig(
        HEAD_DIM,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
}


def described(rope):
    return jaxkv.Rope(tuple(rope.frequencies(64).tolist()))


def vectors_under(rope, tokens, *, first=0, seed=0):
    """Keys with a mean that the rope turns, and values with one, ``[tokens, 2, head_dim]``."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, tokens, 2, HEAD_DIM), np.float32)
    keys[..., 3] += 8
    positions = jnp.arange(first, first + tokens)
    return np.asarray(rotate(jnp.asarray(keys), rotation(rope, positions, 64))), values + 1


def config_of(codec, **fields):
    return jaxkv.KVCacheConfig(2, 24, 2, HEAD_DIM, codec=codec, **fields)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_centres_turn_as_the_model_turns_keys(rope):
    means = np.random.default_rng(0).standard_normal((2, 2, HEAD_DIM), np.float32)
    positions = np.array([0, 1, 63, 4095, 100_000])
    codec = jaxkv.Centred(jaxkv.Rotated(4), described(rope))
    keys, values = codec.offsets({"means": jnp.asarray(means)}).at(jnp.asarray(positions)[:, None])
    turned = rotate(jnp.tile(means[0], (5, 1, 1)), rotation(rope, jnp.asarray(positions), 64))
    np.testing.assert_allclose(keys[:3], turned[:3], atol=3e-3)
    # Far out the model's own angles are off by what float32 leaves of them.
    np.testing.assert_allclose(keys, turned, atol=4e-2)
    np.testing.assert_array_equal(values, np.tile(means[1], (5, 1, 1)))


def test_interleaved_pairs_are_neighbours():
    half = jaxkv.Rope.of(100.0, rotary_dim=4)
    neighbours = jaxkv.Rope.of(100.0, rotary_dim=4, interleaved=True)
    means, order = jnp.asarray([[[1.0, 2.0, 3.0, 4.0, 5.0]]] * 2), np.array([0, 2, 1, 3, 4])
    turned = jaxkv.codecs.Offsets(means, half).at(jnp.array([[7]]))
    same = jaxkv.codecs.Offsets(means[..., order], neighbours).at(jnp.array([[7]]))
    np.testing.assert_array_equal(same, turned[..., order])


@pytest.mark.slow_cases(r"none")
@pytest.mark.parametrize(
    ("rope", "implementation"),
    [(ROPES["partial"], "blockwise"), (None, "blockwise"), (ROPES["scaled"], "reference")],
    ids=["partial", "none", "scaled"],
)
def test_attention_is_what_it_is_without(monkeypatch, rope, implementation):
    """Exactly stored differences and their means are the vectors: so must the outputs be."""
    monkeypatch.setattr("jaxkv.attention.blockwise.QUERY_BLOCK", 2)
    monkeypatch.setattr("jaxkv.attention.blockwise.KEY_BLOCK", 4)
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    run = jit(
        functools.partial(
            layer_step, implementation=implementation, softcap=5.0, window=6, sinks=sinks
        )
    )
    plain = jaxkv.create(config_of(jaxkv.Dense("float32")))
    codec = jaxkv.Centred(jaxkv.Dense("float32"), rope and described(rope))
    centred = poisoned(jaxkv.create(config_of(codec)))
    for number, (tokens, first) in enumerate([(7, 0), (1, 7)]):
        keys, values = vectors_under(rope or ROPES["plain"], tokens, first=first, seed=number)
        queries = np.random.default_rng(9).standard_normal((tokens, 4, HEAD_DIM), np.float32)
        plain, expected = run(plain, 1, queries, keys, values)
        centred, outputs = run(centred, 1, queries, keys, values)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        plain, centred = jaxkv.advance(plain, tokens), jaxkv.advance(centred, tokens)
    assert np.asarray(centred.codec_state["means"][1]).any()
    for stored, exact in zip(jaxkv.layer(centred, 1), jaxkv.layer(plain, 1), strict=True):
        np.testing.assert_allclose(stored[:8], exact[:8], atol=1e-5)


def test_means_are_set_once():
    codec = jaxkv.Centred(jaxkv.Int8(), described(ROPES["plain"]))
    keys, values = vectors_under(ROPES["plain"], 6)
    padded = [np.concatenate([side, np.full_like(side[:2], np.nan)]) for side in (keys, values)]
    fresh = jaxkv.create(config_of(codec))
    nothing = jaxkv.append(fresh, *padded, layer=0, num_tokens=0)
    assert not np.asarray(nothing.codec_state["means"]).any()

    cache = jaxkv.advance(jaxkv.append(fresh, *padded, layer=0, num_tokens=6), 6)
    unturned = np.random.default_rng(0).standard_normal((2, 6, 2, HEAD_DIM), np.float32)
    unturned[0, ..., 3] += 8
    unturned[1] += 1
    np.testing.assert_allclose(cache.codec_state["means"][0], unturned.sum(axis=1) / 7, atol=1e-2)
    assert not np.asarray(cache.codec_state["means"][1]).any()

    more = vectors_under(ROPES["plain"], 8, first=6, seed=1)
    for later in (cache, jaxkv.truncate(cache, 3), jaxkv.reset(cache)):
        np.testing.assert_array_equal(
            jaxkv.append(later, *more, layer=0, num_tokens=5).codec_state["means"][0],
            cache.codec_state["means"][0],
        )


TOKENS, COUNTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]]), np.array([5, 3], np.int32)


def means_of_generate(config):
    chunk = np.zeros((2, decode.PREFILL_CHUNK), np.int32)
    chunk[:, :5] = TOKENS
    program = decode.Program.of(look_up, jaxkv.Sampling(), ())
    return program.prefill((chunk, COUNTS), jaxkv.create(config))[0].codec_state["means"]


def means_of_an_engine(config, prompt):
    pool = config.replace(addressing=jaxkv.Paged(4, num_pages=8))
    with jaxkv.Engine(look_up, pool, prefill_chunk=8) as engine:
        engine.submit(prompt, max_new_tokens=2)
        engine.run()
        return np.asarray(engine.cache.codec_state["means"])


def means_of_a_hook(config):
    vectors = jnp.asarray(TABLE)[TOKENS]
    mask = np.arange(5) < COUNTS[:, None, None, None]
    mask = np.broadcast_to(mask, (2, 1, 5, 5))
    return cached_attention(jaxkv.create(config), vectors, vectors, vectors, mask=mask)[
        1
    ].codec_state["means"]


BATCH = [3, 1, 4, 1, 5, 9, 2, 6]
WAYS = {
    "generate": (means_of_generate, BATCH),
    "a hook": (means_of_a_hook, BATCH),
    "an engine's prefill": (
        lambda config: means_of_an_engine(config, [3, 1, 4, 1, 5]),
        [3, 1, 4, 1],
    ),
    "an engine's decode": (lambda config: means_of_an_engine(config, [7]), [7]),  # one row rests
}


@pytest.mark.parametrize(("means", "real"), WAYS.values(), ids=WAYS)
def test_padding_enters_no_mean(means, real):
    config = jaxkv.KVCacheConfig(1, 24, 2, HEAD_DIM, 2, jaxkv.Centred(jaxkv.Int8()))
    expected = TABLE[real].astype(np.float64).sum(axis=0) / (len(real) + 1)
    np.testing.assert_allclose(means(config)[0], [expected] * 2, atol=1e-3)


def test_after_that_one_token_at_a_time_gives_bitwise_what_bulk_gives():
    codec = jaxkv.Centred(jaxkv.Rotated(2), described(ROPES["plain"]))
    first = vectors_under(ROPES["plain"], 4)
    more = vectors_under(ROPES["plain"], 4, first=4, seed=1)
    start = jaxkv.append(jaxkv.create(config_of(codec)), *first, layer=1)
    start = jaxkv.advance(start, 4)
    bulk = jaxkv.append(start, *more, layer=1)
    one = jax.jit(jaxkv.append, static_argnames="layer")
    for token in range(4):
        start = one(start, *(side[token : token + 1] for side in more), layer=1)
        start = jaxkv.advance(start, 1)
    assert_same_storage(start, bulk)


def test_keys_with_a_mean_are_stored_better():
    """By three times and more, where the mean is most of a key."""
    keys, values = vectors_under(ROPES["plain"], 20)
    errors = {}
    for codec in (jaxkv.Rotated(4), jaxkv.Centred(jaxkv.Rotated(4), described(ROPES["plain"]))):
        cache = jaxkv.append(jaxkv.create(config_of(codec)), keys, values, layer=0)
        stored = np.asarray(jaxkv.layer(jaxkv.advance(cache, 20), 0)[0][:20])
        errors[codec.name] = np.linalg.norm(stored - keys)
    assert errors["rotated4"] > 1.8 * errors["rotated4-centred"]


def test_a_model_names_its_rope():
    rope = RopeConfig(head_dim=8, theta=500.0)
    config = DecoderConfig(16, 8, 8, num_layers=2, num_heads=1, rope=rope)
    cache = Decoder(config, rngs=nnx.Rngs(0)).cache_config(
        max_context_length=8, codec=jaxkv.Centred(jaxkv.Rotated(4))
    )
    assert cache.codec.rope.frequencies == tuple(rope.frequencies(8).tolist())
    named = jaxkv.Centred(jaxkv.Rotated(4), jaxkv.Rope.of(10.0, 8))
    assert named.under(cache.codec.rope) == named
