"""A cache in host memory is the same cache: same verbs, same numbers, and memory of two blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from jaxkv.codecs import CODECS
from jaxkv.memory import plan
from tests.compiled import compile_donating
from tests.oracle import (
    HEADS,
    OPTIONS,
    SINKS,
    Oracle,
    jit,
    layer_step,
    poisoned,
    random_step,
    run_step,
    step,
)

PLACE = jaxkv.HostMemory(resident=9, block=4)
CHOOSING = jaxkv.HostMemory(resident=9, block=4, blocks_per_query=8)
RING = jaxkv.Ring(14, sinks=5, chunk=6)
run_streamed = functools.partial(
    step, run=jit(functools.partial(layer_step, implementation="streamed"))
)


def config_of(codec="float32", placement=PLACE, **fields):
    shape = {"num_layers": 2, "max_context_length": 30, "num_kv_heads": 2, "head_dim": 8}
    kind = {"codec": CODECS[codec], "placement": placement}
    return jaxkv.KVCacheConfig(**(shape | kind | fields))


def in_host_memory(cache):
    return {leaf.sharding.memory_kind for leaf in cache.storage.values()} == {"pinned_host"}


@pytest.mark.slow_cases(r"placement[123]")
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


@pytest.mark.slow_cases(r"^(?!ring$)")
@pytest.mark.parametrize(
    ("addressing", "placement", "batch_size"),
    [
        (jaxkv.Paged(3), PLACE, None),  # no page ends where a block does
        (jaxkv.Paged(4), CHOOSING, 2),
        (jaxkv.Paged(4, num_pages=20), PLACE, 2),  # nothing resident
        (RING, jaxkv.HostMemory(resident=3, block=4), 3),
        (RING, jaxkv.HostMemory(resident=1, block=7), None),
    ],
    ids=["pages", "chosen pages", "shared pages", "ring", "ring, large blocks"],
)
def test_other_addressings(addressing, placement, batch_size):
    """Round the ring and, from full of garbage, with pages in any order; and a rollback."""
    config = config_of("int8", placement, addressing=addressing, batch_size=batch_size)
    cache, oracle = poisoned(jaxkv.create(config)), Oracle(config)
    index = cache.index
    if hasattr(index, "table"):
        pages = np.random.default_rng(0).permutation(addressing.num_pages or index.table.size)
        table = pages[: index.table.size].reshape(index.table.shape).astype(np.int32)
        cache = dataclasses.replace(cache, index=index.with_table(table))
    for seed, tokens in enumerate((6, 6, 1, 6, None, 6, 6, 1, 1)):
        if tokens is None:
            cache = jaxkv.truncate(cache, 14)
            oracle.truncate(14)
            continue
        arrays = random_step(config, tokens, heads=4, seed=seed)
        counts = np.array([tokens, max(tokens - 2, 1), tokens])[: batch_size or 1]
        counts = counts if batch_size else counts[0]
        cache, outputs = run_streamed(cache, *arrays, jnp.asarray(counts))
        expected = oracle.step(*arrays, counts)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert in_host_memory(cache)


def test_a_cache_that_would_be_resident_as_a_whole_is_on_the_device():
    """So the window's layers of a hybrid cache are, while full ones stream."""
    full = config_of()
    local = config_of(addressing=jaxkv.Ring(4, chunk=6))
    cache = jaxkv.create(jaxkv.HybridConfig((local, full), group_of_layer=(0, 1, 0, 1)))
    assert [in_host_memory(group) for group in cache.groups] == [False, True]
    assert (local.host_bytes, local.device_bytes) == (0, local.size_bytes + local.index_bytes)
    assert local.size_bytes == local.replace(placement=None).size_bytes


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("addressing", [jaxkv.Contiguous(), jaxkv.Paged(4)])
def test_what_is_written_is_what_a_cache_on_the_device_has(addressing):
    run = jit(lambda cache, new: jaxkv.advance(jaxkv.append(cache, *new, layer=1), new.shape[2]))
    caches = [
        jaxkv.create(config_of("int8", place, batch_size=2, addressing=addressing))
        for place in (PLACE, None)
    ]
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


def compiled_decode(context, place=PLACE, program=decode_step, addressing=jaxkv.Contiguous()):
    shape = {"max_context_length": context, "head_dim": 64}
    cache = jaxkv.create(config_of(placement=place, addressing=addressing, **shape))
    hidden = jnp.ones((1, 4, 64), jnp.float32)
    return compile_donating(program, cache, hidden), cache, hidden


