"""A cache over a mesh of devices: what one device gives, where each part stays, what moves."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.integrations.transformers import to_hf
from jaxkv.native import unavailable
from tests.compiled import compile_donating
from tests.decoders import sharp_decoder

pytestmark = pytest.mark.devices(8)

BATCH, HEADS, HEAD_DIM = 8, 16, 16
ROPE = jaxkv.Rope.of(100.0, rotary_dim=HEAD_DIM)
CODECS = {
    "float32": jaxkv.Dense("float32"),
    "bfloat16": jaxkv.Dense("bfloat16"),
    "int8": jaxkv.Int8(),
    "rotated4": jaxkv.Rotated(4),
    "centred": jaxkv.Centred(jaxkv.Int8(), ROPE),
    "stair": jaxkv.Stair(4, ROPE),
}
LEARNING = ("centred", "stair")
KINDS = {
    "contiguous": {},
    "ring": {"addressing": jaxkv.Ring(window=20, chunk=8)},
    "paged": {"addressing": jaxkv.Paged(4)},
    "pool": {"addressing": jaxkv.Paged(4, num_pages=BATCH * 16)},
    "newest": {"newest": jaxkv.Newest(8, jaxkv.Dense("float32"))},
    "hybrid": {},  # a ring, and a contiguous group
}
# Axis sizes, their names by what they split, and the KV heads.
SPLITS = {
    "heads 8": ({"heads": 8}, 8),
    "batch 8": ({"batch": 8}, 8),
    "batch 2 x heads 4": ({"batch": 2, "heads": 4}, 8),
    "context 8": ({"context": 8}, 8),
    "heads 2 x context 4": ({"heads": 2, "context": 4}, 8),
    "2 KV heads over 8": ({"heads": 8}, 2),
}
# What is refused by name.
REFUSED = {
    "newest": "newest tokens is not split by context",
    "ring": "a window is not split by context",
    "hybrid": "a window is not split by context",
}


def spread_over(split, axis_type=AxisType.Auto):
    sizes, _ = SPLITS[split]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


def config_of(split, codec, kind, context=64):
    fields = {"codec": CODECS[codec], "batch_size": BATCH, **KINDS[kind]}
    config = jaxkv.KVCacheConfig(2, context, SPLITS[split][1], HEAD_DIM, **fields)
    if kind != "hybrid":
        return config
    groups = config.replace(num_layers=1, **KINDS["ring"]), config.replace(num_layers=1)
    return jaxkv.HybridConfig(groups, group_of_layer=(0, 1))


def with_pages(cache, split):
    """The pages of a pool given out, by numbers that each device counts from 0."""
    sizes, _ = SPLITS[split]
    batch, context = sizes.get("batch", 1), sizes.get("context", 1)
    table = np.arange(BATCH // batch * 16 // context, dtype=np.int32)
    table = table.reshape(BATCH // batch, 16 // context)
    return cache.with_pages(jnp.asarray(np.tile(table, (batch, context))), cache.lengths)


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, queries, keys, values, num_tokens):
    """One layer; a single token by the kernel, whose sums do not depend on what stands beside."""
    one_token = queries.shape[1] == 1 and unavailable() is None
    is_decoded = cache.groups[0].config.codec.asks_queries  # before any kernel reads it
    name = "native" if one_token and not is_decoded else "blockwise"
    options = {"layer": 1, "num_tokens": num_tokens}
    cache = jaxkv.append(cache, keys, values, **options, queries=queries)
    output = jaxkv.attend(cache, queries, **options, implementation=name)
    return jaxkv.advance(cache, num_tokens), output


def arrays(generator, tokens, kv_heads, rows=BATCH):
    shape = (rows, tokens)
    keys, values = generator.standard_normal((2, *shape, kv_heads, HEAD_DIM), np.float32)
    return generator.standard_normal((*shape, HEADS, HEAD_DIM), np.float32), keys, values


DEFAULT = {("heads 8", "int8", "paged"), ("batch 2 x heads 4", "centred", "contiguous")}
DEFAULT |= {("context 8", "float32", "contiguous"), ("context 8", "float32", "ring")}
ALSO_SLOW = {("batch 8", "float32", "pool"), ("2 KV heads over 8", "bfloat16", "hybrid")}


def _cases():
    """All; but for some of them left to `slow`, and but for some of these to `full`.

    Slow is each split with two codecs, and each codec with two kinds, by both types of axes.
    """
    splits, codecs, kinds = list(SPLITS), list(CODECS), list(KINDS)
    types = [AxisType.Auto, AxisType.Explicit]
    default = {(*case, types[number % 2]) for number, case in enumerate(sorted(DEFAULT))}
    slow = {(*case, AxisType.Auto) for case in ALSO_SLOW} | {
        (split, codecs[(at + 2 * number) % 6], kinds[(at - number) % 6], types[(at + number) % 2])
        for at, split in enumerate(splits)
        for number in range(2)
    }
    for case in itertools.product(splits, codecs, kinds, types):
        mark = [] if case in default else pytest.mark.slow if case in slow else pytest.mark.full
        yield pytest.param(*case, marks=mark, id=", ".join((*case[:3], case[3].name)))


@pytest.mark.parametrize(("split", "codec", "kind", "axis_type"), list(_cases()))
def test_it_gives_what_one_device_gives(split, codec, kind, axis_type):
    config, place = config_of(split, codec, kind), spread_over(split, axis_type)
    by_context = "context" in SPLITS[split][0]
    if by_context and kind in REFUSED:
        with pytest.raises(jaxkv.ConfigError, match=REFUSED[kind]):
            jaxkv.create(config, **place)
        return
    one, many = jaxkv.create(config), jaxkv.create(config, **place)
    if kind == "pool":
        table = np.arange(BATCH * 16, dtype=np.int32).reshape(BATCH, 16)
        one, many = one.with_pages(jnp.asarray(table), one.lengths), with_pages(many, split)
    generator = np.random.default_rng(0)
    ragged = np.array([5, 4, 3, 2, 1, 0, 5, 5], np.int32)
    every = np.ones(BATCH, np.int32)

    def both(one, many, tokens, num_tokens):
        given = arrays(generator, tokens, SPLITS[split][1], one.config.batch_size)
        one, expected = step(one, *given, num_tokens)
        many, output = step(many, *given, num_tokens)
        # XLA's products of other shapes differ in their last bits, and so do merged parts.
        learns = codec in LEARNING
        exact = tokens == 1 and unavailable() is None and not by_context and not learns
        np.testing.assert_allclose(
            output, expected, rtol=0, atol=0 if exact else 1e-3 if learns else 2e-6
        )
        return one, many

    for tokens, num_tokens in ((5, ragged), (1, every), (1, every)):
        one, many = both(one, many, tokens, num_tokens)
    one, many = (jaxkv.truncate(each, np.minimum(one.lengths, 4)) for each in (one, many))
    one, many = both(one, many, 1, every)
    np.testing.assert_array_equal(many.lengths, one.lengths)
    rows = np.arange(BATCH).reshape(SPLITS[split][0].get("batch", 1), -1)[:, ::-1].ravel()
    one, many = jaxkv.select(one, rows), jaxkv.select(many, rows)
    if kind != "pool":
        one, many = jaxkv.fork(one, 2), jaxkv.fork(many, 2)
        one, many = both(one, many, 2, np.full(2 * BATCH, 2, np.int32))
    if kind != "pool":  # whose slots are others
        assert_same_layer(one, many, codec)
    assert_where_it_was(many, place)
    if by_context or kind == "ring":
        error, what = (ValueError, "Gather it first") if by_context else (TypeError, "nothing to")
        with pytest.raises(error, match=f"compress: .*{what}"):
            jaxkv.compress(many, jaxkv.policies.KeyDiff(), keep=3, new=4)
        return
    one, many = (
        jaxkv.compress(each, jaxkv.policies.KeyDiff(), keep=3, new=4, sinks=1)
        for each in (one, many)
    )
    assert_same_layer(one, many, codec)
    assert_where_it_was(many, place)
    both(one, many, 1, np.ones(one.config.batch_size, np.int32))


@pytest.mark.slow_cases("batch 8|context")
@pytest.mark.parametrize("split", ["2 KV heads over 8", "batch 8", "heads 2 x context 4"])
def test_constants_are_of_all_devices_tokens_and_queries(split):
    config = config_of(split, "stair", "contiguous").replace(num_layers=1)
    queries, keys, values = arrays(np.random.default_rng(0), 5, config.num_kv_heads)
    queries *= np.exp(np.random.default_rng(1).standard_normal((HEADS, HEAD_DIM), np.float32))
    append = jax.jit(functools.partial(jaxkv.append, layer=0))
    one, many = (
        append(jaxkv.create(config, **place), keys, values, queries=queries).codec_state
        for place in ({}, spread_over(split))
    )
    copies = many["order"].shape[2] // one["order"].shape[2]
    for name, learned in one.items():
        np.testing.assert_allclose(many[name], np.repeat(learned, copies, 2), rtol=1e-3, atol=1e-3)


def assert_same_layer(one, many, codec):
    for ours, right in zip(jaxkv.layer(many, 1), jaxkv.layer(one, 1), strict=True):
        # Means of fewer heads at once may differ in their last bit.
        np.testing.assert_allclose(ours, right, rtol=0, atol=1e-3 if codec in LEARNING else 0)


def assert_where_it_was(many, place):
    specs = jax.tree.leaves(jaxkv.partition_specs(many))
    for leaf, spec in zip(jax.tree.leaves(many), specs, strict=True):
        there = NamedSharding(place["mesh"], spec, memory_kind=leaf.sharding.memory_kind)
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim)


@pytest.mark.full_cases(r"(batch 8|KV heads over).*Auto")
@pytest.mark.slow_cases(r"batch 8|KV heads over|Auto")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("split", "codec", "kind"),
    [
        ("batch 2 x heads 4", "int8", "contiguous"),
        ("batch 8", "centred", "newest"),
        ("2 KV heads over 8", "float32", "paged"),  # copies
    ],
)
def test_chosen_tokens_are_those_of_one_device(split, codec, kind, axis_type):
    """Policies with state, budgets of heads, and eviction: what `compress` above leaves out."""
    config, place = config_of(split, codec, kind), spread_over(split, axis_type)
    generator, policy = np.random.default_rng(0), jaxkv.policies.HeavyHitters()
    _, keys, values = arrays(generator, 12, config.num_kv_heads)
    queries = generator.standard_normal((2, BATCH, 4, HEADS, HEAD_DIM), np.float32)
    tolerance = {"rtol": 0, "atol": 1e-3 if codec == "centred" else 2e-6}

    @jax.jit
    def appended(cache, keys, values):
        for layer in range(2):
            cache = jaxkv.append(cache, keys, values, layer=layer)
        return jaxkv.advance(cache, keys.shape[1])

    @jax.jit
    def evicted(cache):
        cache = appended(cache, keys[:, :4], values[:, :4])
        cache = jaxkv.evict(cache, policy, tokens=2, queries=queries, sinks=1, after=queries)
        return cache, jaxkv.attend(cache, queries[0], layer=1)

    caches, budgets = [], []
    for cache in (jaxkv.create(config), jaxkv.create(config, **place)):
        cache = appended(cache, keys, values)
        small = jaxkv.compress(cache, policy, keep=5, new=4, queries=queries, sinks=1)
        scores = jaxkv.compression.score(cache, policy, queries)
        budgets.append(jaxkv.compression.adaptive(cache, scores, 4))
        packed = jaxkv.compress(cache, scores, keep=budgets[-1], new=4, sinks=1)
        caches.append((*evicted(small), jaxkv.attend(packed, queries[1], layer=1)))
    (one, *right), (many, *ours) = caches
    np.testing.assert_array_equal(*budgets)
    assert len(np.unique(budgets[0])) > 1, "heads differ, or this shows nothing"
    np.testing.assert_array_equal(many.lengths, one.lengths)
    np.testing.assert_array_equal(jaxkv.gather(many).index.positions, one.index.positions)
    for output, expected in zip(ours, right, strict=True):
        np.testing.assert_allclose(output, expected, **tolerance)
    assert_where_it_was(many, place)


@pytest.mark.slow_cases(r"Auto|KV heads over")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("split", ["batch 2 x heads 4", "heads 2 x context 4", "2 KV heads over 8"])
def test_inside_ones_own_shard_map_verbs_work_on_a_part(split, axis_type):
    config, place = config_of(split, "int8", "contiguous"), spread_over(split, axis_type)
    mesh, axes = place["mesh"], place["axes"]
    queries, keys, values = arrays(np.random.default_rng(0), 5, config.num_kv_heads)

    def step(cache, queries, keys, values):
        cache = jaxkv.append(cache, keys, values, layer=1)
        parts = jaxkv.attend(cache, queries, layer=1, partial=True)
        return jaxkv.truncate(jaxkv.advance(cache, keys.shape[1]), 4), *parts

    with jax.set_mesh(mesh):  # in place of mesh=
        many = jaxkv.create(config, axes=axes)
    specs, vectors = jaxkv.partition_specs(many), PartitionSpec(axes.batch, None, axes.heads)
    copies = SPLITS[split][0]["heads"] // config.num_kv_heads or 1
    given = [queries, *(np.repeat(each, copies, axis=2) for each in (keys, values))]
    given = [jax.device_put(each, NamedSharding(mesh, vectors)) for each in given]
    in_specs, out_specs = (specs, vectors, vectors, vectors), (specs, vectors, vectors)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    many, *ours = jax.jit(mapped)(many, *given)
    one, *right = jax.jit(step)(jaxkv.create(config), queries, keys, values)
    for output, expected in zip(ours, right, strict=True):
        np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)
    with jax.set_mesh(mesh):
        many = jaxkv.advance(jaxkv.append(many, keys, values, layer=1), 5)
    one = jaxkv.advance(jaxkv.append(one, keys, values, layer=1), 5)
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(many), one)


def test_a_shard_map_over_some_of_the_axes_is_refused():
    many = jaxkv.create(
        config_of("batch 2 x heads 4", "int8", "contiguous"), **spread_over("batch 2 x heads 4")
    )
    spec, mesh = jaxkv.partition_specs(many), many.spread.mesh
    whole = functools.partial(jaxkv.compress, policy=jaxkv.policies.KeyDiff(), keep=4, new=4)
    for work, names, told in (
        (lambda cache: jaxkv.advance(cache, 1), {"batch"}, "is over .'batch'., and the cache is"),
        (lambda cache: whole(cache).lengths, {"batch", "heads"}, "Call it outside"),
    ):
        of_axis = jax.tree.map(
            lambda each, names=names: PartitionSpec(*(_only(part, names) for part in each)),
            spec,
            is_leaf=lambda each: isinstance(each, PartitionSpec),
        )
        run = jax.shard_map(
            work, mesh=mesh, in_specs=(of_axis,), out_specs=PartitionSpec(), axis_names=names
        )
        with pytest.raises(ValueError, match=told):
            jax.jit(run)(many)


def _only(part, names):
    parts = part if isinstance(part, tuple) else (part,)
    return tuple(name for name in parts if name in names) or None


@pytest.mark.slow_cases(r"heads 8|batch 8")
@pytest.mark.parametrize(
    ("split", "axis_type"),
    [
        ("batch 2 x heads 4", AxisType.Explicit),
        ("heads 8", AxisType.Auto),
        ("batch 8", AxisType.Auto),
    ],
    ids=str,
)
def test_host_memory_is_that_of_each_device(split, axis_type):
    placement = jaxkv.HostMemory(resident=4, block=4)
    config = config_of(split, "int8", "contiguous").replace(placement=placement)
    place = spread_over(split, axis_type)
    generator = np.random.default_rng(0)

    @functools.partial(jax.jit, donate_argnums=0)
    def streamed(cache, queries, keys, values):
        cache = jaxkv.append(cache, keys, values, layer=1)
        output = jaxkv.attend(cache, queries, layer=1, implementation="streamed")
        return jaxkv.advance(cache, keys.shape[1]), output

    one, many = jaxkv.create(config), jaxkv.create(config, **place)
    for tokens in (12, 1):
        given = arrays(generator, tokens, config.num_kv_heads)
        one, right = streamed(one, *given)
        many, output = streamed(many, *given)
        np.testing.assert_allclose(output, right, rtol=0, atol=2e-6)
    assert_where_it_was(many, place)
    assert {leaf.sharding.memory_kind for leaf in many.storage.values()} == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(many), one)
    with pytest.raises(ValueError, match=r"select: .*copied by the host.*jaxkv.prefetch"):
        jaxkv.fork(many, 2)
    fetched = jaxkv.prefetch(many)
    assert_where_it_was(fetched, place)
    assert {leaf.sharding.memory_kind for leaf in fetched.storage.values()} == {"device"}
    back = jaxkv.offload(fetched)
    assert {leaf.sharding.memory_kind for leaf in back.storage.values()} == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(back), jaxkv.prefetch(one))


SIZE = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "s8": 1, "u16": 2, "f16": 2, "pred": 1, "u8": 1}
COLLECTIVE = re.compile(r"= (.*?) (?:all-|collective-|reduce-scatter)[a-z-]*\(")


def collective_bytes(text):
    """What all collectives of a program give, on one device."""
    shapes = [
        shape
        for results in COLLECTIVE.findall(text)
        for shape in re.findall(r"(\w+)\[([\d,]*)\]", results)
    ]
    return sum(
        SIZE[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes
    )


LONG = {  # sizes beside which the tokens of a step are few
    "ring": {"addressing": jaxkv.Ring(window=1 << 14, chunk=8)},
    "paged": {"addressing": jaxkv.Paged(64)},
    "pool": {"addressing": jaxkv.Paged(64, num_pages=BATCH << 9)},
}


def _decode_cases():
    default = {(split, "float32", "contiguous") for split in SPLITS if "x" in split}
    slow = {(split, codec, "paged") for split in SPLITS for codec in ("float32", "int8")}
    for case in itertools.product(SPLITS, CODECS, KINDS):
        if "context" in SPLITS[case[0]][0] and case[2] in REFUSED:
            continue
        mark = [] if case in default else pytest.mark.slow if case in slow else pytest.mark.full
        yield pytest.param(*case, marks=mark, id=", ".join(case))


@pytest.mark.parametrize(("split", "codec", "kind"), list(_decode_cases()))
def test_a_decode_step_moves_no_keys_or_values(split, codec, kind, monkeypatch):
    for name, fields in LONG.items():
        monkeypatch.setitem(KINDS, name, fields)
    config = config_of(split, codec, kind, context=1 << 15)
    one = jax.eval_shape(functools.partial(jaxkv.create, config))
    many = jaxkv.create(config, **spread_over(split))
    given = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(0), 1, SPLITS[split][1]))

    def compiled(cache, implementation):
        def decode(cache, queries, keys, values):
            for layer in range(2):
                cache = jaxkv.append(cache, keys, values, layer=layer, queries=queries)
                out = jaxkv.attend(cache, queries, layer=layer, implementation=implementation)
                queries = queries + out
                keys = keys + out[..., : keys.shape[-2], :].mean()
            return jaxkv.advance(cache, 1), queries

        return compile_donating(decode, cache, *given)

    try:
        program, by_one = (compiled(cache, "native") for cache in (many, one))
    except ValueError:  # XLA's own form, where the kernel cannot serve or could not be built
        program, by_one = (compiled(cache, "blockwise") for cache in (many, one))
    memory, of_one = program.memory_analysis(), by_one.memory_analysis()
    leaves = [leaf for group in many.groups for leaf in group.storage.values()]
    parts = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    assert memory.alias_size_in_bytes >= sum(parts)
    queries = given[0].nbytes
    totals = queries // HEAD_DIM
    states = (jax.tree.leaves(group.codec_state) for group in many.groups)
    learned = sum(leaf.nbytes for leaf in itertools.chain(*states))
    # Of a share: but queries and outputs, and what a codec learns, do not shrink with it. Where
    # positions are dealt out and keys are told by theirs, a position per slot is written down.
    listed = (
        4
        * leaves[0].sharding.shard_shape(leaves[0].shape)[2]
        * (codec == "centred" and "context" in SPLITS[split][0])
    )
    allowed = of_one.temp_size_in_bytes + 8 * queries + 2 * learned + listed
    assert memory.temp_size_in_bytes <= allowed
    # Per layer: outputs and two numbers per query and head, and what the test itself sums.
    assert collective_bytes(program.as_text()) <= 2 * (2 * queries + 3 * totals) + 64 + 2 * learned


@pytest.mark.slow_cases("^{'heads")
@pytest.mark.parametrize("split", [{"heads": 2}, {"batch": 2, "heads": 2}, {"context": 4}], ids=str)
def test_generate_answers_as_on_one_device(split):
    model = sharp_decoder()
    mesh = jax.make_mesh(
        tuple(split.values()), tuple(split), axis_types=(AxisType.Auto,) * len(split)
    )
    axes = jaxkv.Axes(**{what: what for what in split})
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7]]
    config = model.cache_config(max_context_length=64, batch_size=2, codec=jaxkv.Dense("float32"))
    run = functools.partial(jaxkv.generate, model, prompts, max_new_tokens=12, config=config)
    one, many = run(), run(mesh=mesh, axes=axes)
    assert many.tokens == one.tokens
    for ours, theirs in zip(many.logprobs, one.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow_cases("context|heads.*stair|batch.*centred")
@pytest.mark.parametrize("codec", LEARNING)
@pytest.mark.parametrize("split", [{"heads": 2}, {"batch": 2}, {"context": 2}], ids=str)
def test_codecs_that_learn_answer_as_on_one_device(split, codec):
    """`generate` and `Engine` give them constants, and then they learn nothing."""
    model = sharp_decoder()
    (axis,) = split
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), (axis,), axis_types=auto, devices=jax.devices()[:2])
    place = {"mesh": mesh, "axes": jaxkv.Axes(**{axis: axis})}
    codec = jaxkv.Centred(jaxkv.Int8()) if codec == "centred" else jaxkv.Stair(4)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7]]
    config = model.cache_config(max_context_length=64, batch_size=2, codec=codec)
    run = functools.partial(jaxkv.generate, model, prompts, max_new_tokens=12, config=config)
    one, many = run(), run(**place)
    assert many.tokens == one.tokens
    for ours, theirs in zip(many.logprobs, one.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    if axis == "context":  # which an engine does not split
        return
    pool = model.cache_config(
        max_context_length=64, batch_size=2, codec=codec, addressing=jaxkv.Paged(16, num_pages=8)
    )
    with jaxkv.Engine(model, pool, prefill_chunk=16, **place) as engine:
        requests = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        engine.run()
    assert [request.tokens for request in requests] == one.tokens


@pytest.mark.slow_cases(r"paged|newest|ring")
@pytest.mark.parametrize(
    ("split", "kind"),
    [
        ("heads 2 x context 4", "contiguous"),
        ("batch 2 x heads 4", "paged"),
        ("2 KV heads over 8", "newest"),
        ("batch 8", "ring"),
    ],
)
def test_a_cache_goes_to_one_device_and_back(split, kind, tmp_path):
    config, place = config_of(split, "int8", kind), spread_over(split)
    one, many = jaxkv.create(config), jaxkv.create(config, **place)
    given, num_tokens = arrays(np.random.default_rng(0), 5, config.num_kv_heads), np.arange(8) % 6
    one, many = (step(each, *given, num_tokens)[0] for each in (one, many))
    gathered = jaxkv.gather(many)
    jax.tree.map(np.testing.assert_array_equal, gathered, one)
    jaxkv.save(many, tmp_path / "cache")
    loaded = jaxkv.load(tmp_path / "cache", addressing=config.addressing, newest=config.newest)
    loaded = jaxkv.spread(loaded, **place)
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(loaded), one)
    for leaf, old in zip(jax.tree.leaves(loaded), jax.tree.leaves(many), strict=True):
        assert leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim)


def test_what_works_on_one_device_says_so():
    many = jaxkv.create(config_of("heads 8", "float32", "contiguous"), **spread_over("heads 8"))
    with pytest.raises(ValueError, match=r"to_hf: this cache is spread over 8 devices.*gather"):
        to_hf(many)
    split = jaxkv.create(config_of("batch 8", "int8", "ring"), **spread_over("batch 8"))
    with pytest.raises(ValueError, match=r"rows .* would move between devices"):
        jaxkv.select(split, [1, 0, 2, 3, 4, 5, 6, 7])
    with pytest.raises(jaxkv.ConfigError, match=r"the mesh has no axis 'rows'; it has 'heads'"):
        jaxkv.create(many.config, mesh=many.spread.mesh, axes=jaxkv.Axes(batch="rows"))
    config = many.config.replace(batch_size=6)
    with pytest.raises(jaxkv.ConfigError, match="batch_size must be a multiple of 8"):
        jaxkv.create(config, mesh=many.spread.mesh, axes=jaxkv.Axes(batch="heads"))


@pytest.mark.slow_cases("Explicit")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_a_model_is_split_as_its_cache_is(axis_type):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    place = {"mesh": mesh, "axes": jaxkv.Axes(batch="data", heads="tensor")}
    whole, tokenizer = jaxkv.models.load()
    model, _ = jaxkv.models.load(**place)
    for param, same in zip(
        *(jax.tree.leaves(nnx.state(each)) for each in (model, whole)), strict=True
    ):
        share = param.sharding.shard_shape(param.shape)
        assert math.prod(share) * (2 if param.ndim == 2 else 1) == same.size, share
    prompts = [tokenizer.encode(text).ids for text in ("def area(width", "class Stack:\n")]
    run = functools.partial(jaxkv.generate, prompts=prompts, max_new_tokens=24)
    assert run(model, **place).tokens == run(whole).tokens


def test_a_decode_step_of_a_split_model_sums_twice_per_layer():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    place = {"mesh": mesh, "axes": jaxkv.Axes(heads="tensor")}
    model, _ = jaxkv.models.load(**place)
    config = model.cache_config(max_context_length=256, batch_size=2)
    graph, state = nnx.split(model)

    def decode(cache, state, tokens):
        logits, cache = nnx.merge(graph, state)(tokens, cache)
        return cache, logits

    tokens = jnp.zeros((2, 1), jnp.int32)
    run = jax.jit(decode, donate_argnums=0)
    text = run.lower(jaxkv.create(config, **place), state, tokens).compile().as_text()
    hidden = model.config.hidden_size
    sums = [results for results in COLLECTIVE.findall(text) if f"[2,1,{hidden}]" in results]
    assert len(sums) <= 2 * model.config.num_layers + 1  # and one of embeddings
    kv_bytes = config.size_bytes // 4
    assert collective_bytes(text) < kv_bytes / 4


def test_what_a_mesh_cannot_share_is_refused_by_name(monkeypatch):
    heads = jaxkv.create(config_of("heads 8", "float32", "contiguous"), **spread_over("heads 8"))
    config = heads.config.replace(num_kv_heads=4)
    few = jaxkv.create(config, mesh=heads.spread.mesh, axes=heads.spread.axes)
    with pytest.raises(ValueError, match="12 query heads cannot be split over the 8 devices"):
        jaxkv.attend(few, jnp.ones((BATCH, 1, 12, HEAD_DIM)), layer=0)
    split = jaxkv.create(config, **spread_over("context 8"))
    with pytest.raises(ValueError, match="window= is not served where the context is split"):
        jaxkv.attend(split, jnp.ones((BATCH, 1, 16, HEAD_DIM)), layer=0, window=3)
    config = config.replace(placement=jaxkv.HostMemory(4, 4))
    with pytest.raises(jaxkv.ConfigError, match="a cache with HostMemory is not split by context"):
        jaxkv.create(config, **spread_over("context 8"))
    with monkeypatch.context() as patch:
        patch.setattr(jaxkv.Centred, "learns_over_devices", False)
        with pytest.raises(jaxkv.ConfigError, match="state is of all sequences"):
            jaxkv.create(config_of("batch 8", "centred", "newest"), **spread_over("batch 8"))
    config = config.replace(placement=None)
    with pytest.raises(jaxkv.ConfigError, match="Engine: axes must name batch and heads alone"):
        jaxkv.Engine(lambda tokens, cache: None, config, **spread_over("context 8"))
    pool = config.replace(addressing=jaxkv.Paged(4, num_pages=20), batch_size=8)
    with pytest.raises(jaxkv.ConfigError, match="num_pages must be a multiple of 8"):
        jaxkv.Engine(lambda tokens, cache: None, pool, **spread_over("batch 8"))
    pool = pool.replace(addressing=jaxkv.Paged(4, num_pages=16))
    split = jaxkv.create(pool, **spread_over("context 8"))
    pages = jaxkv.paging.PageAllocator(2, page_size=4)
    with pytest.raises(ValueError, match="load_prefix: pages of a cache that is split by context"):
        jaxkv.load_prefix("a file", split, pages, model="mine")
