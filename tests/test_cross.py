"""Cross-attention: what an encoder wrote is read by each token of the text, and moved by none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import jaxkv
from jaxkv.attention.call import request_of
from jaxkv.codecs import CODECS, state_specs
from jaxkv.integrations.transformers import to_hf
from tests.compiled import assert_in_place, compile_donating
from tests.oracle import HEADS, KINDS, OPTIONS, attention, decode, encode, jit, poisoned
from tests.test_mesh import spread_over

DIM, MOST = 16, 7
LENGTHS = np.array([5, 0, 3], np.int32)  # encoder tokens of three sequences
TEXT = jaxkv.KVCacheConfig(2, 16, 2, DIM, batch_size=3, codec=jaxkv.Dense("float32"))
AUDIO = TEXT.replace(max_context_length=MOST)
# Layer 0 attends to the text and to the encoder's tokens, layer 1 to these, layer 2 to the text.
CONFIG = jaxkv.HybridConfig((TEXT,), (0, -1, 0), cross=(AUDIO,), cross_of_layer=(0, 0, -1))
CROSSING = (0, 1)

write = jit(jaxkv.write_cross, static_argnames="layer")
attend = jit(jaxkv.attend_cross, static_argnames=("layer", "softcap", "implementation", "partial"))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def sources(config=CONFIG, tokens=MOST, seed=0):
    """Keys and values of an encoder's tokens, by layer."""
    own, rows = config.cross[0], config.batch_shape
    return {
        layer: normal([seed, layer], 2, *rows, tokens, own.num_kv_heads, own.head_dim)
        for layer in CROSSING
    }


def written(config=CONFIG, lengths=LENGTHS, seed=0, **place):
    cache, vectors = jaxkv.create(config, **place), sources(config, seed=seed)
    for layer, (keys, values) in vectors.items():
        cache = write(cache, keys, values, layer=layer, lengths=lengths)
    return cache, vectors


def expected(vectors, lengths, queries, num_seen=None, codec=TEXT.codec, **options):
    """By definition, in float64, over a list of the tokens that each query sees."""
    leaves = encode(codec, jnp.asarray(vectors))
    stored = np.asarray(decode(codec, leaves, DIM, jnp.dtype("float32")), np.float64)
    output = np.zeros(queries.shape)
    for row, length in enumerate(lengths):
        tokens = list(zip(stored[0, row], stored[1, row], strict=True))
        for token, query in enumerate(queries[row]):
            count = length if num_seen is None else min(num_seen[row, token], length)
            if count:
                output[row, token] = attention(query, tokens[:count], **options)
    return output


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.slow_cases("float16|float8|rotated3")
@pytest.mark.parametrize("codec", [n for n, c in KINDS.items() if not state_specs(c, DIM)])
@pytest.mark.parametrize("heads", HEADS)
def test_every_query_sees_all_that_was_written(codec, heads):
    """One token, a few and many, of ragged sequences, whatever the text is and holds."""
    num_heads, kv_heads = HEADS[heads]
    own = AUDIO.replace(codec=KINDS[codec], num_kv_heads=kv_heads)
    config = dataclasses.replace(CONFIG, cross=(own,))
    cache, vectors = written(config)
    for tokens in (1, 3, 9):
        queries = normal(tokens, 3, tokens, num_heads, DIM)
        for layer in CROSSING:
            right = expected(vectors[layer], LENGTHS, queries, codec=own.codec)
            output = attend(cache, queries, layer=layer)
            np.testing.assert_allclose(output, right, rtol=0, atol=2e-5)
        cache = jaxkv.advance(cache, 2)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "window" not in OPTIONS[name]])
@pytest.mark.parametrize("implementation", ["native", "reference", "blockwise"])
def test_options_are_those_of_attention(name, implementation):
    cache, vectors = written()
    queries, options = normal(1, 3, 4, 4, DIM), OPTIONS[name]
    seen = np.array([[0, 1, 5, 7], [0, 0, 1, 2], [3, 2, 1, 0]], np.int32)
    for num_seen in (None, seen):
        right = expected(vectors[1], LENGTHS, queries, num_seen, **options)
        found = attend(
            *(cache, queries), layer=1, num_seen=num_seen, implementation=implementation, **options
        )
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)