def decode_in_a_loop(cache, hidden):
    def one(_, state):
        return decode_step(*state)

    return lax.fori_loop(0, 3, one, (cache, hidden))


@pytest.mark.slow_cases(r"ring")
@pytest.mark.parametrize(
    ("program", "addressing"),
    [
        (decode_step, jaxkv.Contiguous()),
        (decode_in_a_loop, jaxkv.Contiguous()),
        (decode_step, jaxkv.Paged(8)),
        (decode_step, jaxkv.Ring(100)),
    ],
    ids=["step", "loop", "pages", "ring"],
)
def test_a_donated_step_keeps_its_buffers_where_they_are(program, addressing):
    compiled, cache, hidden = compiled_decode(1000, program=program, addressing=addressing)
    cache = jaxkv.reset(jaxkv.advance(cache, 3))  # outside jit, no two leaves become one buffer
    cache, hidden = compiled(
        cache, hidden
    )  # on a CPU a new small array may be moved once, to align it
    pointers = [leaf.unsafe_buffer_pointer() for leaf in cache.storage.values()]
    for _ in range(3):
        cache, hidden = compiled(cache, hidden)
    assert pointers == [leaf.unsafe_buffer_pointer() for leaf in cache.storage.values()]
    assert in_host_memory(cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["contiguous", "paged", "ring"])
def test_the_memory_of_a_step_is_two_blocks_whatever_the_context(kind):
    temps = {}
    for context, block in ((1 << 12, 64), (1 << 16, 64), (1 << 16, 256)):
        place = jaxkv.HostMemory(resident=64, block=block)
        ring = jaxkv.Ring(context - 127)
        addressing = {"ring": ring, "paged": jaxkv.Paged(16)}.get(kind, jaxkv.Contiguous())
        compiled, cache, _ = compiled_decode(context, place, addressing=addressing)
        temps[context, block] = compiled.memory_analysis().temp_size_in_bytes
        bytes_of_block = block * cache.config.bytes_per_token // cache.config.num_layers
        assert temps[context, block] < 4 * bytes_of_block + 2**16
    assert temps[1 << 12, 64] == temps[1 << 16, 64]


