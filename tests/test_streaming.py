"""A cache in host memory is the same cache: same verbs, same numbers, and memory of two blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from jaxkv.codecs import CODECS
from jaxkv.memory import plan
from tests.oracle import HEADS, OPTIONS, SINKS, Oracle, jit, layer_step, random_step, step

PLACE = jaxkv.HostMemory(resident=9, block=4)
CHOOSING = jaxkv.HostMemory(resident=9, block=4, blocks_per_query=8)
run_streamed = functools.partial(
    step, run=jit(functools.partial(layer_step, implementation="streamed"))
)


def config_of(codec="float32", placement=PLACE, **fields):
    shape = {"num_layers": 2, "max_context_length": 30, "num_kv_heads": 2, "head_dim": 8}
    kind = {"codec": CODECS[codec], "placement": placement}
    return jaxkv.KVCacheConfig(**(shape | kind | fields))


def in_host_memory(cache):
    return {leaf.sharding.memory_kind for leaf in cache.storage.values()} == {"pinned_host"}


@pytest.mark.parametrize(
    ("codec", "batch_size", "placement"),
    [
        ("float32", None, PLACE),
        ("int8", 3, PLACE),
        ("bfloat16", None, CHOOSING),
        ("rotated4", 2, CHOOSING),
    ],
)
def test_attention_is_that_of_the_oracle(codec, batch_size, placement):
    """Through a prefill, decode, a rollback past the ring, and the same again."""
    config = config_of(codec, placement, batch_size=batch_size)
    cache, oracle = jaxkv.create(config), Oracle(config)
    for seed, tokens in enumerate((13, 1, 1, None, 13, 1, 1)):
        if tokens is None:
            cache = jaxkv.truncate(cache, 7)
            oracle.truncate(7)
            continue
        arrays = random_step(config, tokens, heads=4, seed=seed)
        cache, outputs = run_streamed(cache, *arrays)
        np.testing.assert_allclose(outputs, oracle.step(*arrays), rtol=1e-5, atol=1e-5)
        assert in_host_memory(cache)
    assert (np.asarray(cache.lengths) == 22).all()


def test_ragged_steps_and_padding():
    config = config_of(batch_size=3)
    cache, oracle = jaxkv.create(config), Oracle(config)
    for seed, counts in enumerate(([13, 0, 5], [1, 1, 0], [0, 13, 2], [16, 2, 13])):
        arrays = random_step(config, 16, heads=4, seed=seed)
        arrays = [np.where(np.isfinite(array), array, 0) for array in arrays]
        cache, outputs = run_streamed(cache, *arrays, jnp.array(counts))
        np.testing.assert_allclose(outputs, oracle.step(*arrays, counts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["window", "together"])
def test_options(name):
    options = OPTIONS[name]
    config = config_of(num_kv_heads=HEADS["GQA"][1])
    cache, oracle = jaxkv.create(config), Oracle(config)
    run = jit(functools.partial(layer_step, **options))
    for seed, tokens in enumerate((12, 12)):
        arrays = random_step(config, tokens, heads=len(SINKS), seed=seed)
        cache, outputs = step(cache, *arrays, run=run)
        np.testing.assert_allclose(outputs, oracle.step(*arrays, **options), rtol=1e-5, atol=1e-5)


def test_what_is_written_is_what_a_cache_on_the_device_has():
    run = jit(lambda cache, new: jaxkv.advance(jaxkv.append(cache, *new, layer=1), new.shape[2]))
    caches = [jaxkv.create(config_of("int8", place, batch_size=2)) for place in (PLACE, None)]
    for seed, tokens in enumerate((11, 11, 8)):
        new = np.stack(random_step(caches[0].config, tokens, heads=2, seed=seed))[1:, 1]
        caches = [run(cache, new) for cache in caches]
    streamed, resident = caches
    for name, leaf in resident.storage.items():
        np.testing.assert_array_equal(streamed.storage[name], leaf)
    np.testing.assert_array_equal(jaxkv.layer(streamed, 1), jaxkv.layer(resident, 1))


def test_overflow_is_refused_outside_jit_and_harmless_inside():
    cache = jaxkv.create(config_of())
    _, keys, _ = random_step(cache.config, 29, heads=2)
    cache = jaxkv.advance(jaxkv.append(cache, keys[0], keys[0], layer=0), 29)
    before = np.asarray(cache.storage["data"])[:, :, :29].copy()
    with pytest.raises(jaxkv.CacheFullError):
        jaxkv.append(cache, keys[0, :2], keys[0, :2], layer=0)
    for tokens in (2, 29):
        written = jit(lambda cache, new: jaxkv.append(cache, new, new, layer=0))(
            cache, 7 * keys[0, :tokens]
        )
        np.testing.assert_array_equal(np.asarray(written.storage["data"])[:, :, :29], before)
        np.testing.assert_array_equal(written.storage["data"][0, 0, 29], 7 * keys[0, 0])


# --- memory ------------------------------------------------------------------------------------


def decode_step(cache, hidden):
    for layer in range(cache.config.num_layers):
        keys, values = jnp.split(hidden, 2, axis=-2)
        cache = jaxkv.append(cache, keys, values, layer=layer)
        hidden = hidden + jaxkv.attend(cache, hidden, layer=layer, implementation="streamed")
    return jaxkv.advance(cache, 1), hidden


def compiled_decode(context, place=PLACE, program=decode_step):
    cache = jaxkv.create(config_of(max_context_length=context, placement=place, head_dim=64))
    hidden = jnp.ones((1, 4, 64), jnp.float32)
    return jax.jit(program, donate_argnums=0).lower(cache, hidden).compile(), cache, hidden


def decode_in_a_loop(cache, hidden):
    def one(_, state):
        return decode_step(*state)

    return lax.fori_loop(0, 3, one, (cache, hidden))


@pytest.mark.parametrize("program", [decode_step, decode_in_a_loop], ids=["step", "loop"])
def test_a_donated_step_keeps_its_buffers_where_they_are(program):
    compiled, cache, hidden = compiled_decode(1000, program=program)
    cache = jaxkv.reset(jaxkv.advance(cache, 3))  # outside jit, no two leaves become one buffer
    cache, hidden = compiled(
        cache, hidden
    )  # on a CPU a new small array may be moved once, to align it
    pointers = [leaf.unsafe_buffer_pointer() for leaf in cache.storage.values()]
    for _ in range(3):
        cache, hidden = compiled(cache, hidden)
    assert pointers == [leaf.unsafe_buffer_pointer() for leaf in cache.storage.values()]
    assert in_host_memory(cache)


def test_the_memory_of_a_step_is_two_blocks_whatever_the_context():
    temps = {}
    for context, block in ((1 << 12, 64), (1 << 16, 64), (1 << 16, 256)):
        place = jaxkv.HostMemory(resident=64, block=block)
        compiled, cache, _ = compiled_decode(context, place)
        temps[context, block] = compiled.memory_analysis().temp_size_in_bytes
        bytes_of_block = block * cache.config.bytes_per_token // cache.config.num_layers
        assert temps[context, block] < 4 * bytes_of_block + 2**16
    assert temps[1 << 12, 64] == temps[1 << 16, 64]


@pytest.mark.parametrize("placement", [PLACE, CHOOSING, jaxkv.HostMemory()])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_plan_equals_the_fact(placement, batch_size):
    config = config_of("int8", placement, batch_size=batch_size)
    cache = jaxkv.create(config)
    kinds = {"pinned_host": 0, "device": 0}
    for leaf in jax.tree.leaves(cache):
        kinds[leaf.sharding.memory_kind] += leaf.nbytes
    assert kinds == {"pinned_host": config.host_bytes, "device": config.device_bytes}
    assert sum(kinds.values()) == config.size_bytes + config.index_bytes
    assert cache.size_bytes == config.size_bytes


def test_plan_counts_both_memories_and_says_what_streaming_would_allow():
    config = jaxkv.KVCacheConfig(32, 1_000_000, num_kv_heads=8, head_dim=128)
    answer = plan(config, "80GB")
    assert not answer.fits
    assert answer.streamed.fits
    assert "streamed  536.9 MB on the device and 131.1 GB in host memory" in str(answer)
    streamed = plan(config.replace(placement=jaxkv.HostMemory()), "80GB")
    assert streamed.fits
    assert streamed.streamed is None
    assert streamed.host_bytes == answer.streamed.host_bytes == config.size_bytes
    assert streamed.needed_bytes - streamed.host_bytes == answer.streamed.device_bytes
    assert '"block": 1024' in streamed.to_json()
    here = plan(config_of("int8"))  # a CPU, whose memory is the host's: all must fit
    assert (
        here.max_context_length < plan(config_of("int8"), here.memory.free_bytes).max_context_length
    )


# --- which blocks are fetched --------------------------------------------------------------------


def test_the_block_with_the_needle_is_fetched():
    place = jaxkv.HostMemory(resident=4, block=4, blocks_per_query=1)
    cache = jaxkv.create(config_of(placement=place, num_layers=1, batch_size=2))
    rng = np.random.default_rng(0)
    keys, values = 0.1 * rng.standard_normal((2, 2, 24, 2, 8), np.float32)
    query = np.zeros((2, 1, 4, 8), np.float32)
    query[..., 3] = 50
    keys[0, 6, 1, 3], keys[1, 14, 0, 3] = 3, 3  # in block 1 of one sequence, 3 of the other
    cache = jaxkv.append(cache, keys, values, layer=0)
    cache = jaxkv.truncate(jaxkv.advance(cache, 24), 23)
    cache = jaxkv.append(cache, keys[:, 23:], values[:, 23:], layer=0)
    assert jaxkv.fetched_blocks(cache, query, layer=0).tolist() == [[1], [3]]
    output = jaxkv.attend(cache, query, layer=0)
    np.testing.assert_allclose(output[0, 0, 2], values[0, 6, 1], atol=1e-3)
    np.testing.assert_allclose(output[1, 0, 0], values[1, 14, 0], atol=1e-3)


@pytest.mark.parametrize("chunks", [(24,), (1,) * 24, (3, 8, 1, 12)], ids=["bulk", "one", "mixed"])
def test_bounds_are_those_of_the_keys(chunks):
    cache = jaxkv.create(config_of(placement=CHOOSING, num_layers=1))
    rng = np.random.default_rng(0)
    run = jit(lambda cache, new: jaxkv.advance(jaxkv.append(cache, new, new, layer=0), len(new)))
    cache = run(cache, rng.standard_normal((20, 2, 8), np.float32))  # to be forgotten
    cache = jaxkv.reset(cache)
    keys = rng.standard_normal((24, 2, 8), np.float32)
    for start, tokens in zip(np.cumsum((0, *chunks)), chunks, strict=False):
        cache = run(cache, keys[start : start + tokens])
    by_block = keys.reshape(6, 4, 2, 8)
    bounds = cache.resident.bounds
    np.testing.assert_array_equal(bounds.lowest[0, 0, :6], by_block.min(1))
    np.testing.assert_array_equal(bounds.highest[0, 0, :6], by_block.max(1))


def test_without_a_choice_all_older_blocks_are_fetched():
    cache = jaxkv.create(config_of(num_layers=1, batch_size=2))
    keys = np.zeros((2, 16, 2, 8), np.float32)
    cache = jaxkv.append(cache, keys, keys, layer=0, num_tokens=jnp.array([16, 6]))
    query = jnp.zeros((2, 16, 2, 8), jnp.float32)
    fetched = jaxkv.fetched_blocks(cache, query, layer=0, num_tokens=jnp.array([16, 6]))
    assert fetched.tolist() == [[0, 1, -1, -1, -1, -1, -1, -1], [-1] * 8]
    with pytest.raises(ValueError, match="the cache is on the device"):
        jaxkv.fetched_blocks(jaxkv.create(config_of(placement=None)), query[0], layer=0)


# --- whole caches come and go --------------------------------------------------------------------


@pytest.mark.parametrize("addressing", [jaxkv.Contiguous(), jaxkv.Ring(5, chunk=4), jaxkv.Paged(4)])
def test_offload_and_prefetch_are_bitwise(addressing):
    newest = jaxkv.Newest(2, jaxkv.Dense("float32"))
    config = config_of("bfloat16", placement=None, addressing=addressing, newest=newest)
    cache = jaxkv.create(config)
    _, keys, values = random_step(config, 4, heads=2)
    cache = jaxkv.advance(jaxkv.append(cache, keys[0], values[0], layer=0), 4)
    away = jaxkv.offload(cache)
    assert in_host_memory(away)
    back = jaxkv.prefetch(away)
    assert back.config == config
    for leaf, original in zip(jax.tree.leaves(back), jax.tree.leaves(cache), strict=True):
        assert leaf.sharding == original.sharding
        assert np.asarray(leaf).tobytes() == np.asarray(original).tobytes()
    queries = jnp.ones((1, 2, 8), jnp.float32)
    if isinstance(addressing, jaxkv.Contiguous):
        more = [
            jaxkv.attend(jaxkv.append(c, keys[1, :1], keys[1, :1], layer=0), queries, layer=0)
            for c in (away, cache)
        ]
        np.testing.assert_allclose(*more, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"jaxkv\.prefetch"):
            jaxkv.append(away, keys[1, :1], keys[1, :1], layer=0)
        with pytest.raises(ValueError, match="prefetch"):
            jaxkv.attend(away, queries, layer=0)
    with pytest.raises(ValueError, match=r"jaxkv\.prefetch"):
        jaxkv.select(away, [0, 0])


def test_a_placement_that_cannot_be_is_refused():
    with pytest.raises(jaxkv.ConfigError, match="needs Contiguous addressing"):
        config_of(addressing=jaxkv.Ring(4))
    with pytest.raises(jaxkv.ConfigError, match="placement must be"):
        config_of(placement="host")
    for field, value in (("resident", 0), ("block", 0), ("blocks_per_query", True)):
        with pytest.raises(ValueError, match=field):
            jaxkv.HostMemory(**{field: value})


def test_explain_says_where_the_cache_is():
    text = jaxkv.explain(jaxkv.create(config_of()), tokens=2)
    assert "blockwise: not used, the cache is in host memory" in text
    assert "streamed: used" in text
