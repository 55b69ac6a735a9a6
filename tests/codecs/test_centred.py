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
from tests.oracle import assert_same_storage, attention, jit, layer_step, poisoned

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
            layer_step, implementation=implementation, softcap=5.0, window=6, sink_logits=sinks
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


def centres_by_definition(firsts, rest):
    """``[head_dim]`` each: the mean of what is nearer to it than to the first tokens' mean."""
    first, rest = np.mean(firsts, axis=0, dtype=np.float64), np.float64(rest)
    mean = rest.sum(axis=0) / (len(rest) + 1)
    for _ in range(2):
        own = rest[((rest - mean) ** 2).sum(axis=1) <= ((rest - first) ** 2).sum(axis=1)]
        mean = own.sum(axis=0) / (len(own) + 1)
    return mean, first


def with_sinks(tokens, sinks, *, seed=0):
    """Un-turned keys, and values, whose sinks are alike, short and elsewhere."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, tokens, 2, HEAD_DIM), np.float32)
    keys[..., 3] += 8
    values += 1
    for side, where in ((keys, 5), (values, 7)):
        side[list(sinks)] = 3 * np.eye(HEAD_DIM)[where] + 0.05 * side[list(sinks)]
    return keys, values


def turned(keys, first=0):
    positions = jnp.arange(first, first + len(keys))
    return np.asarray(rotate(jnp.asarray(keys), rotation(ROPES["plain"], positions, 64)))


def test_centres_are_set_once():
    codec = jaxkv.Centred(jaxkv.Int8(), described(ROPES["plain"]))
    unturned = with_sinks(8, (0, 4))
    both = turned(unturned[0]), unturned[1]
    padded = [np.concatenate([side, np.full_like(side[:2], np.nan)]) for side in both]
    fresh = jaxkv.create(config_of(codec))
    nothing = jaxkv.append(fresh, *padded, layer=0, num_tokens=0)
    assert not any(np.asarray(array).any() for array in nothing.codec_state.values())

    cache = jaxkv.advance(jaxkv.append(fresh, *padded, layer=0, num_tokens=8), 8)
    for side in range(2):
        for head in range(2):
            mean, first = centres_by_definition(*np.split(unturned[side][:, head], [1]))
            for name, expected in (("means", mean), ("sinks", first)):
                found = cache.codec_state[name][0, side, head]
                np.testing.assert_allclose(found, expected, atol=1e-2)
    assert not any(np.asarray(array[1]).any() for array in cache.codec_state.values())

    more = vectors_under(ROPES["plain"], 8, first=8, seed=1)
    for later in (cache, jaxkv.truncate(cache, 3), jaxkv.reset(cache)):
        later = jaxkv.append(later, *more, layer=0, num_tokens=5)
        for name, array in cache.codec_state.items():
            np.testing.assert_array_equal(later.codec_state[name][0], array[0])


INSIDE = {
    "int8": (jaxkv.Int8(), (True, True)),
    "float8": (jaxkv.Float8(), (True, True)),
    "rotated3": (jaxkv.Rotated(3), (True, True)),
    "keys alone": (jaxkv.KeysValues(jaxkv.Rotated(4), jaxkv.Dense("float32")), (True, False)),
    "values alone": (jaxkv.KeysValues(jaxkv.Dense("float32"), jaxkv.Int8()), (False, True)),
    "none": (jaxkv.Dense("float32"), (False, False)),
}


@pytest.mark.parametrize(("inside", "has_two"), INSIDE.values(), ids=INSIDE)
def test_a_sign_says_which_centre_and_takes_no_byte(inside, has_two):
    """And sinks, stored less the first token's vector, are stored as well as others."""
    codec = jaxkv.Centred(inside, described(ROPES["plain"]))
    assert codec.leaves(HEAD_DIM) == inside.leaves(HEAD_DIM)
    keys, values = with_sinks(20, (0, 4, 9))
    cache = jaxkv.append(jaxkv.create(config_of(codec)), turned(keys), values, layer=0)
    found = codec.is_second({name: leaf[0, :, :20] for name, leaf in cache.storage.items()})
    expected = np.isin(np.arange(20), (0, 4, 9))
    for side, own in enumerate(has_two):
        if own:
            np.testing.assert_array_equal(found[side], np.tile(expected[:, None], 2))
    stored = jaxkv.layer(jaxkv.advance(cache, 20), 0)
    for own, exact, side in zip(has_two, (turned(keys), values), stored, strict=True):
        if own:
            error = np.linalg.norm(np.asarray(side)[:20][expected] - exact[expected])
            assert error < 0.1 * np.linalg.norm(exact[expected])


PLAIN = described(ROPES["plain"])
READERS = [
    (jaxkv.Centred(jaxkv.Rotated(4), PLAIN), "reference"),
    (jaxkv.Centred(jaxkv.Rotated(4), PLAIN), "blockwise"),
    (jaxkv.Centred(jaxkv.Rotated(4), PLAIN), "native"),
    (jaxkv.Centred(jaxkv.Float8(), PLAIN), "native"),
    (jaxkv.Centred(INSIDE["keys alone"][0], PLAIN), "blockwise"),
    (jaxkv.Stair(4, PLAIN), "reference"),
]


