"""Layers that differ in one cache: the verbs, the bytes, and the same answers as apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.compiled import assert_in_place, compile_donating
from tests.oracle import Oracle, layer_step

FULL = jaxkv.KVCacheConfig(2, 12, 2, 8, batch_size=2, codec=jaxkv.Dense("float32"))
LOCAL = FULL.replace(num_layers=3, num_kv_heads=1, head_dim=16, addressing=jaxkv.Ring(4, chunk=5))
CONFIG = jaxkv.HybridConfig((LOCAL, FULL), group_of_layer=(0, 1, 0, 0, 1))
HEADS = 4


def arrays_of(layer, tokens, seed):
    group, _ = CONFIG.locate(layer)
    config, rng = CONFIG.groups[group], np.random.default_rng([layer, seed])
    counts = HEADS, config.num_kv_heads, config.num_kv_heads
    return [rng.standard_normal((2, tokens, n, config.head_dim), np.float32) for n in counts]


def step(cache, *arrays):
    outputs = []
    for layer, each in enumerate(arrays):
        cache, output = layer_step(cache, layer, *each)
        outputs.append(output)
    return jaxkv.advance(cache, arrays[0][0].shape[1]), outputs


def test_every_layer_answers_as_it_would_alone():
    cache, run = jaxkv.create(CONFIG), jax.jit(step, donate_argnums=0)
    oracles = [Oracle(dataclasses.replace(CONFIG.groups[g], num_layers=1)) for g in (0, 1, 0, 0, 1)]
    for seed, tokens in enumerate((5, 4, 1, 1)):
        arrays = [arrays_of(layer, tokens, seed) for layer in range(5)]
        cache, outputs = run(cache, *arrays)
        for oracle, each, output in zip(oracles, arrays, outputs, strict=True):
            (expected,) = oracle.step(*(array[None] for array in each))
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [11, 11]
    assert jaxkv.check(cache).lengths.tolist() == [11, 11]
    assert jaxkv.next_positions(cache, 1).tolist() == [[11], [11]]


def test_bytes_are_those_of_the_groups_and_of_the_leaves():
    cache = jaxkv.create(CONFIG)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert CONFIG.size_bytes + CONFIG.index_bytes == held
    assert CONFIG.size_bytes == LOCAL.size_bytes + FULL.size_bytes == cache.size_bytes


def test_a_step_is_in_place_in_every_group():
    large = CONFIG.replace(max_context_length=1 << 18)
    rings = large.groups[0].replace(addressing=jaxkv.Ring(1 << 17))
    large = dataclasses.replace(large, groups=(rings, large.groups[1]))
    cache = jax.eval_shape(lambda: jaxkv.create(large))

    def model(cache, *arrays):  # each layer depends on the layer before
        above = jnp.float32(0)
        for layer, (queries, keys, values) in enumerate(arrays):
            cache, output = layer_step(cache, layer, queries + above, keys + above, values)
            above = output.mean()
        return jaxkv.advance(cache, 1), above

    compiled = compile_donating(model, cache, *(arrays_of(layer, 1, 0) for layer in range(5)))
    for group in cache.groups:
        assert_in_place(compiled, group, temp_share=0.02)  # positions of the rings' slots


def test_rollback_reaches_every_group_or_none():
    cache = jaxkv.advance(jaxkv.advance(jaxkv.create(CONFIG), 5), 5)
    assert jaxkv.truncate(cache, 7).groups[1].lengths.tolist() == [7, 7]
    with pytest.raises(ValueError, match=r"cannot roll back to \[2, 2\].*takes back 5 tokens"):
        jaxkv.truncate(cache, 2)
    assert jaxkv.reset(cache).lengths.tolist() == [0, 0]
    assert jaxkv.fork(cache, 2).lengths.tolist() == [10, 10, 10, 10]


def test_a_traced_layer_and_one_that_is_not_there_are_errors():
    cache, (_, keys, values) = jaxkv.create(CONFIG), arrays_of(0, 1, 0)
    with pytest.raises(IndexError, match="layer 5 is out of range: the cache has layers 0 to 4"):
        jaxkv.append(cache, keys, values, layer=5)
    with pytest.raises(TypeError, match="layer of a hybrid cache must be a plain int"):
        jax.jit(lambda layer: jaxkv.append(cache, keys, values, layer=layer))(jnp.int32(0))


@pytest.mark.parametrize(
    ("groups", "layers", "message"),
    [
        ((LOCAL, FULL), (0, 1, 0), r"each group as often as it has layers, \[3, 2\] times"),
        ((LOCAL, FULL.replace(batch_size=3)), (0, 1, 0, 0, 1), r"same batch_size, got \[2, 3\]"),
        ((LOCAL, FULL), (0, 1, 0, 0, 2), "each group as often"),
        ((), (), "each group as often"),
    ],
)
def test_groups_that_do_not_fit_are_errors(groups, layers, message):
    with pytest.raises(jaxkv.ConfigError, match=message):
        jaxkv.HybridConfig(groups, layers)


def test_plan_and_session_take_it():
    plan = jaxkv.plan(CONFIG, "1MB")
    assert plan.fits
    assert plan.needed_bytes == CONFIG.size_bytes + CONFIG.index_bytes
    with jaxkv.session(CONFIG) as session:
        session.cache = jaxkv.advance(session.cache, 3)
        assert "6 in 2 sequences" in session.report()


# Layers 3 and 4 read what layers 2 and 1 keep.
READING = jaxkv.HybridConfig(
    (LOCAL.replace(num_layers=2), FULL.replace(num_layers=1)),
    group_of_layer=(0, 1, 0, 0, 1),
    source_of_layer=(0, 1, 2, 2, 1),
)


def reading_cache(tokens=3):
    cache = jaxkv.create(READING)
    for layer in range(3):
        _, keys, values = arrays_of(layer, tokens, seed=0)
        cache = jaxkv.append(cache, keys, values, layer=layer)
    return jaxkv.advance(cache, tokens)


def test_a_layer_reads_what_another_keeps(tmp_path):
    """Its answers are its source's, to the bit, after a file too; it holds no byte."""
    cache = reading_cache()
    assert cache.config.num_layers == 5
    assert cache.size_bytes == (2 * LOCAL.size_bytes) // 3 + FULL.size_bytes // 2
    jaxkv.save(cache, tmp_path / "saved")
    for own in (cache, jaxkv.load(tmp_path / "saved")):
        assert own.config == READING
        for layer, source in ((3, 2), (4, 1)):
            queries, *_ = arrays_of(layer, 1, seed=1)
            read, expected = (jaxkv.attend(own, queries, layer=each) for each in (layer, source))
            assert np.asarray(read).tobytes() == np.asarray(expected).tobytes()
            for one, other in zip(jaxkv.layer(own, layer), jaxkv.layer(own, source), strict=True):
                np.testing.assert_array_equal(one, other)
    with pytest.raises(jaxkv.SnapshotError, match="layers that read those of"):
        jaxkv.load(tmp_path / "saved", into=jaxkv.create(CONFIG))