def test_parts_are_merged_with_attention_to_the_text():
    """One softmax over the text and the encoder's tokens, as some decoders have it."""
    cache, vectors = written(lengths=np.array([5, 2, 3], np.int32))
    keys, values = normal(3, 2, 3, 4, 2, DIM)
    cache = jaxkv.append(cache, keys, values, layer=0)
    query = normal(4, 3, 1, 2, DIM)
    own = jaxkv.attend(jaxkv.advance(cache, 3), query, layer=0, partial=True)
    outputs, logs = map(
        jnp.stack, zip(own, attend(cache, query, layer=0, partial=True), strict=True)
    )
    merged = (jax.nn.softmax(logs, axis=0)[..., None] * outputs).sum(0)
    for row, length in enumerate((5, 2, 3)):
        pairs = [
            *zip(*vectors[0][:, row, :length], strict=True),
            *zip(keys[row], values[row], strict=True),
        ]
        right = attention(query[row, 0], pairs)
        np.testing.assert_allclose(merged[row, 0], right, rtol=0, atol=2e-5)


def test_a_codec_that_learns_has_learned_before_the_first_query():
    codec = CODECS["int8-centred"]
    config = dataclasses.replace(CONFIG, cross=(AUDIO.replace(codec=codec),))
    cache, vectors = written(config)
    keys, values = vectors[1] + 10  # a mean that a plain code would lose numbers by
    cache = write(jaxkv.create(config), keys, values, layer=1, lengths=LENGTHS)
    held = jaxkv.cross_layer(cache, 1)
    for found, own in zip(held, (keys, values), strict=True):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(found[row, :length], own[row, :length], atol=0.05)
    queries = normal(5, 3, 3, 2, DIM)
    right = expected(np.stack(held), LENGTHS, queries)
    np.testing.assert_allclose(attend(cache, queries, layer=1), right, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_latents_of_an_encoder():
    """Values in their keys, as multi-head latent attention has them."""
    own = AUDIO.replace(num_kv_heads=1, value_dim=12, values_in_keys=True)
    config = dataclasses.replace(CONFIG, cross=(own,))
    keys, queries = normal(0, 3, MOST, 1, DIM), normal(1, 3, 2, 4, DIM)
    cache = write(jaxkv.create(config), keys, layer=0, lengths=LENGTHS)
    right = expected(np.stack([keys, keys]), LENGTHS, queries)[..., :12]
    np.testing.assert_allclose(attend(cache, queries, layer=0), right, rtol=0, atol=2e-5)


def test_a_derivative_goes_through_what_was_written():
    cache, queries = jaxkv.create(CONFIG), normal(1, 3, 2, 4, DIM)
    keys, values = sources()[0]

    def total(values):
        written = jaxkv.write_cross(cache, keys, values, layer=0, lengths=LENGTHS)
        return jaxkv.attend_cross(written, queries, layer=0).sum()

    found = jax.jit(jax.grad(total))(values)
    # Weights add up to one for each query: so much of each sequence that has tokens.
    np.testing.assert_allclose(
        found.sum((1, 3)), (LENGTHS > 0)[:, None] * [[4 * DIM] * 2], rtol=1e-5
    )
    assert not found[0, 5:].any()


# --- what is written, kept and forgotten -------------------------------------------------------


def test_the_text_goes_on_and_back_without_the_encoder():
    cache, vectors = written()
    queries = normal(1, 3, 2, 2, DIM)
    right = expected(vectors[0], LENGTHS, queries)
    for changed in (
        jaxkv.advance(cache, 5),
        jaxkv.truncate(jaxkv.advance(cache, 5), 0),
        jaxkv.padded_after(jaxkv.advance(cache, 3), np.array([0, 1, 2])),
    ):
        assert changed.cross[0].lengths.tolist() == LENGTHS.tolist()
        np.testing.assert_allclose(attend(changed, queries, layer=0), right, atol=2e-5)
    empty = jaxkv.reset(jaxkv.advance(cache, 5))
    assert empty.lengths.tolist() == empty.cross[0].lengths.tolist() == [0] * 3
    assert not attend(empty, queries, layer=0).any()


def test_a_row_that_is_given_anew_sees_nothing_of_what_it_had():
    """Fewer tokens over garbage; one row keeps what it has, and one is told that it has none."""
    cache, vectors = written()
    garbage = jnp.full_like(vectors[0][0], np.nan)
    cache = write(cache, garbage, garbage, layer=0, lengths=np.array([-1, 7, 7], np.int32))
    new = sources(seed=8)
    for layer in CROSSING:
        cache = write(cache, *new[layer], layer=layer, lengths=np.array([-1, 2, 0], np.int32))
    assert cache.cross[0].lengths.tolist() == [5, 2, 0]
    queries = normal(1, 3, 3, 2, DIM)
    for layer in CROSSING:
        both = np.stack([vectors[layer][:, 0], new[layer][:, 1], new[layer][:, 2]], axis=1)
        right = expected(both, [5, 2, 0], queries)
        np.testing.assert_allclose(attend(cache, queries, layer=layer), right, atol=2e-5)
    none = np.zeros((3, 0, 2, DIM), np.float32)  # all that a text without an image needs
    cache = write(cache, none, none, layer=0, lengths=np.array([0, -1, -1], np.int32))
    assert cache.cross[0].lengths.tolist() == [0, 2, 0]


def test_what_stands_past_the_end_is_never_read():
    cache = jaxkv.create(CONFIG)
    cache = dataclasses.replace(cache, cross=tuple(map(poisoned, cache.cross)))
    vectors = sources()
    keys, values = (
        np.where(np.arange(MOST)[:, None, None] < 5, each, np.nan) for each in vectors[0]
    )
    cache = write(cache, keys, values, layer=0, lengths=LENGTHS)
    queries = normal(1, 3, 9, 2, DIM)
    for implementation in ("reference", "blockwise"):
        found = attend(cache, queries, layer=0, implementation=implementation)
        np.testing.assert_allclose(found, expected(vectors[0], LENGTHS, queries), atol=2e-5)
    found = attend(cache, queries[:, :2], layer=0, implementation="native")
    np.testing.assert_allclose(found, expected(vectors[0], LENGTHS, queries[:, :2]), atol=2e-5)


ROW_LENGTHS = st.lists(st.integers(-1, MOST), min_size=3, max_size=3)
VERBS = st.one_of(
    st.tuples(st.just("write"), ROW_LENGTHS, st.integers(0, 1 << 20)),
    st.tuples(st.just("advance"), st.integers(0, 2)),
    st.tuples(st.just("truncate"), st.integers(0, 3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("reset")),
)
select, advance, truncate = jit(jaxkv.select), jit(jaxkv.advance), jit(jaxkv.truncate)


@settings(max_examples=25, deadline=None)
@given(st.lists(VERBS, max_size=8))
def test_after_any_verbs_each_row_reads_what_was_last_written_for_it(verbs):
    """Beside a list per row of what its encoder wrote last."""
    cache, held = jaxkv.create(CONFIG), [np.zeros((2, 2, 0, 2, DIM))] * 3
    for verb, *how in verbs:
        if verb == "write":
            lengths, seed = how
            vectors = sources(seed=seed)
            for layer in CROSSING:
                cache = write(cache, *vectors[layer], layer=layer, lengths=np.int32(lengths))
            both = np.stack([vectors[layer] for layer in CROSSING])
            held = [
                old if length < 0 else both[:, :, row, :length]
                for row, (old, length) in enumerate(zip(held, lengths, strict=True))
            ]
        elif verb == "select":
            cache, held = select(cache, jnp.array(*how)), [held[row] for row in how[0]]
        elif verb == "reset":
            cache, held = jaxkv.reset(cache), [each[:, :, :0] for each in held]
        else:
            cache = {"advance": advance, "truncate": truncate}[verb](cache, *how)
    queries = normal(0, 3, 2, 2, DIM)
    for layer in CROSSING:
        output = attend(cache, queries, layer=layer)
        for row, own in enumerate(held):
            right = expected(own[layer][:, None], [own.shape[2]], queries[row : row + 1])
            np.testing.assert_allclose(output[row], right[0], rtol=0, atol=2e-5)


def test_lengths_that_cannot_be_are_told_of_inside_jit():
    cache, (keys, values) = written()[0], sources(seed=3)[0]
    bad = write(cache, keys, values, layer=0, lengths=jnp.array([8, -2, 1]))
    with pytest.raises(ValueError, match=r"out of range inside jit, for sequences \[0, 1\]"):
        jaxkv.check(bad)
    before, after = (jaxkv.cross_layer(each, 0)[0] for each in (cache, bad))
    np.testing.assert_array_equal(after[:2], before[:2])
    assert jaxkv.check(jaxkv.reset(bad)).cross[0].lengths.tolist() == [0] * 3


def test_sequences_are_chosen_and_repeated():
    cache, vectors = written()
    queries = normal(1, 4, 2, 2, DIM)
    chosen = jaxkv.select(cache, [2, 0, 0, 1])
    rows = [2, 0, 0, 1]
    right = expected(vectors[0][:, rows], LENGTHS[rows], queries)
    np.testing.assert_allclose(attend(chosen, queries, layer=0), right, atol=2e-5)
    assert jaxkv.fork(cache, 2).cross[0].lengths.tolist() == [5, 5, 0, 0, 3, 3]
    alone = jaxkv.create(dataclasses.replace(CONFIG.replace(batch_size=None)))
    alone = write(alone, *vectors[0][:, 0], layer=0, lengths=5)
    forked = jaxkv.fork(alone, 3)
    assert forked.config == CONFIG
    right = expected(vectors[0][:, [0] * 4], [5] * 4, queries)[:3]
    np.testing.assert_allclose(attend(forked, queries[:3], layer=0), right, atol=2e-5)


def test_text_is_evicted_and_compressed_beside_it():
    cache, vectors = written()
    for layer in (0, 2):
        cache = jaxkv.append(cache, *normal(layer, 2, 3, 6, 2, DIM), layer=layer)
    small = jaxkv.compress(jaxkv.advance(cache, 6), jaxkv.policies.SinksAndRecent(sinks=1), keep=3)
    assert small.config.cross_of_layer == (0, 0, -1)
    assert small.groups[0].index.per_head
    queries = normal(1, 3, 2, 2, DIM)
    right = expected(vectors[1], LENGTHS, queries)
    np.testing.assert_allclose(attend(small, queries, layer=1), right, atol=2e-5)
    assert jaxkv.attend(small, queries[:, :1], layer=2).shape == (3, 1, 2, DIM)


# --- bytes and places --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "rotated4"])
def test_bytes_are_those_of_the_leaves(codec):
    config = CONFIG.replace(codec=CODECS[codec])
    assert config.cross[0].codec == CODECS[codec]
    cache = jaxkv.create(config)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert config.size_bytes + config.index_bytes == held
    assert cache.size_bytes == config.size_bytes
    assert config.size_bytes == sum(each.size_bytes for each in (*config.groups, *config.cross))
    with jaxkv.session(config) as session:
        session.cache = jaxkv.advance(session.cache, 3)
        assert session.tracker.total_usage() == held
        assert "cross-attention: 3 sequences x 7 tokens x 2 layers" in session.report()
    plan = jaxkv.plan(config, "1GB")
    assert plan.needed_bytes == held
    longest = jaxkv.plan(config, held)
    assert (longest.max_context_length, longest.max_batch_size) == (16, 3)
    assert '"cross_of_layer": [' in plan.to_json()


def test_a_step_reads_and_a_request_writes_in_place():
    """In a loop that only reads, nothing is copied; a write moves what it is given."""
    large = CONFIG.replace(max_context_length=1 << 14)
    large = dataclasses.replace(large, cross=(AUDIO.replace(max_context_length=1 << 16),))
    cache = jax.eval_shape(lambda: jaxkv.create(large))
    vectors, queries = (jax.ShapeDtypeStruct((3, 1, n, DIM), "float32") for n in (2, 4))

    def one_step(_, carry):
        cache, above = carry
        x = jnp.broadcast_to(above, vectors.shape)
        cache = jaxkv.append(cache, x, x, layer=0)
        above = jaxkv.attend(cache, jnp.broadcast_to(above, queries.shape), layer=0).mean()
        for layer in CROSSING:
            read = jaxkv.attend_cross(cache, jnp.broadcast_to(above, queries.shape), layer=layer)
            above = read.mean()
        return jaxkv.advance(cache, 1), above

    def steps(cache, above):
        return jax.lax.fori_loop(0, 3, one_step, (cache, above))

    compiled = compile_donating(steps, cache, jax.ShapeDtypeStruct((), "float32"))
    for each in (*cache.groups, *cache.cross):
        assert_in_place(compiled, each, temp_share=0.02)

    def request(cache, keys, values, lengths):
        for layer in CROSSING:
            cache = jaxkv.write_cross(cache, keys, values, layer=layer, lengths=lengths)
        return cache, lengths

    lengths = jax.ShapeDtypeStruct((3,), "int32")
    compiled = compile_donating(request, cache, vectors, vectors, lengths)
    assert_in_place(compiled, cache.cross[0], temp_share=0.02)


def test_a_file_goes_on_bit_for_bit(tmp_path):
    cache, _ = written()
    for layer in (0, 2):
        cache = jaxkv.append(cache, *normal(layer, 2, 3, 4, 2, DIM), layer=layer)
    cache = jaxkv.advance(cache, np.array([4, 3, 1], np.int32))
    jaxkv.save(cache, tmp_path / "file")
    assert jaxkv.snapshot.inspect(tmp_path / "file").config == cache.config
    loaded = jaxkv.load(tmp_path / "file", max_context_length=32)
    into = jaxkv.load(tmp_path / "file", into=written(seed=5)[0], rows=[2, 0, 1])
    queries = normal(1, 3, 2, 2, DIM)
    for found in (loaded, jaxkv.select(into, [2, 0, 1])):
        assert found.lengths.tolist() == [4, 3, 1]
        assert found.cross[0].lengths.tolist() == LENGTHS.tolist()
        for layer in CROSSING:
            ours, theirs = (attend(each, queries, layer=layer) for each in (found, cache))
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        more = (jaxkv.append(each, *normal(9, 2, 3, 2, 2, DIM), layer=2) for each in (found, cache))
        ours, theirs = (jaxkv.attend(each, queries, layer=2) for each in more)
        np.testing.assert_array_equal(ours, theirs)
    other = dataclasses.replace(
        CONFIG, cross=(AUDIO.replace(num_layers=3),), cross_of_layer=(0, 0, 0)
    )
    with pytest.raises(jaxkv.SnapshotError, match=r"cross-attention in layers \[0, 1\]"):
        jaxkv.load(tmp_path / "file", into=jaxkv.create(other))
    longer = jaxkv.load(tmp_path / "file", max_encoder_length=12)
    assert longer.config.cross[0].max_context_length == 12
    np.testing.assert_array_equal(attend(longer, queries, layer=1), attend(cache, queries, layer=1))
    with pytest.raises(jaxkv.CacheFullError, match=r"5 tokens of an encoder, more than .*=4"):
        jaxkv.load(tmp_path / "file", max_encoder_length=4)
    short = dataclasses.replace(CONFIG, cross=(AUDIO.replace(max_context_length=4),))
    with pytest.raises(jaxkv.CacheFullError, match="holds 5 tokens, and the cache has room for 4"):
        jaxkv.load(tmp_path / "file", into=jaxkv.create(short))


def test_an_exported_step_takes_it():
    cache, _ = written()
    queries = jnp.asarray(normal(1, 3, 1, 2, DIM))
    step = jax.jit(functools.partial(jaxkv.attend_cross, layer=1, implementation="reference"))
    exported = jax.export.export(step)(cache, queries)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(cache, queries), step(cache, queries))


def test_one_query_is_a_step_of_decode_for_every_kernel():
    """To the last bit of what implementations are told, and no NaN of a length below zero."""
    (own,), queries = written()[0].cross, jnp.asarray(normal(1, 3, 1, 4, DIM))
    asked = request_of(own, queries, 1, cross=True)
    before = own.with_lengths(jnp.maximum(own.lengths - 1, 0))
    decode = request_of(before, queries, 1, jnp.minimum(own.lengths, 1))
    assert jax.tree.structure(asked) == jax.tree.structure(decode)
    for one, other in zip(jax.tree.leaves(asked), jax.tree.leaves(decode), strict=True):
        np.testing.assert_array_equal(one, other)


def test_explain_says_who_reads_it():
    said = jaxkv.explain(jaxkv.create(CONFIG), tokens=9)
    assert said.count("reference: used") == 2
    assert "cross-attention:\nnative: not used, it serves up to 8" in said


MESHED = jaxkv.HybridConfig(
    (TEXT.replace(batch_size=8, num_kv_heads=4),),
    (0, -1, 0),
    cross=(AUDIO.replace(batch_size=8, num_kv_heads=4),),
    cross_of_layer=(0, 0, -1),
)


@pytest.mark.devices(8)
@pytest.mark.slow_cases("Explicit|batch 8|heads 8")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("split", ["batch 2 x heads 4", "heads 8", "batch 8"])
def test_a_mesh_gives_what_one_device_gives(split, axis_type, tmp_path):
    place = spread_over(split, axis_type)
    lengths = np.arange(8, dtype=np.int32) % (MOST + 1)
    (one, _), (many, _) = written(MESHED, lengths), written(MESHED, lengths, **place)
    queries = jnp.asarray(normal(1, 8, 3, 8, DIM))
    right = attend(one, queries, layer=1)
    np.testing.assert_allclose(attend(many, queries, layer=1), right, rtol=0, atol=2e-6)
    seen = jnp.asarray(np.arange(24, dtype=np.int32).reshape(8, 3) % 5)
    found, right = (attend(each, queries, layer=1, num_seen=seen) for each in (many, one))
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-6)
    on_each = dict.fromkeys(place["mesh"].devices.flat, 0)
    for leaf in jax.tree.leaves(many):
        for shard in leaf.addressable_shards:
            on_each[shard.device] += shard.data.nbytes
    assert set(on_each.values()) == {jaxkv.plan(MESHED, "1GB", **place).needed_bytes}
    back = jaxkv.gather(many)
    assert back.cross[0].spread is None
    again = jaxkv.spread(back, **place)
    jaxkv.save(again, tmp_path / "file")
    loaded = jaxkv.load(tmp_path / "file", **place)
    for each in (back, again, loaded, jaxkv.load(tmp_path / "file")):
        assert each.cross[0].lengths.tolist() == lengths.tolist()
        ours, theirs = (np.asarray(jaxkv.cross_layer(c, 0)) for c in (each, one))
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(ours[:, row, :length], theirs[:, row, :length])


