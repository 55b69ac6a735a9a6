"""Values narrower or wider than keys, and values that are in the keys: all that a cache can do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from tests.compiled import assert_in_place, compile_donating
from tests.oracle import (
    SMALL,
    random_step,
    run_step,
    value_dim_of,
)
from tests.test_attention import assert_equals_oracle, small_blocks  # noqa: F401

# 1 KV head of latents for all query heads, as DeepSeek has; 2 KV heads of keys and values else.
PAIRS = {
    "narrower": {"num_kv_heads": 2, "head_dim": 16, "value_dim": 8},
    "wider": {"num_kv_heads": 2, "head_dim": 16, "value_dim": 32},
    "in keys": {"num_kv_heads": 1, "head_dim": 48, "value_dim": 32, "values_in_keys": True},
    "keys whole": {"num_kv_heads": 2, "head_dim": 16, "values_in_keys": True},
}
CODECS = {
    "float32": jaxkv.Dense("float32"),
    "bfloat16": jaxkv.Dense("bfloat16"),
    "int8": jaxkv.Int8(),
    "rotated4": jaxkv.Rotated(4),
}
CASES = [
    *itertools.product(PAIRS, ["float32"], SMALL, ["reference", "blockwise"]),
    *itertools.product(PAIRS, ["int8", "rotated4"], ["paged"], ["blockwise", "streamed"]),
    *itertools.product(["in keys"], CODECS, ["contiguous", "paged"], ["native"]),
]


def config_of(pair, codec="float32", addressing="contiguous", **fields):
    shape = {"num_layers": 2, "max_context_length": 10, **PAIRS[pair]}
    kind = {"codec": CODECS[codec], "addressing": SMALL[addressing]}
    return jaxkv.KVCacheConfig(**(shape | kind | fields))


each = pytest.mark.parametrize("pair", ["narrower", "in keys"])


@pytest.mark.full_cases(r"whole|bfloat16")
@pytest.mark.slow_cases(
    r"wider|whole|streamed|bfloat16|contiguous-blockwise|(ring|paged|chunked)-reference"
    r"|contiguous-native"
)
@pytest.mark.parametrize(("pair", "codec", "addressing", "implementation"), CASES)
def test_attention_equals_the_oracle(pair, codec, addressing, implementation):
    config = config_of(pair, codec, addressing, batch_size=3)
    if reason := IMPLEMENTATIONS[implementation].cannot_serve(jaxkv.create(config), 1):
        assert implementation in ("native", "streamed"), reason
        if implementation == "native":
            pytest.skip(reason)
    assert_equals_oracle(config, implementation, heads=4)


@pytest.mark.parametrize(("pair", "codec"), list(itertools.product(PAIRS, CODECS)))
def test_bytes_are_those_of_the_leaves(pair, codec):
    config = config_of(pair, codec, batch_size=3)
    cache = jaxkv.create(config)
    vectors = config.head_dim + (0 if config.values_in_keys else value_dim_of(config))
    scales = 1 if config.values_in_keys else 2
    per_head = {"float32": 4 * vectors, "bfloat16": 2 * vectors, "int8": vectors + 2 * scales}
    per_head["rotated4"] = vectors // 2 + 2 * scales
    assert cache.size_bytes == config.size_bytes
    assert config.bytes_per_token == 2 * config.num_kv_heads * per_head[codec]
    assert config.size_bytes == 30 * config.bytes_per_token


@pytest.mark.parametrize(
    ("pair", "implementation"), [("narrower", "blockwise"), ("in keys", "native")]
)
def test_a_step_is_in_place(pair, implementation):
    config = config_of(pair, "bfloat16", max_context_length=1 << 18)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    if reason := IMPLEMENTATIONS[implementation].cannot_serve(cache, 1, "cpu"):
        pytest.skip(reason)
    arrays = [
        jnp.asarray(array[0]) for array in random_step(config, 1, heads=4) if array is not None
    ]
    queries, keys, *values = arrays

    def decode(cache):
        cache = jaxkv.append(cache, keys, *values, layer=1)
        output = jaxkv.attend(cache, queries, layer=1, implementation=implementation)
        return jaxkv.advance(cache, 1), output

    assert_in_place(compile_donating(decode, cache), cache)


@pytest.mark.slow_cases("narrower")
@pytest.mark.parametrize(("pair", "codec"), [("narrower", "rotated4"), ("in keys", "bfloat16")])
def test_forks_rollbacks_and_files_go_on_bit_for_bit(pair, codec, tmp_path):
    """A file, rows chosen of a batch, and tokens taken back and given again."""
    config = config_of(pair, codec, "paged", batch_size=2)
    first, second = (random_step(config, 4, heads=4, seed=seed) for seed in (0, 1))
    cache = run_step(jaxkv.create(config), *first)[0]
    gone_on, expected = run_step(cache, *second)
    jaxkv.save(cache, tmp_path / "saved")
    assert jaxkv.snapshot.inspect(tmp_path / "saved").config == config
    loaded = jaxkv.load(tmp_path / "saved")
    both = [array if array is None else array[:, [1, 0]] for array in second]
    for other, given, order in (
        (loaded, second, [0, 1]),
        (jaxkv.truncate(gone_on, 4), second, [0, 1]),
        (jaxkv.select(cache, jnp.array([1, 0])), both, [1, 0]),
    ):
        outputs = run_step(other, *given)[1]
        assert np.asarray(outputs).tobytes() == np.asarray(expected[:, np.array(order)]).tobytes()
    other = jaxkv.create(config.replace(value_dim=4))
    with pytest.raises(jaxkv.SnapshotError, match="value_dim"):
        jaxkv.load(tmp_path / "saved", into=other)


@each
def test_layer_gives_values_of_their_own_size(pair):
    config = config_of(pair)
    _, keys, values = random_step(config, 3, heads=4)
    values = keys[..., : value_dim_of(config)] if values is None else values
    cache = run_step(jaxkv.create(config), *random_step(config, 3, heads=4))[0]
    for held, given in zip(jaxkv.layer(cache, 1), (keys, values), strict=True):
        np.testing.assert_array_equal(held[:3], given[1])


@pytest.mark.slow_cases("narrower")
@each
def test_compressed_caches_keep_the_vectors_that_were_chosen(pair):
    config = config_of(pair, addressing="contiguous")
    arrays = random_step(config, 8, heads=4)
    cache = run_step(jaxkv.create(config), *arrays)[0]
    policy = jaxkv.policies.SinksAndRecent(sinks=2)
    small = jaxkv.compress(cache, policy, keep=5, new=2, sinks=2)
    keys, values = jaxkv.layer(small, 1)
    positions = np.asarray(small.index.key_positions(1, small.lengths, 0, small.index.extent))[0]
    held = np.flatnonzero(positions >= 0)
    assert sorted(positions[held].tolist()) == [0, 1, 5, 6, 7]
    expected = jaxkv.layer(cache, 1)
    for own, whole in zip((keys, values), expected, strict=True):
        np.testing.assert_array_equal(own[held, 0], whole[positions[held], 0])


@pytest.mark.slow
@each
def test_the_newest_tokens_by_a_finer_codec(pair):
    """All tokens are among the newest: what is read is what the finer codec alone would give."""
    fine = jaxkv.Newest(16, jaxkv.Dense("float32"))
    arrays = random_step(config_of(pair), 5, heads=4)
    both = run_step(jaxkv.create(config_of(pair, "int8", newest=fine)), *arrays)[1]
    alone = run_step(jaxkv.create(config_of(pair, "float32")), *arrays)[1]
    np.testing.assert_allclose(both, alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.devices(8)
@each
@pytest.mark.parametrize("axes", [{"batch": 2, "context": 4}, {"heads": 2}])
def test_a_mesh_gives_what_one_device_does(pair, axes):
    """A latent has one head: it is on all devices that share the query heads."""
    config = config_of(pair, max_context_length=16, batch_size=2)
    kinds = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    named = jaxkv.Axes(**{name: name for name in axes})
    single, cache = jaxkv.create(config), jaxkv.create(config, mesh=mesh, axes=named)
    for tokens in (6, 1):
        arrays = random_step(config, tokens, heads=4, seed=tokens)
        single, expected = run_step(single, *arrays)
        cache, outputs = run_step(cache, *arrays)
        np.testing.assert_allclose(outputs, expected, atol=2e-6)


def test_plan_and_session_know_the_bytes():
    config = config_of("in keys", "bfloat16", batch_size=2)
    assert jaxkv.plan(config, "1MB").needed_bytes == config.size_bytes + config.index_bytes
    names = [row.codec for row in jaxkv.plan(config, "1MB").codecs]
    assert "rotated4" in names
    assert "rotated4-centred" not in names  # its means are of keys and values of one size
    with jaxkv.session(config) as session:
        assert session.cache.size_bytes == config.size_bytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 16, "value_dim": 0}, "value_dim must be an int of at least 1"),
        ({"head_dim": 16, "value_dim": 17, "values_in_keys": True}, "at most head_dim"),
        (
            {"head_dim": 16, "value_dim": 8, "codec": jaxkv.Centred(jaxkv.Int8())},
            "int8-centred has state",
        ),
        (
            {
                "head_dim": 16,
                "value_dim": 8,
                "newest": jaxkv.Newest(4, jaxkv.Centred(jaxkv.Int8())),
            },
            "int8-centred has state",
        ),
        (
            {"head_dim": 16, "values_in_keys": True}
            | {"codec": jaxkv.KeysValues(jaxkv.Int8(), jaxkv.Float8())},
            "int8/float8 stores values unlike keys",
        ),
    ],
)
def test_what_no_cache_can_hold_is_refused(fields, message):
    with pytest.raises(jaxkv.ConfigError, match=message):
        jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, **fields)


@pytest.mark.parametrize(
    ("pair", "given", "message"),
    [
        ("in keys", (48, 32), "values must be left out: .* first 32 numbers of its key"),
        ("narrower", (16, None), "values must be given"),
        ("narrower", (16, 16), r"values must be \[tokens, kv_heads, value_dim\] = \[3, 2, 8\]"),
        ("narrower", (8, 8), r"keys must be \[tokens, kv_heads, head_dim\] = \[3, 2, 16\]"),
    ],
)
def test_vectors_of_another_shape_are_refused(pair, given, message):
    cache = jaxkv.create(config_of(pair))
    keys, values = (size and jnp.ones((3, cache.config.num_kv_heads, size)) for size in given)
    with pytest.raises(ValueError, match=message):
        jaxkv.append(cache, keys, values, layer=0)


def test_a_size_that_is_the_keys_own_is_none():
    plain = jaxkv.KVCacheConfig(1, 8, 1, head_dim=16)
    assert jaxkv.KVCacheConfig(1, 8, 1, head_dim=16, value_dim=16) == plain
