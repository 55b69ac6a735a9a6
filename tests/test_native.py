"""The native kernel's ways in and out; its answers are in the product table of test_attention."""

import dataclasses
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.native import cannot_multiply, library, products


@pytest.fixture
def fresh_start():
    """As if this process had not looked for a compiler yet."""
    library.unavailable.cache_clear()
    yield
    library.unavailable.cache_clear()


def cache_of(**fields):
    config = {"codec": jaxkv.Dense("float32"), **fields}
    return jaxkv.create(jaxkv.KVCacheConfig(2, 200, 2, 16, **config))


def explained(cache, tokens=1):
    return dict(line.split(": ", 1) for line in jaxkv.explain(cache, tokens=tokens).splitlines())


def available():
    if reason := library.unavailable():
        assert "no C++ compiler" in reason  # with one, it builds
        pytest.skip(reason)


def test_it_is_chosen_for_decode_alone():
    available()
    assert explained(cache_of())["native"] == "used"
    assert explained(cache_of(), tokens=8)["native"] == "used"
    assert "this call has 9" in explained(cache_of(), tokens=9)["native"]
    assert (
        "head_dim 8 is not a multiple of 16"
        in explained(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 8)))["native"]
    )
    two_kinds = jaxkv.KeysValues(jaxkv.Float8(), jaxkv.Int8())
    assert f"cannot read {two_kinds.name}" in explained(cache_of(codec=two_kinds))["native"]
    in_steps = explained(cache_of(codec=jaxkv.Stair(4)))["native"]
    assert "of stair4 it reads head_dims in multiples of 64" in in_steps
    uneven = jaxkv.addressing.KeptByHead(8, 8, new=4, num_layers=2, num_kv_heads=2)
    assert "cannot read kept by head" in explained(cache_of(addressing=uneven))["native"]