@pytest.mark.devices(8)
@pytest.mark.slow
def test_inside_a_shard_map_of_ones_own():
    place = spread_over("batch 2 x heads 4", AxisType.Auto)
    mesh, axes = place["mesh"], place["axes"]
    cache, one = jaxkv.create(MESHED, **place), jaxkv.create(MESHED)
    specs = jaxkv.partition_specs(cache)
    lengths, queries = np.arange(8, dtype=np.int32) % (MOST + 1), normal(1, 8, 3, 8, DIM)
    seen = np.tile(np.int32([1, 2, 7]), (8, 1))
    keys, values = sources(MESHED)[1]

    def step(cache, keys, values, lengths, queries, seen):
        cache = jaxkv.write_cross(cache, keys, values, layer=1, lengths=lengths)
        return cache, jaxkv.attend_cross(cache, queries, layer=1, num_seen=seen)

    rows, vectors = PartitionSpec(axes.batch), PartitionSpec(axes.batch, None, axes.heads)
    in_specs = (specs, vectors, vectors, rows, vectors, rows)
    run = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=(specs, vectors), check_vma=False
    )
    arguments = keys, values, lengths, queries, seen
    (ours, found), (theirs, right) = jax.jit(run)(cache, *arguments), step(one, *arguments)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-6)
    assert jaxkv.gather(ours).cross[0].lengths.tolist() == theirs.cross[0].lengths.tolist()


