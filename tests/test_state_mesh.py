"""State per sequence over a mesh: what one device gives, where each part stays, what moves."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from tests.compiled import compile_donating
from tests.models.variants import NUM_TOKENS, model_of, token_ids
from tests.test_mesh import assert_where_it_was, collective_bytes, spread_over

pytestmark = pytest.mark.devices(8)

BATCH, HEADS, WIDTH = 8, 8, 4
SPLITS = ("batch 2 x heads 4", "heads 8", "batch 8", "heads 2 x context 4")
ATTENDS = jaxkv.KVCacheConfig(1, 16, HEADS, WIDTH, batch_size=BATCH, codec=jaxkv.Dense("float32"))
ARRAYS = [("sum", (HEADS, WIDTH), "float32"), ("last", (WIDTH,), "bfloat16")]
KEPT = jaxkv.StateConfig((0,), ARRAYS, batch_size=BATCH, by_head=("sum",))
CONFIG = jaxkv.HybridConfig((ATTENDS,), group_of_layer=(-1, 0), states=(KEPT,))


def step(cache, x, num_tokens=None):
    """Layer 0 adds up what the heads are given, older tokens by less; layer 1 attends."""
    real = jaxkv.real_tokens(cache, x.shape[1], num_tokens)
    kept = jaxkv.state(cache, 0)
    total, last = kept["sum"], kept["last"]
    for token in range(x.shape[1]):
        row = real[:, token, None]
        total = jnp.where(row[..., None], 0.5 * total + x[:, token], total)
        last = jnp.where(row, x[:, token, 0].astype(last.dtype), last)
    cache = jaxkv.with_state(cache, 0, {"sum": total, "last": last})
    cache = jaxkv.append(cache, x, x, layer=1, num_tokens=num_tokens)
    read = jaxkv.attend(cache, x, layer=1, num_tokens=num_tokens)
    return jaxkv.advance(cache, x.shape[1] if num_tokens is None else num_tokens), read


def tokens_of(seed, count, rows=BATCH):
    shape = (rows, count, HEADS, WIDTH)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_same(many, one):
    np.testing.assert_array_equal(many.lengths, one.lengths)
    for name, array in jaxkv.state(one, 0).items():
        np.testing.assert_array_equal(np.asarray(jaxkv.state(many, 0)[name]), np.asarray(array))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_it_gives_what_one_device_gives(split, axis_type, tmp_path):
    place = spread_over(split, axis_type)
    one, many = jaxkv.create(CONFIG), jaxkv.create(CONFIG, **place)
    run = jax.jit(step, donate_argnums=0)
    ragged = jnp.arange(BATCH, dtype=jnp.int32) % 6
    for x, real in ((tokens_of(0, 5), ragged), (tokens_of(1, 1), None)):
        (one, right), (many, ours) = run(one, x, real), run(many, x, real)
        np.testing.assert_allclose(ours, right, rtol=0, atol=2e-6)
    assert_same(many, one)
    assert_where_it_was(many, place)
    # The bytes of each device are those of the plan.
    on_each = dict.fromkeys(place["mesh"].devices.flat, 0)
    for leaf in jax.tree.leaves(many):
        for shard in leaf.addressable_shards:
            on_each[shard.device] += shard.data.nbytes
    plan = jaxkv.plan(CONFIG, "1GB", **place)
    assert set(on_each.values()) == {plan.needed_bytes}
    # What verbs do to whole sequences.
    copied = [jaxkv.copy_state(each) for each in (one, many)]
    longer = [run(each, tokens_of(2, 2))[0] for each in (one, many)]
    one, many = (jaxkv.restore_state(*pair) for pair in zip(longer, copied, strict=True))
    assert_same(many, one)
    with pytest.raises(ValueError, match="a state goes back to no tokens at all"):
        jaxkv.truncate(many, 1)
    rows = np.arange(BATCH).reshape(place["mesh"].shape.get("batch", 1), -1)[:, ::-1].ravel()
    one, many = (jaxkv.select(jaxkv.fork(each, 2), np.repeat(rows, 2) * 2) for each in (one, many))
    assert_same(jaxkv.check(many), one)
    assert_where_it_was(many, place)
    # To a file, to one device, and back.
    jaxkv.save(many, tmp_path / "many")
    jaxkv.save(one, tmp_path / "one")
    there = jaxkv.load(tmp_path / "one", **place)
    for found in (there, jaxkv.load(tmp_path / "many"), jaxkv.spread(one, **place)):
        assert_same(found, one)
        assert_same(jaxkv.gather(found), one)
    assert_where_it_was(there, place)
    many = jaxkv.load(tmp_path / "one", into=many)
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(many), one)
    one, many = (run(jaxkv.reset(each), tokens_of(3, 1, 2 * BATCH))[0] for each in (one, many))
    assert_same(many, one)


def test_a_step_moves_nothing_and_is_in_place():
    place = spread_over("batch 2 x heads 4")
    many = jaxkv.create(CONFIG, **place)
    x = jax.device_put(tokens_of(0, 1), NamedSharding(place["mesh"], PartitionSpec("batch")))
    compiled = compile_donating(lambda cache, x: step(cache, x)[0], many, x)
    assert collective_bytes(compiled.as_text()) == 0
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(many))
    assert compiled.memory_analysis().alias_size_in_bytes == own
    assert own == jaxkv.plan(CONFIG, "1GB", **place).needed_bytes
    assert_same(compiled(many, x), jax.jit(step)(jaxkv.create(CONFIG), tokens_of(0, 1))[0])


def test_inside_ones_own_shard_map():
    place = spread_over("batch 2 x heads 4")
    many, x = jaxkv.create(CONFIG, **place), tokens_of(0, 3)
    specs, vectors = jaxkv.partition_specs(many), PartitionSpec("batch", None, "heads")

    def own(cache, x):  # what is not by head is on all devices that share heads, and so the same
        kept = jaxkv.state(cache, 0)
        assert kept["sum"].shape == (BATCH // 2, HEADS // 4, WIDTH)
        cache = jaxkv.with_state(cache, 0, {**kept, "sum": kept["sum"] + x.sum(axis=1)})
        return jaxkv.advance(jaxkv.append(cache, x, x, layer=1), 3)

    options = {"mesh": place["mesh"], "in_specs": (specs, vectors), "out_specs": specs}
    run = jax.jit(jax.shard_map(own, check_vma=False, **options))
    many = run(many, jax.device_put(x, NamedSharding(place["mesh"], vectors)))
    np.testing.assert_allclose(jaxkv.state(many, 0)["sum"], x.sum(axis=1), rtol=1e-6)
    assert many.lengths.tolist() == [3] * BATCH


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"arrays": [("sum", (6, WIDTH), "float32")]}, "heads of 'sum' must be a multiple of 8"),
        ({"by_head": ("other",)}, r"by_head must name arrays that have axes, got \['other'\]"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(fields, told):
    def create():
        kept = dataclasses.replace(KEPT, **fields)
        jaxkv.create(dataclasses.replace(CONFIG, states=(kept,)), **spread_over("heads 8"))

    with pytest.raises(jaxkv.ConfigError, match=told):
        create()


def test_an_engine_keeps_states_on_one_device():
    pool = ATTENDS.replace(addressing=jaxkv.Paged(4, num_pages=16))
    config = dataclasses.replace(CONFIG, groups=(pool,))
    with pytest.raises(jaxkv.ConfigError, match="Engine: layers that keep a state or have cross"):
        jaxkv.Engine(step, config, **spread_over("batch 8"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3_next", "bamba", "lfm2"])
def test_a_model_answers_as_on_one_device(variant):
    """By batch and by heads, prompts of unlike lengths, prefilled by chunks."""
    model = model_of(variant)
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    prompts = [np.resize(token_ids(variant), length).tolist() for length in (13, 1)]
    run = functools.partial(
        jaxkv.generate, model, prompts, max_new_tokens=6, prefill_chunk=8, max_context_length=32
    )
    many = run(mesh=mesh, axes=jaxkv.Axes("batch", "heads"))
    assert many.tokens == run().tokens
    assert NUM_TOKENS < 32
    assert re.search("state", many.config.describe())