@pytest.mark.parametrize(
    ("placement", "addressing"),
    [
        *((place, jaxkv.Contiguous()) for place in (PLACE, CHOOSING, jaxkv.HostMemory())),
        *((PLACE, each) for each in (jaxkv.Paged(4, num_pages=9), jaxkv.Ring(5), RING)),
        (CHOOSING, jaxkv.Paged(4)),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_plan_equals_the_fact(placement, addressing, batch_size):
    config = config_of("int8", placement, batch_size=batch_size, addressing=addressing)
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
    local = config.replace(addressing=jaxkv.Ring(window=1024))
    assert plan(local, "80GB").streamed is None  # resident as a whole
    hybrid = jaxkv.HybridConfig((local, config), group_of_layer=(0, 1) * 32)
    assert plan(hybrid, "80GB").streamed.host_bytes == config.size_bytes
    here = plan(config_of("int8"))  # a CPU, whose memory is the host's: all must fit
    assert (
        here.max_context_length < plan(config_of("int8"), here.memory.free_bytes).max_context_length
    )


# --- which blocks are fetched --------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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
    more = [
        jaxkv.attend(jaxkv.append(c, keys[1, :1], keys[1, :1], layer=0), queries, layer=0)
        for c in (away, cache)
    ]
    np.testing.assert_allclose(*more, rtol=1e-5)
    for mine, other in zip(jaxkv.layer(away, 0), jaxkv.layer(cache, 0), strict=True):
        np.testing.assert_array_equal(mine, other)


# --- verbs for which tokens have to move ---------------------------------------------------------

MOVED = {
    "contiguous": (jaxkv.Contiguous(), CHOOSING),
    "ring": (RING, jaxkv.HostMemory(resident=4, block=4)),  # round which 18 tokens go
    "own pages": (jaxkv.Paged(3), CHOOSING),
    "shared pages": (jaxkv.Paged(4, num_pages=20), PLACE),
}


def slow(*kinds):
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def of_everybody(cache):
    """A pool's cache with pages for all sequences, in any order."""
    if not getattr(cache.index, "shared", False):
        return cache
    pages = np.random.default_rng(0).permutation(20)[: cache.index.table.size]
    table = pages.reshape(cache.index.table.shape).astype(np.int32)
    return cache.with_pages(table, cache.lengths)


@functools.cache
def of_18_tokens(kind):
    """A cache of two sequences in host memory, and all that it was given."""
    config = config_of("int8", MOVED[kind][1], addressing=MOVED[kind][0], batch_size=2)
    cache, given = of_everybody(jaxkv.create(config)), []
    append = jit(lambda cache, layer, *new: jaxkv.append(cache, *new, layer=layer))
    for seed in range(3):
        given.append(random_step(config, 6, heads=4, seed=seed))
        for layer in range(2):
            cache = append(cache, layer, *(array[layer] for array in given[-1][1:]))
        cache = jaxkv.advance(cache, 6)
    return cache, given


def assert_it_goes_on(cache, given, rows):
    """A token more: what it gives is what all those tokens, of these rows, must give."""
    oracle = Oracle(cache.config)
    for arrays in given:
        oracle.step(*(array[:, rows] for array in arrays))
    arrays = random_step(cache.config, 1, heads=4, seed=9)
    cache, outputs = run_streamed(cache, *arrays)
    np.testing.assert_allclose(outputs, oracle.step(*arrays), rtol=1e-5, atol=1e-5)
    assert in_host_memory(cache)


@pytest.mark.parametrize("kind", ["contiguous", *slow("ring", "own pages")])
def test_select_and_fork_work_in_host_memory(kind):
    cache, given = of_18_tokens(kind)
    assert_it_goes_on(jaxkv.select(cache, [1, 0]), given, [1, 0])
    three = jaxkv.fork(jaxkv.select(cache, [1]), 3)
    assert three.config == cache.config.replace(batch_size=3)
    for leaf, other in zip(jax.tree.leaves(three), jax.tree.leaves(cache), strict=True):
        assert leaf.nbytes == other.nbytes // 2 * 3
        assert leaf.sharding.memory_kind == other.sharding.memory_kind
    with pytest.raises(ValueError, match=r"outside jit, or .* jaxkv\.prefetch"):
        jax.jit(jaxkv.select)(cache, jnp.array([1, 0]))
    back = jax.jit(lambda cache: jaxkv.select(jaxkv.prefetch(cache), [1, 0]))(cache)
    outside = jaxkv.select(jaxkv.prefetch(cache), [1, 0])
    assert back.config == outside.config == cache.config.replace(placement=None)
    for name, leaf in cache.storage.items():
        swapped = np.concatenate(np.split(np.asarray(leaf), 2, axis=2)[::-1], axis=2)
        np.testing.assert_array_equal(back.storage[name], swapped)
        np.testing.assert_array_equal(outside.storage[name], swapped)
        assert back.storage[name].sharding.memory_kind == "device"


@pytest.mark.parametrize("kind", ["ring", *slow("own pages", "contiguous", "shared pages")])
def test_load_fills_a_cache_in_host_memory(kind, tmp_path):
    """With the sequences changed about, into slots full of garbage."""
    cache, given = of_18_tokens(kind)
    jaxkv.save(cache, tmp_path / "file")
    into = of_everybody(poisoned(jaxkv.create(cache.config)))
    loaded = jaxkv.load(tmp_path / "file", into=into, rows=[1, 0])
    assert loaded.config == cache.config
    if loaded.resident is not None and loaded.resident.bounds is not None:
        for side in ("lowest", "highest"):  # of keys as they are stored, in 8 bits
            mine, other = (getattr(each.resident.bounds, side) for each in (loaded, cache))
            np.testing.assert_allclose(mine, other[:, ::-1], atol=0.02)
    assert_it_goes_on(loaded, given, [1, 0])


def equal_but_for_the_place(ours, theirs):
    assert ours.config == theirs.config
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)


BY_HEAD = pytest.param(np.array([[3, 6], [5, 4]]), marks=pytest.mark.slow)


@pytest.mark.parametrize("keep", [6, BY_HEAD], ids=["a layer", "a head"])
def test_a_cache_in_host_memory_is_compressed_onto_the_device_and_evicts(keep, tmp_path):
    policy, (cache, _) = jaxkv.policies.KeyDiff(), of_18_tokens("own pages")
    compress = jit(lambda cache: jaxkv.compress(cache, policy, keep=keep, new=3))
    evict = jit(lambda cache: jaxkv.evict(jaxkv.advance(cache, 3), policy, tokens=3, sinks=1))
    small = compress(cache)
    equal_but_for_the_place(small, compress(jaxkv.prefetch(cache)))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(small)} == {"device"}
    away, there = jaxkv.offload(small), evict(small)
    jaxkv.save(small, tmp_path / "file")
    empty = jaxkv.create(small.config)
    loaded = jaxkv.load(tmp_path / "file", into=jaxkv.offload(empty))
    equal_but_for_the_place(loaded, jaxkv.load(tmp_path / "file", into=empty))
    assert in_host_memory(loaded)
    if isinstance(keep, int):
        evicted = evict(away)
        equal_but_for_the_place(evicted, there)
        assert in_host_memory(evicted)
        return
    for verb in (evict, compress, lambda cache: jaxkv.layer(cache, 0)):
        with pytest.raises(ValueError, match=r"in no runs .* jaxkv\.prefetch"):
            verb(away)
    equal_but_for_the_place(evict(jaxkv.prefetch(away)), there)