@pytest.mark.devices(8)
def test_a_context_that_is_split_is_refused():
    place = spread_over("heads 2 x context 4", AxisType.Auto)
    cache = jaxkv.create(MESHED)
    for refused in (
        lambda: jaxkv.create(MESHED, **place),
        lambda: jaxkv.plan(MESHED, "1GB", **place),
        lambda: jaxkv.spread(cache, **place),
    ):
        with pytest.raises(jaxkv.ConfigError, match="what cross-attention reads is not split"):
            refused()


# --- refused -----------------------------------------------------------------------------------

VECTORS = np.ones((3, 2, 2, DIM), np.float32)
REFUSED = {
    "append": (lambda c: jaxkv.append(c, VECTORS, VECTORS, layer=1), "jaxkv.write_cross writes"),
    "attend": (lambda c: jaxkv.attend(c, VECTORS, layer=1), "jaxkv.attend_cross reads them"),
    "layer": (lambda c: jaxkv.layer(c, 1), "keys and values of an encoder's tokens alone"),
    "no cross": (lambda c: jaxkv.attend_cross(c, VECTORS, layer=2), r"those that do are \[0, 1\]"),
    "none at all": (
        lambda c: jaxkv.write_cross(jaxkv.create(TEXT), VECTORS, VECTORS, layer=0),
        "none of this cache",
    ),
    "too long": (
        lambda c: jaxkv.write_cross(c, *np.ones((2, 3, 8, 2, DIM)), layer=0),
        "8 encoder tokens were given, and this cache has room for 7",
    ),
    "lengths": (
        lambda c: jaxkv.write_cross(c, VECTORS, VECTORS, layer=0, lengths=[1, 2, 3]),
        r"from 0 to 2, the tokens given, or -1 .* got \[1, 2, 3\]",
    ),
    "no lengths": (
        lambda c: jaxkv.write_cross(c, VECTORS, VECTORS, layer=0, lengths=np.ones(2, int)),
        r"an int or int32\[3\], got int64\[2\]",
    ),
    "seen": (
        lambda c: jaxkv.attend_cross(c, VECTORS, layer=0, num_seen=jnp.ones(3, jnp.int32)),
        r"num_seen must be int32\[3, 2\]",
    ),
    "shape": (lambda c: jaxkv.write_cross(c, VECTORS[0], VECTORS[0], layer=0), "keys must be"),
    "to_hf": (to_hf, "in a cache of its own"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(what):
    call, message = REFUSED[what]
    with pytest.raises((ValueError, jaxkv.CacheFullError), match=message):
        call(jaxkv.create(CONFIG))


def test_an_engine_and_its_pages_refuse_what_they_cannot(tmp_path):
    paged = dataclasses.replace(CONFIG, groups=(TEXT.replace(addressing=jaxkv.Paged(4, 16)),))
    learning = AUDIO.replace(codec=CODECS["int8-centred"])
    with pytest.raises(jaxkv.ConfigError, match="codec that learns nothing, got int8-centred"):
        jaxkv.Engine(
            lambda tokens, cache: (tokens, cache), dataclasses.replace(paged, cross=(learning,))
        )
    refused = pytest.raises(ValueError, match="prepare is for models with cross-attention")
    with jaxkv.Engine(lambda tokens, cache: (tokens, cache), paged.groups[0]) as engine, refused:
        engine.submit([1], max_new_tokens=1, prepare=lambda cache: cache)
    pages = jaxkv.paging.PageAllocator(16, page_size=4)
    with pytest.raises(ValueError, match="load_prefix: this cache has cross-attention"):
        jaxkv.load_prefix(tmp_path, jaxkv.create(paged), pages, model="any")


BAD = {
    "too few": ({"cross_of_layer": (0, -1, -1)}, r"each of cross as often .* \[2\] times"),
    "no layers": ({"cross_of_layer": ()}, "for 3 layers"),
    "unknown": ({"cross_of_layer": (0, 0, 1)}, "be -1 for the others"),
    "nothing kept": ({"cross": (), "cross_of_layer": ()}, "group_of_layer must name"),
    "another batch": ({"cross": (AUDIO.replace(batch_size=2),)}, "same batch_size"),
    "a ring": ({"cross": (AUDIO.replace(addressing=jaxkv.Ring(4)),)}, "contiguous"),
    "elsewhere": ({"cross": (AUDIO.replace(placement=jaxkv.HostMemory()),)}, "on the device"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configs_say_what_is_wrong(what):
    fields, message = BAD[what]
    with pytest.raises(jaxkv.ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields)