@pytest.mark.slow_cases("reader[145]")
@pytest.mark.parametrize(
    ("codec", "implementation"), READERS, ids=[f"reader{number}" for number in range(len(READERS))]
)
def test_attention_over_sinks_is_that_over_the_decoded_vectors(monkeypatch, codec, implementation):
    """In float64, over what `jaxkv.layer` gives."""
    monkeypatch.setattr("jaxkv.attention.blockwise.KEY_BLOCK", 4)
    keys, values = with_sinks(20, (0, 4, 9))
    cache = poisoned(jaxkv.create(config_of(codec)))
    cache = jaxkv.advance(jaxkv.append(cache, turned(keys[:19]), values[:19], layer=0), 19)
    queries = np.random.default_rng(9).standard_normal((1, 4, HEAD_DIM), np.float32)
    last = turned(keys[19:], first=19), values[19:]
    cache, outputs = jit(functools.partial(layer_step, implementation=implementation))(
        cache, 0, queries, *last
    )
    stored = [np.float64(side)[:20] for side in jaxkv.layer(jaxkv.advance(cache, 1), 0)]
    tokens = list(zip(*stored, strict=True))
    np.testing.assert_allclose(outputs[0], attention(queries[0], tokens), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("norm", [600, 900])
@pytest.mark.parametrize("inside", [jaxkv.Int8(), jaxkv.Rotated(4)], ids=lambda codec: codec.name)
def test_a_large_bias_of_keys_costs_nothing(inside, norm):
    """As the first and last layers of Qwen2.5 have: 600 to 900, where what differs is some tens."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal((20, 2, HEAD_DIM), np.float32)
    bias = rng.standard_normal(HEAD_DIM).astype(np.float32)
    keys = turned(4 * own + norm * bias / np.linalg.norm(bias))
    codec = jaxkv.Centred(inside, described(ROPES["plain"]))
    cache = jaxkv.append(jaxkv.create(config_of(codec)), keys, own, layer=0)
    later = turned(4 * own[::-1] + norm * bias / np.linalg.norm(bias), first=20)[:4]
    cache = jaxkv.append(jaxkv.advance(cache, 20), later, own[:4], layer=0)
    stored = np.asarray(jaxkv.layer(jaxkv.advance(cache, 4), 0)[0])[20:]
    assert np.linalg.norm(stored - later) < 0.2 * np.linalg.norm(4 * own[:4])


TOKENS, COUNTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]]), np.array([5, 3], np.int32)


def means_of_generate(config):
    chunk = np.zeros((2, decode.PREFILL_CHUNK), np.int32)
    chunk[:, :5] = TOKENS
    program = decode.Program.of(look_up, jaxkv.Sampling(), ())
    given = decode.Chunk(chunk, COUNTS, np.zeros(2, bool))
    _, cache, _ = program.prefill(None, given, jaxkv.create(config))
    return cache.codec_state["means"]


def means_of_a_hook(config):
    vectors = jnp.asarray(TABLE)[TOKENS]
    mask = np.arange(5) < COUNTS[:, None, None, None]
    mask = np.broadcast_to(mask, (2, 1, 5, 5))
    return cached_attention(jaxkv.create(config), vectors, vectors, vectors, mask=mask)[
        1
    ].codec_state["means"]


WAYS = {"generate": means_of_generate, "a hook": means_of_a_hook}


@pytest.mark.parametrize("means", WAYS.values(), ids=WAYS)
def test_padding_enters_no_mean(means):
    config = jaxkv.KVCacheConfig(1, 24, 2, HEAD_DIM, 2, jaxkv.Centred(jaxkv.Int8()))
    found = means(config)[0]
    for head in range(2):
        expected, _ = centres_by_definition(TABLE[[3, 9], head], TABLE[[1, 4, 1, 5, 2, 6], head])
        np.testing.assert_allclose(found[:, head], [expected] * 2, atol=1e-3)


def test_after_that_one_token_at_a_time_gives_bitwise_what_bulk_gives():
    codec = jaxkv.Centred(jaxkv.Rotated(2), described(ROPES["plain"]))
    keys, values = with_sinks(8, (0, 2, 5))
    keys = turned(keys)
    first, more = (keys[:4], values[:4]), (keys[4:], values[4:])
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


def test_a_file_of_one_centre_loads(tmp_path, monkeypatch):
    """As jaxkv 0.6 wrote it: no ``sinks``, and no scale with a sign."""
    codec = jaxkv.Centred(jaxkv.Rotated(4), PLAIN)
    keys, values = with_sinks(8, (0, 4))
    with monkeypatch.context() as patch:
        patch.setattr(jaxkv.Centred, "state", lambda self, size: {"means": ((size,), "float32")})
        old = jaxkv.append(jaxkv.create(config_of(codec)), turned(keys), values, layer=0)
        old = jaxkv.advance(old, 8)
        assert list(old.codec_state) == ["means"]
        expected = jaxkv.layer(old, 0)
        jaxkv.save(old, tmp_path / "file")
    loaded = jaxkv.load(tmp_path / "file")
    assert not np.asarray(loaded.codec_state["sinks"]).any()
    for ours, theirs in zip(jaxkv.layer(loaded, 0), expected, strict=True):
        np.testing.assert_array_equal(ours[:8], theirs[:8])