def test_nothing_is_written_for_a_layer_that_reads_another():
    cache = reading_cache()
    _, keys, values = arrays_of(3, 1, seed=1)
    with pytest.raises(ValueError, match="it reads those of layer 2"):
        jaxkv.append(cache, keys, values, layer=3)


@pytest.mark.slow
def test_compressed_layers_are_read_as_before():
    whole = FULL.replace(num_layers=2)
    config = jaxkv.HybridConfig((whole,), (0, 0, 0), source_of_layer=(0, 1, 0))
    cache, rng = jaxkv.create(config), np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, 6, 2, 8), np.float32)
    for layer in range(2):
        cache = jaxkv.append(cache, keys, values, layer=layer)
    cache = jaxkv.advance(cache, 6)
    small = jaxkv.compress(cache, jaxkv.policies.SinksAndRecent(sinks=1), keep=(2, 4, 2), new=2)
    assert small.config.source_of_layer == (0, 1, 0)
    queries = rng.standard_normal((2, 1, HEADS, 8), np.float32)
    outputs = [jaxkv.attend(small, queries, layer=layer) for layer in range(3)]
    np.testing.assert_array_equal(outputs[2], outputs[0])
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3


@pytest.mark.parametrize(
    "sources", [(0, 1, 3, 3, 1), (0, 1, 2, 1, 1), (0, 1, 2, 2), (0, 1, 2, 2, 5)]
)
def test_sources_that_keep_nothing_are_errors(sources):
    with pytest.raises(jaxkv.ConfigError, match="source_of_layer must name"):
        dataclasses.replace(READING, source_of_layer=sources)
