"""Stair codecs: their bytes and bits, what they learn, and how near scores come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs.packing import packed_bytes, unpack
from jaxkv.models import RopeConfig
from jaxkv.models.rope import rotate, rotation

TOKENS, HEADS, HEAD_DIM = 60, 2, 64
ROPE = RopeConfig(HEAD_DIM, theta=100.0)
CODEC = jaxkv.Stair(4, jaxkv.Rope(tuple(ROPE.frequencies(64).tolist())))


def vectors():
    """Queries (two a head), keys with sinks, and values; pairs of the rope differ by e in size."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((TOKENS, 2 * HEADS, HEAD_DIM), np.float32)
    keys, values = rng.standard_normal((2, TOKENS, HEADS, HEAD_DIM), np.float32)
    of_queries, of_keys = np.exp(rng.standard_normal((2, HEADS, HEAD_DIM // 2), np.float32))
    queries *= np.repeat(np.tile(of_queries, 2), 2, axis=0)
    keys = keys * np.tile(of_keys, 2) + 8
    keys[[0, 7, 30]] = 3 * (np.arange(HEAD_DIM) == 5) + 0.05 * keys[[0, 7, 30]]
    turn = rotation(ROPE, jnp.arange(TOKENS), 64)
    return *(np.asarray(rotate(jnp.asarray(side), turn)) for side in (queries, keys)), values


def config_of(codec, **fields):
    return jaxkv.KVCacheConfig(1, 64, HEADS, HEAD_DIM, codec=codec, **fields)


def stored(codec, queries, keys, values):
    cache = jaxkv.append(jaxkv.create(config_of(codec)), keys, values, layer=0, queries=queries)
    cache = jaxkv.advance(cache, TOKENS)
    return cache, [np.float64(side)[:TOKENS] for side in jaxkv.layer(cache, 0)]


def noise(codec, queries, keys, values, given):
    """Of all scores, in float64."""
    _, (own, _) = stored(codec, given, keys, values)
    grouped = np.float64(queries).reshape(TOKENS, HEADS, 2, HEAD_DIM)
    return np.linalg.norm(np.einsum("thgd,shd->hgts", grouped, own - keys))


def test_bytes_are_exact():
    """4.25 bits a number, and the constants: centres, order, deviations and weights."""
    config = config_of(CODEC)
    assert config.bytes_per_token == HEADS * 2 * HEAD_DIM * 4.25 / 8
    constants = HEADS * (4 * HEAD_DIM * 4 + 32 * (1 + 4 + 4))
    assert config.size_bytes == 64 * config.bytes_per_token + constants
    assert jaxkv.create(config).size_bytes == config.size_bytes


def test_scores_have_less_noise_and_least_with_queries():
    queries, keys, values = vectors()
    plain = jaxkv.Centred(jaxkv.Rotated(4), CODEC.rope)
    centred = noise(plain, queries, keys, values, None)
    without = noise(CODEC, queries, keys, values, None)
    with_queries = noise(CODEC, queries, keys, values, queries)
    assert with_queries < 0.85 * without
    assert with_queries < 0.6 * centred


def test_the_order_is_by_energy_times_variance():
    """By their definition, in float64."""
    queries, keys, values = vectors()
    cache, _ = stored(CODEC, queries, keys, values)
    state = {name: np.asarray(array[0]) for name, array in cache.codec_state.items()}
    sinks = np.isin(np.arange(TOKENS), (0, 7, 30))
    flags = np.asarray(cache.storage["key_scales"])[0, 0, :TOKENS] >> 7
    np.testing.assert_array_equal(flags, np.tile(sinks[:, None], HEADS))
    grouped = np.float64(queries).reshape(TOKENS, HEADS, 2, 2, HEAD_DIM // 2)
    energy = (grouped**2).mean(axis=(0, 2, 3))
    centres = jaxkv.codecs.Offsets(state["means"], CODEC.rope, state["sinks"])
    usual, others = (np.asarray(each[0]) for each in centres.each_at(jnp.arange(TOKENS)[:, None]))
    left = np.float64(keys - np.where(sinks[:, None, None], others, usual))[1:]
    total = (left**2).reshape(-1, HEADS, 2, HEAD_DIM // 2).mean(axis=2).sum(axis=0)
    shared = total.mean(axis=1, keepdims=True) / (TOKENS - 1)
    variance = (total + shared) / TOKENS
    for head in range(HEADS):
        order = state["order"][0, head]
        product = (energy * variance)[head][order]
        assert (product[:-1] > 0.999 * product[1:]).all()
        np.testing.assert_allclose(
            state["per_deviation"][0, head], variance[head][order] ** -0.5, rtol=2e-3
        )


@pytest.mark.parametrize("bits", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_one_token_at_a_time_gives_bitwise_what_bulk_gives(bits):
    codec = jaxkv.Stair(bits, CODEC.rope)
    queries, keys, values = vectors()
    cache, _ = stored(codec, queries, keys, values)
    one = jax.jit(jaxkv.append, static_argnames="layer")
    again = jaxkv.reset(cache)
    for token in range(40):
        part = (side[token : token + 1] for side in (keys, values))
        again = jaxkv.advance(one(again, *part, layer=0), 1)
    for name, leaf in cache.storage.items():
        assert np.asarray(leaf)[:, :, :40].tobytes() == again.storage[name][:, :, :40].tobytes()


@pytest.mark.parametrize("count", [1, 3])
def test_a_short_first_append_makes_no_wild_constants(count):
    queries, keys, values = vectors()
    cache = jaxkv.create(config_of(CODEC))
    cache = jaxkv.append(cache, keys[:count], values[:count], layer=0, queries=queries[:count])
    cache = jaxkv.advance(cache, count)
    cache = jaxkv.append(cache, keys[count:], values[count:], layer=0)
    own = np.asarray(jaxkv.layer(jaxkv.advance(cache, TOKENS - count), 0)[0])[:TOKENS]
    assert np.linalg.norm(own - keys) < 0.2 * np.linalg.norm(keys)


def test_what_is_not_finite_spoils_no_other():
    queries, keys, values = vectors()
    _, (expected, _) = stored(CODEC, queries, keys, values)
    cache, _ = stored(CODEC, queries, keys, values)
    spoiled = keys.copy()
    spoiled[9, 1, 3] = np.nan
    cache = jaxkv.append(jaxkv.reset(cache), spoiled, values, layer=0)
    own = np.array(jaxkv.layer(jaxkv.advance(cache, TOKENS), 0)[0])[:TOKENS]
    assert np.isnan(own[9, 1]).all()
    own[9, 1] = expected[9, 1]
    np.testing.assert_array_equal(own, expected)


def test_other_bits_and_versions_are_refused():
    with pytest.raises(ValueError, match="bits must be 4, 3 or 2, got 5"):
        jaxkv.Stair(5)
    with pytest.raises(ValueError, match="version must be 2, got 1"):
        jaxkv.Stair(4, version=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_say_what_keys_are(bits):
    """Whole numbers of 8 bits, and queries that make scores of them."""
    codec = jaxkv.Stair(bits, CODEC.rope)
    queries, keys, values = vectors()
    cache, (own, _) = stored(codec, queries, keys, values)
    state = {name: array[0] for name, array in cache.codec_state.items()}
    steps = codec.steps(HEAD_DIM)
    packed = np.asarray(cache.storage["key_codes"])[0, 0, :TOKENS]
    levels, start = [], 0
    for (width, count), stands_for in zip(steps.runs, steps.levels, strict=True):
        assert max(stands_for) <= 127
        assert stands_for == tuple(sorted(-level for level in stands_for))
        size = packed_bytes(count, width)
        codes = unpack(jnp.asarray(packed[..., start : start + size]), width, count)
        levels.append(np.asarray(stands_for)[np.asarray(codes)])
        start += size
    scales = steps.scales[np.asarray(cache.storage["key_scales"])[0, 0, :TOKENS]]
    numbers = np.concatenate(levels, axis=-1) * np.abs(scales)[..., None]
    query = np.asarray(queries)[:1].reshape(1, HEADS, 1, 2, HEAD_DIM)
    stepped = np.float64(codec.stepped(jnp.asarray(query), state))[0, :, 0]
    centres = codec.centres(state).each_at(jnp.arange(TOKENS)[:, None])
    centre = np.where(scales[..., None] < 0, *(np.float64(each[0]) for each in reversed(centres)))
    np.testing.assert_allclose(
        np.einsum("hgd,thd->hgt", stepped, numbers),
        np.einsum("hgd,thd->hgt", query[0, :, 0], own - centre),
        atol=2e-4,
    )
