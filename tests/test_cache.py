"""The cache as a value: its shape, and its verbs under every transformation."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.codecs import CODECS
from tests.oracle import (
    EACH_ONCE,
    KINDS,
    ROTATED,
    Oracle,
    assert_same_storage,
    config_of,
    filled,
    jit,
    layer_step,
    random_step,
    run_step,
    stacked,
    step,
)

over_the_product = pytest.mark.parametrize(
    ("codec", "addressing"), list(itertools.product(KINDS, ADDRESSINGS))
)
each_once = pytest.mark.parametrize(("codec", "addressing"), EACH_ONCE)


# --- what a cache is -------------------------------------------------------------------------


@pytest.mark.slow_cases(r"rotated")
@over_the_product
@pytest.mark.parametrize("batch_size", [None, 2])
def test_created_zero_in_few_leaves(codec, addressing, batch_size):
    config = config_of(codec, addressing, batch_size=batch_size)
    cache = jaxkv.create(config)
    assert 2 <= len(jax.tree.leaves(cache)) <= 6
    for leaf in cache.storage.values():
        layers, sides, *slots_and_heads = leaf.shape[:4]
        assert layers == 3
        assert sides == 2 or codec == "rotated3/int8"
        assert slots_and_heads == [config.num_slots, 2]
        assert not np.asarray(leaf).any()
    for layer in range(3):
        for vectors in jaxkv.layer(cache, layer):
            assert vectors.shape == (*config.batch_shape, cache.index.extent, 2, 4)
            assert not np.asarray(vectors).any()
    assert not np.asarray(cache.lengths).any()
    assert cache.lengths.shape == config.batch_shape


@settings(max_examples=15, deadline=None)
@given(
    codec=st.sampled_from(list(CODECS | KINDS)),
    addressing=st.sampled_from(list(ADDRESSINGS)),
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    batch_size=st.none() | st.integers(1, 5),
)
def test_size_bytes_equals_the_bytes_held(codec, addressing, sizes, batch_size):
    config = jaxkv.KVCacheConfig(
        *sizes, batch_size, codec=(CODECS | KINDS)[codec], addressing=ADDRESSINGS[addressing]
    )
    cache = jaxkv.create(config)
    state = sum(array.nbytes for array in cache.codec_state.values())
    assert config.size_bytes == sum(leaf.nbytes for leaf in cache.storage.values()) + state
    assert config.size_bytes == cache.size_bytes
    all_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert config.size_bytes + config.index_bytes == all_bytes


@pytest.mark.slow_cases(r"rotated")
@each_once
@pytest.mark.parametrize("batch_size", [None, 2])
def test_layers_keys_values_and_sequences_are_distinct(codec, addressing, batch_size):
    config = config_of(codec, addressing, batch_size=batch_size)
    cache, oracle = filled(config, 3)
    for number, sequences in enumerate(oracle.tokens):
        for stored, vectors in enumerate(jaxkv.layer(cache, number)):
            expected = [[token[stored] for token in tokens] for tokens in sequences]
            expected = np.reshape(expected, (*config.batch_shape, 3, 2, 4))
            turned_back = 1e-6 if codec in ROTATED else 0
            np.testing.assert_allclose(vectors[..., :3, :, :], expected, rtol=0, atol=turned_back)


@pytest.mark.parametrize("small", [*"LTHD", "LTHD"])
def test_one_layer_token_head_or_number_works(small):
    names = {"L": "num_layers", "T": "max_context_length", "H": "num_kv_heads", "D": "head_dim"}
    config = config_of(**{names[letter]: 1 for letter in small})
    arrays = random_step(config, min(3, config.max_context_length), heads=2)
    outputs = run_step(jaxkv.create(config), *arrays)[1]
    np.testing.assert_allclose(outputs, Oracle(config).step(*arrays), rtol=1e-5, atol=1e-5)


def test_repr_tells_shape_and_length():
    cache, _ = filled(config_of(codec="bfloat16"), 5)
    assert repr(cache) == (
        "KVCache(3 layers, 2 KV heads x 4, bfloat16, contiguous, 5 of 8 tokens, 768 B)"
    )
    batch = jaxkv.create(config_of(codec="bfloat16", batch_size=2))
    assert "2 sequences, [0, 0] of 8 tokens" in repr(batch)
    assert "? of 8 tokens" in repr(jax.eval_shape(lambda: cache))


@pytest.mark.devices(4)
@pytest.mark.parametrize("device", [lambda: jax.devices()[3], lambda: jax.devices()[0]])
def test_created_on_the_device_asked_for(device):
    cache = jaxkv.create(config_of(), device=device())
    assert {leaf.device for leaf in jax.tree.leaves(cache)} == {device()}


# --- a value ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_eager_verbs_leave_the_old_value_alone_so_a_cache_forks():
    config = config_of()
    cache, oracle = filled(config, 3)
    before = jax.tree.map(np.array, cache)
    forks = [random_step(config, 2, heads=2, seed=seed) for seed in (1, 2)]
    outputs = [step(cache, *arrays)[1] for arrays in forks]
    jaxkv.truncate(cache, 1)
    jaxkv.reset(cache)
    chex.assert_trees_all_equal(cache, before)
    for arrays, output in zip(forks, outputs, strict=True):
        np.testing.assert_allclose(output, oracle.step(*arrays), rtol=1e-5, atol=1e-5)
        oracle.truncate(3)


@pytest.mark.slow_cases(r"rotated")
@each_once
def test_pytree_round_trip(codec, addressing):
    cache, _ = filled(config_of(codec, addressing, batch_size=2), 3)
    leaves, structure = jax.tree.flatten(cache)
    again = jax.tree.unflatten(structure, leaves)
    assert again.config == cache.config
    chex.assert_trees_all_equal(again, cache)
    assert structure == jax.tree.structure(jaxkv.create(cache.config))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert all(path.startswith((".storage[", ".index.", ".codec_state[")) for path in paths)


# --- the verbs under transformations -----------------------------------------------------------


def over_tokens(cache, queries, keys, values):
    tokens = [jnp.moveaxis(array, -3, 0)[..., None, :, :] for array in (queries, keys, values)]
    cache, outputs = lax.scan(lambda cache, token: step(cache, *token), cache, tokens)
    return cache, jnp.moveaxis(outputs.squeeze(-3), 0, -3)


def over_layers(cache, queries, keys, values):
    def one_layer(cache, inputs):
        return layer_step(cache, *inputs)

    layers = jnp.arange(cache.config.num_layers)
    cache, outputs = lax.scan(one_layer, cache, (layers, queries, keys, values))
    return jaxkv.advance(cache, keys.shape[-3]), outputs


def in_a_while_loop(cache, queries, keys, values):
    start, tokens = cache.lengths.ravel()[0], keys.shape[-3]

    def one_token(state):
        cache, outputs = state
        number = cache.lengths.ravel()[0] - start
        token = [
            lax.dynamic_slice_in_dim(array, number, 1, axis=-3) for array in (queries, keys, values)
        ]
        cache, output = step(cache, *token)
        return cache, lax.dynamic_update_slice_in_dim(outputs, output, number, axis=-3)

    def more(state):
        return state[0].lengths.ravel()[0] < start + tokens

    return lax.while_loop(more, one_token, (cache, jnp.zeros_like(queries)))


def over_a_copy(cache, *arrays):
    """vmap: the cache beside an empty one, which must not mix."""
    caches = stacked(cache, jaxkv.reset(cache))
    caches, outputs = jax.vmap(step, in_axes=(0, None, None, None))(caches, *arrays)
    return jax.tree.map(lambda leaf: leaf[0], (caches, outputs))


TRANSFORMATIONS = [step, over_tokens, over_layers, in_a_while_loop, over_a_copy]


@pytest.mark.slow_cases(
    r"batch|(over_layers|in_a_while_loop)-(ring|paged)|(over_\w+|in_a_while_loop)-chunked"
)
@pytest.mark.parametrize("batch_size", [None, 2], ids=["single", "batch"])
@pytest.mark.parametrize("addressing", ADDRESSINGS)
@pytest.mark.parametrize("transformed", TRANSFORMATIONS, ids=lambda function: function.__name__)
def test_verbs_under_jit_and(transformed, addressing, batch_size):
    config = config_of(addressing=addressing, num_layers=2, batch_size=batch_size)
    cache, oracle = filled(config, 3)
    arrays = random_step(config, 3, heads=2, seed=1)
    expected_cache, _ = run_step(cache, *arrays)
    cache, outputs = jit(transformed)(cache, *arrays)
    np.testing.assert_allclose(outputs, oracle.step(*arrays), rtol=1e-5, atol=1e-5)
    assert_same_storage(cache, expected_cache)
    chex.assert_trees_all_equal(cache.index, expected_cache.index)


def test_vmap_over_caches_of_different_lengths():
    config = config_of(num_layers=2)
    (short, short_oracle), (long, long_oracle) = filled(config, 1), filled(config, 5, seed=1)
    ours, theirs = (random_step(config, 2, heads=2, seed=seed) for seed in (2, 3))
    pairs = [jnp.stack(pair) for pair in zip(ours, theirs, strict=True)]
    caches, outputs = jit(jax.vmap(step))(stacked(short, long), *pairs)
    assert caches.lengths.tolist() == [3, 7]
    expected = short_oracle.step(*ours), long_oracle.step(*theirs)
    np.testing.assert_allclose(outputs, np.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_eager_gradient_through_several_appends():
    cache = jaxkv.create(config_of())
    vectors = jnp.ones((2, 2, 4))

    def mean_value(values):
        grown = jaxkv.append(cache, vectors, values, layer=0)
        grown = jaxkv.append(jaxkv.advance(grown, 2), vectors, values, layer=0)
        return jaxkv.attend(grown, vectors, layer=0)[-1].sum() / 8

    np.testing.assert_allclose(jax.grad(mean_value)(vectors), 1 / 16, rtol=1e-6)


def test_two_compilations_for_any_mix_of_lengths():
    config = config_of(num_layers=1, batch_size=2)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(step, n=2))
    for counts in [(1, 4), (3, 2), (0, 0), (4, 1)]:
        arrays = random_step(config, 4, heads=2)
        cache, _ = run(jaxkv.create(config), *arrays, np.array(counts, np.int32))
        for seed in range(3):
            cache, _ = run(cache, *random_step(config, 1, heads=2, seed=seed))
        assert cache.lengths.tolist() == [count + 3 for count in counts]


# --- lengths -----------------------------------------------------------------------------------


def test_advance_and_next_positions():
    single = jaxkv.advance(jaxkv.create(config_of()), 3)
    assert jaxkv.next_positions(single, 2).tolist() == [3, 4]
    batch = jaxkv.create(config_of(batch_size=2))
    batch = jaxkv.advance(jaxkv.advance(batch, 1), jnp.array([4, 0]))
    assert batch.lengths.tolist() == [5, 1]
    assert jaxkv.next_positions(batch, 3).tolist() == [[5, 6, 7], [1, 2, 3]]


NO_TOKENS = [(codec, {}) for codec in CODECS | KINDS]
NO_TOKENS += [
    ("int8", {"newest": jaxkv.Newest(2)}),
    ("int8", {"placement": jaxkv.HostMemory(2, 2, blocks_per_query=1)}),
    ("int8", {"addressing": jaxkv.Paged(4), "placement": jaxkv.HostMemory(2, 2)}),
]


@pytest.mark.parametrize(("codec", "fields"), NO_TOKENS)
def test_no_tokens_change_nothing(codec, fields):
    config = config_of(codec, batch_size=2).replace(**fields)
    cache = jaxkv.advance(jaxkv.create(config), 5)
    queries, keys, values = (array[0] for array in random_step(config, 0, heads=4))
    chex.assert_trees_all_equal(jaxkv.append(cache, keys, values, layer=0), cache)
    assert jaxkv.attend(cache, queries, layer=0).shape == (2, 0, 4, 4)
    if cache.resident is not None and cache.resident.bounds is not None:
        assert (jaxkv.fetched_blocks(cache, queries, layer=0) == -1).all()


@pytest.mark.parametrize("rolled_back", [jax.jit(jaxkv.truncate), jaxkv.truncate])
def test_truncate_rolls_back(rolled_back):
    batch = jaxkv.advance(jaxkv.create(config_of(batch_size=3)), jnp.array([5, 2, 0]))
    assert rolled_back(batch, 3).lengths.tolist() == [3, 2, 0]
    assert rolled_back(batch, jnp.array([0, 1, 7])).lengths.tolist() == [0, 1, 0]
    assert jaxkv.reset(batch).lengths.tolist() == [0, 0, 0]


@pytest.mark.slow_cases(r"rotated")
@each_once
def test_a_truncated_token_is_never_read_again(codec, addressing):
    config = config_of(codec, addressing)
    cache, oracle = filled(config, 3)
    rejected = [np.full_like(array, np.nan) for array in random_step(config, 3, heads=2)]
    cache = jaxkv.truncate(run_step(cache, *rejected)[0], 1)
    oracle.truncate(1)
    accepted = random_step(config, 3, heads=2, seed=1)  # behind which two stand that were rejected
    np.testing.assert_allclose(
        run_step(cache, *accepted)[1], oracle.step(*accepted), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_selected_sequences_go_on_alone_inside_jit(addressing):
    """Rows reordered, one of them twice; then each copy is given tokens of its own."""
    config, rows = config_of(addressing=addressing, batch_size=2), np.array([1, 0, 1], np.int32)
    cache, oracle = filled(config, 5)
    selected = jax.jit(jaxkv.select)(cache, rows)
    wide_config = config.replace(batch_size=3)
    wide = Oracle(wide_config)
    wide.tokens = [[list(sequences[row]) for row in rows] for sequences in oracle.tokens]
    arrays = random_step(wide_config, 2, heads=2, seed=1)
    grown, outputs = run_step(selected, *arrays)
    np.testing.assert_allclose(outputs, wide.step(*arrays), rtol=1e-5, atol=1e-5)
    assert grown.config == wide_config
    assert jax.jit(lambda cache: jaxkv.fork(cache, 3))(cache).lengths.tolist() == [5] * 6


def test_verbs_that_change_no_buffer_leave_it_where_it_is():
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4, batch_size=2))
    pool = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4, addressing=jaxkv.Paged(4, num_pages=3)))
    for before, after in (
        (cache, jaxkv.advance(cache, 3)),
        (cache, jaxkv.truncate(cache, 0)),
        (pool, jaxkv.select(pool, [0, 0])),
    ):
        assert after.storage["data"] is before.storage["data"]