@pytest.mark.devices(2)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_cache_is_left_to_others_but_where_each_has_its_shard(axis_type):
    available()
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(axis_type,))
    over_heads = PartitionSpec(None, None, None, "heads")
    config = cache_of().config
    cache = jaxkv.create(config, device=NamedSharding(mesh, over_heads))
    assert "the cache is on 2 devices" in explained(cache)["native"]
    keys, queries = np.random.default_rng(0).standard_normal((2, 1, 2, 16), np.float32)

    def step(cache, queries, keys):
        cache = jaxkv.append(cache, keys, keys, layer=0)
        return jaxkv.attend(cache, queries, layer=0)

    def step_of_a_shard(storage, queries, keys):
        local = jaxkv.create(config.replace(num_kv_heads=1))
        return step(dataclasses.replace(local, storage=storage), queries, keys)

    of_tokens = PartitionSpec(None, "heads")
    in_shards = jax.shard_map(
        step_of_a_shard,
        mesh=mesh,
        in_specs=(over_heads, of_tokens, of_tokens),
        out_specs=of_tokens,
    )
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(each, of_tokens) for each in (queries, keys)]
        by_xla = jax.jit(step).lower(cache, *arrays).compile()
        by_kernel = jax.jit(in_shards).lower(cache.storage, *arrays).compile()
        assert "jaxkv_decode" not in by_xla.as_text()
        assert "jaxkv_decode" in by_kernel.as_text()
        assert "all-gather" not in by_xla.as_text() + by_kernel.as_text()
        for outputs in by_xla(cache, *arrays), by_kernel(cache.storage, *arrays):
            np.testing.assert_allclose(outputs, keys, atol=1e-6)  # of the only token


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"JAXKV_NATIVE": "0"}, "JAXKV_NATIVE=0 turns it off"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "it could not be built"),
    ],
)
def test_without_a_compiler_there_is_another_way(fresh_start, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cache = cache_of()
    assert reason in explained(cache)["native"]
    assert jaxkv.attend(cache, jnp.ones((1, 2, 16)), layer=0).shape == (1, 2, 16)
    with pytest.raises(ValueError, match=re.escape(f"'native' cannot serve this call: {reason}")):
        jaxkv.attend(cache, jnp.ones((1, 2, 16)), layer=0, implementation="native")


@pytest.mark.slow
def test_it_is_built_once_into_the_cache_folder(monkeypatch, tmp_path):
    available()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = shutil.which("c++") or shutil.which("g++")
    path = library.built(compiler)
    assert list((tmp_path / "jaxkv").iterdir()) == [path]
    built = path.stat().st_mtime_ns
    assert library.built(compiler) == path
    assert path.stat().st_mtime_ns == built


def test_a_new_cache_is_put_on_large_pages(monkeypatch):
    """When it is made, and not while tokens are waited for; again where one was freed before."""
    asked = []
    asks = types.SimpleNamespace(
        JaxkvPreferLargePages=lambda data, size: asked.append((data.value, size.value))
    )
    monkeypatch.setattr(library, "_loaded", asks)
    caches = [cache_of(), cache_of()]
    buffers = [leaf for cache in caches for leaf in cache.storage.values()]
    assert asked == [(leaf.unsafe_buffer_pointer(), leaf.nbytes) for leaf in buffers]


CODECS = {
    "float32": jaxkv.Dense("float32"),
    "bfloat16": jaxkv.Dense("bfloat16"),
    "int8": jaxkv.Int8(),
    "rotated4": jaxkv.Rotated(4),
    "rotated3": jaxkv.Rotated(3),
    "rotated2/int8": jaxkv.KeysValues(jaxkv.Rotated(2), jaxkv.Int8()),
    "bfloat16/bfloat16": jaxkv.KeysValues(jaxkv.Dense("bfloat16"), jaxkv.Dense("bfloat16")),
    "rotated1": jaxkv.Rotated(1),
    "rotated4-centred": jaxkv.Centred(
        jaxkv.KeysValues(jaxkv.Rotated(4), jaxkv.Rotated(2)), jaxkv.Rope.of(10_000, rotary_dim=48)
    ),
    "int8-centred": jaxkv.Centred(jaxkv.Int8()),
    "float8-centred": jaxkv.Centred(jaxkv.Float8(), jaxkv.Rope.of(10_000, rotary_dim=64)),
    "bfloat16-centred": jaxkv.Centred(jaxkv.Dense("bfloat16")),
    "stair4": jaxkv.Stair(4, jaxkv.Rope.of(10_000, rotary_dim=48)),
    "stair3": jaxkv.Stair(3),
    "stair2": jaxkv.Stair(2),
}


# Tiles take 32s of bfloat16, 64s of codes; of groups of heads they know nothing.
GROUPS = [(3, codec, head_dim) for codec in CODECS for head_dim in (64, 256)]
GROUPS += [(3, codec, size) for codec in CODECS for size in (80, 96) if "stair" not in codec]
GROUPS += [(group, codec, 64) for codec in CODECS for group in (1, 7)]


@pytest.mark.full_cases(r"^1-|-(80|96)$")
@pytest.mark.slow_cases(
    r"^(?!3-(float32-64|bfloat16-64|bfloat16/bfloat16-64|int8-64|rotated4-64|rotated4-centred-64|stair4-64)$)"
)
@pytest.mark.parametrize(("group", "codec", "head_dim"), GROUPS)
def test_long_contexts_of_every_grouping_equal_the_reference(codec, group, head_dim):
    """Many blocks and units, the last of each not full; groups of 4, 2 and 1 heads."""
    available()
    kv_heads = 2 + group % 2
    generator = np.random.default_rng(group)
    lengths = jnp.asarray([1500, 1, 700])
    shape = (3, 1500, kv_heads, head_dim)
    config = jaxkv.KVCacheConfig(2, 1501, kv_heads, head_dim, batch_size=3, codec=CODECS[codec])
    keys = jnp.asarray(generator.standard_normal(shape, np.float32))
    queries = jnp.asarray(generator.standard_normal((3, 1, kv_heads * group, head_dim), np.float32))
    cache = jaxkv.append(jaxkv.create(config), keys + 1, keys[::-1], layer=1, num_tokens=lengths)
    cache = jaxkv.advance(cache, lengths - 1)
    sink_logits = jnp.linspace(-1, 9, kv_heads * group)
    expected, got = (
        jaxkv.attend(
            cache, queries, layer=1, window=900, sink_logits=sink_logits, implementation=name
        )
        for name in ("reference", "native")
    )
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "rotated4"])
def test_slots_that_only_begin_and_end_in_a_row(codec):
    """Of 16 tokens the first and last are 15 slots apart, but those between are not in order."""
    available()
    generator = np.random.default_rng(0)
    tokens, pages = 96, 24
    config = jaxkv.KVCacheConfig(1, tokens, 2, 64, batch_size=1, codec=CODECS[codec])
    keys = jnp.asarray(generator.standard_normal((1, tokens, 2, 64), np.float32))
    queries = jnp.asarray(generator.standard_normal((1, 1, 4, 64), np.float32))
    table = np.arange(pages).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(1, pages)
    paged = config.replace(addressing=jaxkv.Paged(page_size=4, num_pages=pages))
    in_pages = jaxkv.create(paged)
    index = in_pages.index.with_table(jnp.asarray(table, jnp.int32))
    outputs = []
    for cache in (jaxkv.create(config), dataclasses.replace(in_pages, index=index)):
        cache = jaxkv.append(cache, keys, keys[:, ::-1], layer=0)
        cache = jaxkv.advance(cache, tokens - 1)
        outputs.append(jaxkv.attend(cache, queries, layer=0, implementation="native"))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "rotated4", "stair4"])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_spoils_its_own_head_alone(codec, side):
    available()
    vectors = np.random.default_rng(0).standard_normal((2, 40, 2, 64), np.float32)
    vectors[side, 3, 1] = np.nan
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 40, 2, 64, codec=CODECS[codec]))
    cache = jaxkv.append(cache, *jnp.asarray(vectors), layer=0)
    cache = jaxkv.advance(cache, 39)
    queries = jnp.ones((1, 4, 64))
    got = jaxkv.attend(cache, queries, layer=0, implementation="native")[0]
    assert jnp.isfinite(got[:2]).all()
    assert jnp.isnan(got[2:]).all()


