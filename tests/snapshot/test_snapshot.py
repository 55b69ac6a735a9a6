"""Going on from a file is bitwise going on without it: every codec, every addressing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.codecs import CODECS
from jaxkv.snapshot import fingerprint, inspect
from jaxkv.snapshot.container import read_manifest
from jaxkv.snapshot.manifest import read
from tests.oracle import jit, random_step, run_step

ADDRESSINGS = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(window=5, sinks=1, chunk=4),
    "paged": jaxkv.Paged(page_size=4),
    "pool": jaxkv.Paged(page_size=4, num_pages=20),
}
NEWEST = jaxkv.Newest(3, jaxkv.Centred(jaxkv.Int8()))


def small_config(codec="float32", addressing="contiguous", **fields):
    shape = {"num_layers": 2, "max_context_length": 16, "num_kv_heads": 2, "head_dim": 8}
    kind = {"codec": CODECS[codec], "addressing": ADDRESSINGS.get(addressing, addressing)}
    return jaxkv.KVCacheConfig(**(shape | kind | fields))


def assign_pages(cache, seed=0):
    """Pages of the pool in a random order, as an allocator leaves them after a while."""
    if not getattr(cache.index, "shared", False):
        return cache
    table = np.random.default_rng(seed).permutation(20)[: cache.index.table.size]
    shaped = jnp.asarray(table.reshape(cache.index.table.shape), jnp.int32)
    return dataclasses.replace(cache, index=cache.index.with_table(shaped))


def filled(config, lengths=9, written=None):
    """Random bits in every slot, those in use and those that are free."""
    return with_random_bits(assign_pages(jaxkv.create(config)), lengths, written)


def with_random_bits(cache, lengths, written):
    rng = np.random.default_rng(0)
    storage = {
        name: jnp.asarray(
            rng.integers(0, 256, leaf.nbytes, np.uint8).view(leaf.dtype).reshape(leaf.shape)
        )
        for name, leaf in cache.storage.items()
    }
    index = cache.index
    for count in (written, lengths):
        if count is not None:
            index = index.with_lengths(jnp.broadcast_to(jnp.int32(count), index.lengths.shape))
    state = {name: array + 1 for name, array in cache.codec_state.items()}
    newest = cache.newest and with_random_bits(cache.newest, lengths, written)
    return dataclasses.replace(
        cache, storage=storage, index=index, codec_state=state, newest=newest
    )


@jit
def slots_of(cache, layer):
    """The position in each slot of a layer, and what attention reads there."""
    index = cache.index
    positions = index.key_positions(layer, index.lengths, 0, index.extent)
    read = [index.read(leaf, layer, 0, index.extent) for leaf in cache.storage.values()]
    return positions, read


def held(cache, row=0):
    """Position -> all that is stored of the token, as attention reads it."""
    batch, found = cache.config.batch_size or 1, {}
    for layer in range(cache.config.num_layers):
        positions, read = jax.tree.map(np.asarray, slots_of(cache, layer))
        places = positions.reshape(batch, -1)[row]
        for vectors in read:
            vectors = vectors.reshape(len(vectors), batch, len(places), -1)[:, row]
            for slot in np.flatnonzero(places >= 0):
                position = int(places[slot])
                found[position] = found.get(position, b"") + vectors[:, slot].tobytes()
    return found


def save_and_load(cache, tmp_path, **options):
    jaxkv.save(cache, tmp_path / "file")
    return jaxkv.load(tmp_path / "file", **options)


@pytest.mark.slow_cases(r"float16|float8|rotated")
@pytest.mark.parametrize(
    ("codec", "addressing", "batch_size"),
    [
        *((codec, "contiguous", 2) for codec in CODECS),
        *(("int8", addressing, 2) for addressing in ADDRESSINGS if addressing != "contiguous"),
        ("bfloat16", "pool", None),
    ],
)
def test_what_is_loaded_is_what_was_saved(tmp_path, codec, addressing, batch_size):
    config = small_config(codec, addressing, batch_size=batch_size)
    cache = filled(config, lengths=9 if batch_size is None else np.array([9, 4]))
    into = assign_pages(jaxkv.create(config), seed=1) if addressing == "pool" else None
    loaded = save_and_load(cache, tmp_path, into=into)
    assert loaded.config == config
    assert loaded.lengths.tolist() == cache.lengths.tolist()
    jax.tree.map(np.testing.assert_array_equal, loaded.codec_state, cache.codec_state)
    means = sum(array.nbytes for array in cache.codec_state.values())
    tokens = 0
    for row in range(batch_size or 1):
        assert held(loaded, row) == held(cache, row)
        tokens += len(held(cache, row))
    assert tokens in (9, 13)
    # Tokens that the codec stores and little else: no free slots, no other pages.
    size = (tmp_path / "file").stat().st_size
    told = 1500 + 500 * (batch_size or 1) + 200 * len(cache.codec_state)
    assert size - tokens * config.bytes_per_token - means < told


def step_by_step(cache, steps, first_seed=0):
    for seed, tokens in enumerate(steps, first_seed):
        cache, outputs = run_step(cache, *random_step(cache.config, tokens, heads=2, seed=seed))
    return cache, np.asarray(outputs)


@pytest.mark.slow_cases(r"float|newest")
@pytest.mark.parametrize(
    ("codec", "addressing", "batch_size", "newest"),
    [
        ("bfloat16", "contiguous", None, None),
        ("int8", "ring", 2, None),
        ("float8", "paged", 2, NEWEST),
        ("int8", "ring", None, jaxkv.Newest(9)),
    ],
)
def test_going_on_from_a_file_is_bitwise_going_on(tmp_path, codec, addressing, batch_size, newest):
    config = small_config(codec, addressing, batch_size=batch_size, newest=newest)
    cache, _ = step_by_step(jaxkv.create(config), (4, 4, 1))
    if newest is not None:  # what was taken back has written over what the ring held
        cache = jaxkv.truncate(cache, 8)
    loaded = save_and_load(cache, tmp_path)
    assert loaded.config == config
    (cache, expected), (loaded, outputs) = (
        step_by_step(each, (1, 4), first_seed=50) for each in (cache, loaded)
    )
    assert outputs.tobytes() == expected.tobytes()
    assert held(loaded) == held(cache)


def test_an_empty_sequence_and_an_empty_cache(tmp_path):
    config = small_config(batch_size=3)
    for lengths in ([3, 0, 4], [0, 0, 0]):
        loaded = save_and_load(filled(config, np.array(lengths)), tmp_path)
        assert loaded.lengths.tolist() == lengths
        assert [len(held(loaded, row)) for row in range(3)] == lengths


def test_a_ring_that_was_rolled_back_knows_what_it_lost(tmp_path):
    for length in (10, 9):
        rolled_back = filled(small_config(addressing="ring"), length, written=12)
        loaded = save_and_load(rolled_back, tmp_path)
        assert held(loaded) == held(rolled_back)
        for cache in (rolled_back, loaded):
            with pytest.raises(ValueError, match="ring"):
                jaxkv.truncate(cache, 7)


def test_a_hybrid_cache(tmp_path):
    groups = small_config(addressing="ring"), small_config("int8", num_kv_heads=1)
    config = jaxkv.HybridConfig(groups, group_of_layer=(0, 1, 1, 0))
    cache = jaxkv.create(config)
    cache = dataclasses.replace(cache, groups=tuple(map(filled, groups)))
    loaded = save_and_load(cache, tmp_path)
    assert loaded.config == config
    assert [held(group) for group in loaded.groups] == [held(group) for group in cache.groups]


# --- into other caches -------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["contiguous", "paged", "ring"])
@pytest.mark.parametrize("source", ["contiguous", "pool"])
def test_into_another_addressing_and_a_larger_context(tmp_path, source, target):
    cache = filled(small_config(addressing=source))
    wanted = small_config(addressing=target, max_context_length=40)
    loaded = save_and_load(cache, tmp_path, addressing=ADDRESSINGS[target], max_context_length=40)
    assert loaded.config == wanted
    assert held(loaded).items() <= held(cache).items()
    assert held(loaded).keys() == held(filled(wanted)).keys()


def test_what_a_ring_has_dropped_cannot_be_had_from_its_file(tmp_path):
    cache = filled(small_config(addressing="ring"), 12)
    with pytest.raises(jaxkv.SnapshotError, match="holds 9 of the 12 tokens"):
        save_and_load(cache, tmp_path, addressing=jaxkv.Contiguous())
    smaller = jaxkv.load(tmp_path / "file", addressing=jaxkv.Ring(window=3, sinks=1, chunk=4))
    assert held(smaller).items() < held(cache).items()


def test_a_field_that_came_later_is_named_where_it_says_something(tmp_path):
    """Files of pages are read by versions that know of no chunks, and those of chunks are whole."""
    plain, chunks = (jaxkv.Paged(4, window=8, aligned=aligned) for aligned in (False, True))
    for addressing, named in ((plain, 3), (chunks, 4)):
        cache = filled(small_config(addressing=addressing), 6)
        assert save_and_load(cache, tmp_path).config == cache.config
        (group,) = read_manifest(tmp_path / "file")["groups"]
        assert len(group["config"]["addressing"]["fields"]) == named


def test_stairs_of_other_levels_are_refused(tmp_path):
    """Files that do not say which they hold, as those of jaxkv 0.10."""
    cache = filled(small_config("stair4"), 6)
    assert save_and_load(cache, tmp_path).config == cache.config
    manifest = read_manifest(tmp_path / "file")
    del manifest["groups"][0]["config"]["codec"]["fields"]["version"]
    with pytest.raises(
        jaxkv.SnapshotError, match=r"version must be 2, got 1\. .* jaxkv 0\.10 or before"
    ):
        read(tmp_path / "file", manifest)


@pytest.mark.parametrize("addressing", [*ADDRESSINGS, "newest too"])
def test_into_a_row_of_a_batch(tmp_path, addressing):
    fields = {"addressing": addressing}
    if addressing == "newest too":
        fields = {"newest": jaxkv.Newest(3, jaxkv.Int8())}
    prompt = filled(small_config(**fields), 6, written=7)
    batch = filled(small_config(**fields, batch_size=2), 5)
    first_row, first_newest = held(batch, 0), batch.newest and held(batch.newest, 0)
    batch = save_and_load(prompt, tmp_path, into=batch, rows=[1])
    assert batch.lengths.tolist() == [5, 6]
    assert held(batch, 0) == first_row
    assert held(batch, 1) == held(prompt)
    if batch.newest is not None:
        assert held(batch.newest, 0) == first_newest
        assert held(batch.newest, 1) == held(prompt.newest)
        assert held(prompt.newest).keys() == {4, 5}


def test_rows_and_room_are_checked(tmp_path):
    jaxkv.save(filled(small_config()), tmp_path / "file")
    batch = jaxkv.create(small_config(batch_size=3))
    for rows in (None, [3], [-1], [0, 1]):
        with pytest.raises(ValueError, match="rows"):
            jaxkv.load(tmp_path / "file", into=batch, rows=rows)
    with pytest.raises(jaxkv.SnapshotError, match="num_kv_heads"):
        jaxkv.load(tmp_path / "file", into=jaxkv.create(small_config(num_kv_heads=1)))
    with pytest.raises(jaxkv.SnapshotError, match=r"has newest \[None\], and the cache"):
        jaxkv.load(tmp_path / "file", into=jaxkv.create(small_config(newest=NEWEST)))
    with pytest.raises(jaxkv.CacheFullError, match="holds 9 tokens, more than"):
        jaxkv.load(tmp_path / "file", max_context_length=8)
    with pytest.raises(jaxkv.CacheFullError, match="room for 0"):
        jaxkv.load(tmp_path / "file", addressing=ADDRESSINGS["pool"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))


@pytest.mark.devices(4)
def test_to_another_device_and_to_shards(tmp_path):
    cache = filled(small_config("int8"))
    jaxkv.save(cache, tmp_path / "file")
    device = jax.devices()[3]
    assert jaxkv.load(tmp_path / "file", device=device).lengths.devices() == {device}
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "heads"))
    sharded = jaxkv.load(tmp_path / "file", device=sharding)
    assert all(leaf.sharding.shard_shape(leaf.shape)[3] == 1 for leaf in sharded.storage.values())
    assert held(sharded) == held(cache)
    jaxkv.save(sharded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


# --- of another model, another prompt ----------------------------------------------------------


def model_of(seed=0, theta=1e4):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Tiny:
        weights: jax.Array
        config: object = dataclasses.field(metadata={"static": True})

    config = dataclasses.make_dataclass("Config", ["theta"], frozen=True)(theta)
    return Tiny(jnp.asarray(np.random.default_rng(seed).random((3, 5)), jnp.bfloat16), config)


def test_another_model_is_refused_and_named(tmp_path):
    path = tmp_path / "file"
    jaxkv.save(filled(small_config()), path, model=model_of())
    jaxkv.load(path, model=model_of())
    with pytest.raises(jaxkv.SnapshotError, match=r"of another model: weights is \w+ in the file"):
        jaxkv.load(path, model=model_of(seed=1))
    with pytest.raises(jaxkv.SnapshotError, match=r"model: theta is 10000\.0 in the file and 5\.0"):
        jaxkv.load(path, model=model_of(theta=5.0))
    jaxkv.save(filled(small_config()), path)
    with pytest.raises(jaxkv.SnapshotError, match="does not say which model"):
        jaxkv.load(path, model=model_of())


@pytest.mark.slow_cases(r"bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_the_fingerprint_sees_every_weight(dtype):
    weights = jnp.zeros((7, 3), dtype)
    one = jnp.ones((), dtype)
    seen = {fingerprint([weights.at[place].set(one)])["weights"] for place in np.ndindex(7, 3)}
    seen.add(fingerprint([weights])["weights"])
    seen.add(fingerprint([weights.reshape(3, 7)])["weights"])
    seen.add(fingerprint({"a": weights})["weights"])
    assert len(seen) == 24


def test_a_function_has_no_fingerprint():
    with pytest.raises(TypeError, match="Name a model"):
        fingerprint(lambda tokens, cache: (tokens, cache))


def test_another_prompt_is_refused_and_the_token_named(tmp_path):
    path = tmp_path / "file"
    prompts = [list(range(9)), list(range(20, 29))]
    jaxkv.save(filled(small_config(batch_size=2)), path, tokens=prompts)
    jaxkv.load(path, tokens=np.array(prompts))
    assert inspect(path).has_tokens
    other = [prompts[0], [*prompts[1][:7], 5, 5]]
    with pytest.raises(jaxkv.SnapshotError, match="token 7 of sequence 1 is 27 in the file and 5"):
        jaxkv.load(path, tokens=other)
    with pytest.raises(jaxkv.SnapshotError, match=r"another prompt.*\[9, 9\]"):
        jaxkv.load(path, tokens=[prompts[0], prompts[1][:4]])
    with pytest.raises(ValueError, match="ints, a list a sequence"):
        jaxkv.save(filled(small_config(batch_size=2)), path, tokens=[0.5, 1.5])
    jaxkv.save(filled(small_config()), path)
    with pytest.raises(jaxkv.SnapshotError, match="does not say which tokens"):
        jaxkv.load(path, tokens=prompts[0])


# --- files that tell a story --------------------------------------------------------------------


def test_a_codec_of_your_own_is_given_by_hand(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(jaxkv.Int8):
        seed: int = 0

    jaxkv.save(filled(small_config(codec="int8").replace(codec=Mine(3))), tmp_path / "file")
    for wrong in (None, Mine(4), jaxkv.Int8()):
        with pytest.raises(jaxkv.SnapshotError, match="codec 'Mine', which jaxkv does not know"):
            jaxkv.load(tmp_path / "file", codec=wrong)
    assert jaxkv.load(tmp_path / "file", codec=Mine(3)).config.codec == Mine(3)
    assert inspect(tmp_path / "file", codec=Mine(3)).config.codec == Mine(3)


def test_a_cache_that_is_not_sound_is_not_saved(tmp_path):
    overflowed = jax.jit(lambda cache: jaxkv.advance(cache, 99))(jaxkv.create(small_config()))
    with pytest.raises(jaxkv.CacheFullError):
        jaxkv.save(overflowed, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_file_that_asks_for_more_memory_than_there_is(tmp_path):
    cache = jaxkv.create(small_config())
    huge = jaxkv.KVCache(
        cache.storage, cache.index, cache.config.replace(max_context_length=2**31 - 1, head_dim=8)
    )
    jaxkv.save(huge, tmp_path / "file")
    assert inspect(tmp_path / "file").config.size_bytes > 2**37
    with pytest.raises(jaxkv.CacheAllocationError, match="Failed to allocate"):
        jaxkv.load(tmp_path / "file")
    assert jaxkv.load(tmp_path / "file", max_context_length=16).size_bytes == cache.size_bytes


def test_a_cache_in_host_memory(tmp_path):
    cache = filled(small_config())
    jaxkv.save(jaxkv.offload(cache), tmp_path / "file")
    assert held(jaxkv.load(tmp_path / "file")) == held(cache)