def test_pages_are_copied_in_host_memory():
    """All at once, as where nothing has to be moved: two change places, and one is skipped."""
    cache, _ = of_18_tokens("shared pages")
    sources, targets = np.array([3, 5, 7, 0], np.int32), np.array([5, 3, -1, 9], np.int32)
    copied = jit(jaxkv.copy_pages)(cache, sources, targets)
    for name, leaf in cache.storage.items():
        pages = np.asarray(leaf).reshape(*leaf.shape[:2], 20, 4, *leaf.shape[3:])
        expected = pages.copy()
        expected[:, :, [5, 3, 9]] = pages[:, :, [3, 5, 0]]
        np.testing.assert_array_equal(copied.storage[name], expected.reshape(leaf.shape))
    assert in_host_memory(copied)
    own, _ = of_18_tokens("own pages")
    with pytest.raises(ValueError, match=r"no pages.*jaxkv\.prefetch"):
        jaxkv.copy_pages(own, sources, targets)
    back = jaxkv.copy_pages(jaxkv.prefetch(own), sources[:2], targets[:2])
    np.testing.assert_array_equal(
        back.storage["codes"][:, :, 15:18], own.storage["codes"][:, :, 9:12]
    )


@pytest.mark.slow
@pytest.mark.parametrize("keep", [6, np.array([[3, 6], [5, 2]])], ids=["a layer", "a head"])
def test_a_compressed_cache_goes_on_in_host_memory(keep):
    config = config_of("int8", placement=None)
    queries, *arrays = random_step(config, 20, heads=4)
    cache, _ = run_step(jaxkv.create(config), queries, *arrays)
    cache = jaxkv.compress(cache, jaxkv.policies.KeyDiff(), keep=keep, new=9)
    away = jaxkv.offload(cache)
    if not isinstance(keep, int):  # packed runs, that have no slots in common
        with pytest.raises(ValueError, match=r"jaxkv\.prefetch"):
            jaxkv.append(away, *(array[0, :1] for array in arrays), layer=0)
        return
    for seed, tokens in enumerate((6, 1, 1)):
        arrays = random_step(config, tokens, heads=4, seed=seed)
        (away, outputs), (cache, expected) = run_streamed(away, *arrays), run_step(cache, *arrays)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert in_host_memory(away)


def test_a_placement_that_cannot_be_is_refused():
    for addressing in (jaxkv.Ring(4), jaxkv.Paged(4, num_pages=9)):
        with pytest.raises(jaxkv.ConfigError, match="blocks that stay what they are"):
            config_of(addressing=addressing, placement=CHOOSING)
    kept = jaxkv.addressing.Kept(8, 4, num_layers=2, num_kv_heads=2)
    with pytest.raises(jaxkv.ConfigError, match=r"jaxkv\.offload the result"):
        config_of(addressing=kept)
    cache = jaxkv.create(config_of(addressing=RING))
    with pytest.raises(ValueError, match="not of positions"):
        jaxkv.fetched_blocks(cache, jnp.ones((1, 2, 8)), layer=0)
    shared = jaxkv.create(config_of(addressing=jaxkv.Paged(4, num_pages=9)))
    with pytest.raises(jaxkv.ConfigError, match="must be on the device"):
        jaxkv.Engine(None, shared.config.replace(batch_size=2))
    with pytest.raises(jaxkv.ConfigError, match="placement must be"):
        config_of(placement="host")
    for field, value in (("resident", 0), ("block", 0), ("blocks_per_query", True)):
        with pytest.raises(ValueError, match=field):
            jaxkv.HostMemory(**{field: value})


def test_explain_says_where_the_cache_is():
    text = jaxkv.explain(jaxkv.create(config_of()), tokens=2)
    assert "blockwise: not used, the cache is in host memory" in text
    assert "streamed: used" in text