def test_every_float8_is_read_as_what_it_is():
    """Denormals and both NaNs too, which no encoding makes."""
    available()
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)  # 16 heads, a token of 16 numbers
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 1, 16, 16, codec=jaxkv.Float8()))
    storage = {
        "codes": cache.storage["codes"].at[0, 1].set(codes[0]),
        "scales": cache.storage["scales"].at[:].set(jnp.bfloat16(1).view(jnp.uint16)),
    }
    cache = dataclasses.replace(cache, storage=storage)
    got = jaxkv.attend(cache, jnp.ones((1, 16, 16)), layer=0, implementation="native")
    np.testing.assert_array_equal(got.ravel(), codes.ravel().view(jnp.float8_e4m3fn).astype(float))


def test_under_vmap():
    available()
    keys = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 2, 16), np.float32))
    caches = jax.vmap(lambda keys: jaxkv.append(cache_of(), keys, keys, layer=0))(keys)

    def outputs(name):
        return jax.vmap(
            lambda cache, queries: jaxkv.attend(cache, queries, layer=0, implementation=name)
        )(caches, keys)

    np.testing.assert_allclose(outputs("native"), outputs("reference"), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_equal_xlas(dtype, axis, rows):
    """Sizes that leave units, runs and strips not full; several weights of unlike width."""
    available()
    generator = np.random.default_rng(rows)
    x = jnp.asarray(generator.standard_normal((rows, 1, 352), np.float32), dtype)
    weights = tuple(
        jnp.asarray(generator.standard_normal((352, width)[:: 1 - 2 * axis], np.float32), dtype)
        for width in (352, 1184)
    )
    assert cannot_multiply(x, weights) is None
    got = jax.jit(products, static_argnums=2)(x, weights, axis)
    exact = [np.float64(x) @ np.float64(weight if axis == 0 else weight.T) for weight in weights]
    for result, expected in zip(got, exact, strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, atol=1e-4, rtol=1e-5)
    for row in range(rows):  # has the bits that it has alone, whoever stands beside it
        alone = jax.jit(products, static_argnums=2)(x[row], weights, axis)
        for result, own in zip(got, alone, strict=True):
            np.testing.assert_array_equal(result[row], own)


def test_products_under_vmap_and_derivatives_are_xlas():
    available()
    x, weight = (
        jnp.asarray(np.random.default_rng(0).standard_normal(s, np.float32))
        for s in ((4, 1, 128), (128, 160))
    )

    def total(x, weight):
        return jnp.sin(products(x, (weight,), 0)[0]).sum()

    def expected(x, weight):
        return jnp.sin(x @ weight).sum()

    np.testing.assert_allclose(
        jax.vmap(total, (0, None))(x, weight), jax.vmap(expected, (0, None))(x, weight), rtol=1e-5
    )
    for got, true in zip(
        jax.grad(total, (0, 1))(x, weight), jax.grad(expected, (0, 1))(x, weight), strict=True
    ):
        np.testing.assert_allclose(got, true, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(total), (0, None))(x, weight),
        jax.vmap(jax.grad(expected), (0, None))(x, weight),
        atol=1e-5,
    )


@pytest.mark.slow_cases(r"^(?!(bfloat16-contiguous|int8-ring)$)")
@pytest.mark.parametrize("addressing", ["contiguous", "ring", "paged"])
@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "rotated4-centred"])
def test_a_query_has_the_bits_that_it_has_alone(codec, addressing):
    """However many stand beside it, in its sequence and in others: drafts are checked so."""
    available()
    addressings = {"paged": jaxkv.Paged(page_size=16), "contiguous": jaxkv.Contiguous()}
    addressings["ring"] = jaxkv.Ring(window=300, sinks=4, chunk=100)
    config = jaxkv.KVCacheConfig(
        1, 1024, 2, 64, batch_size=2, codec=CODECS[codec], addressing=addressings[addressing]
    )
    keys, values, queries = np.random.default_rng(0).standard_normal((3, 2, 644, 6, 64), np.float32)
    tokens, past = 8, 636  # of which some see a block of slots more than others

    def step(cache, start, tokens, num_tokens=None):
        some = slice(start, start + tokens)
        two = keys[:, some, :2], values[:, some, :2]
        cache = jaxkv.append(cache, *two, layer=0, num_tokens=num_tokens)
        options = {"layer": 0, "num_tokens": num_tokens, "implementation": "native"}
        return cache, jaxkv.attend(cache, queries[:, some], **options)

    cache = jaxkv.create(config)
    for start in range(0, past, 100):
        some = slice(start, min(past, start + 100))
        cache = jaxkv.append(cache, keys[:, some, :2], values[:, some, :2], layer=0)
        cache = jaxkv.advance(cache, some.stop - start)
    _, together = step(cache, past, tokens)
    _, ragged = step(cache, past, tokens, jnp.array([tokens, 2]))
    alone = []
    for number in range(tokens):
        cache, output = step(cache, past + number, 1)
        cache = jaxkv.advance(cache, 1)
        alone.append(output)
    np.testing.assert_array_equal(together, jnp.concatenate(alone, 1))
    np.testing.assert_array_equal(ragged[0], together[0])
    np.testing.assert_array_equal(ragged[1, :2], together[1, :2])
    assert not ragged[1, 2:].any()
