"""The kernel for Hopper GPUs, as far as a machine without one can tell.

`tests/gpu` compiles it for one, `python -m benchmarks accelerator` runs it on one.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.attention.call import request_of
from jaxkv.attention.mosaic import attend as mosaic
from jaxkv.attention.mosaic import centres as mosaic_centres
from jaxkv.attention.mosaic import plan as mosaic_plan
from tests.oracle import jit, poisoned

kernel_queries = pytest.importorskip(
    "jaxkv.attention.mosaic.kernel", exc_type=(ImportError, AttributeError)
)


def config_of(**fields):
    shape = {"num_layers": 2, "max_context_length": 136, "num_kv_heads": 2, "head_dim": 64}
    return jaxkv.KVCacheConfig(**(shape | fields))


@pytest.fixture
def served(monkeypatch):
    """As if the kernel's platform were this one; with a function in its place, or not."""

    def serve(run=mosaic.mosaic, platform="cpu"):
        fields = {"run": run, "cannot_read": mosaic.cannot_read, "platform": platform}
        for name, other in (("mosaic", fields), ("native", {"platform": "gpu"})):
            row = IMPLEMENTATIONS[name]._replace(**other)
            monkeypatch.setitem(IMPLEMENTATIONS, name, row)

    return serve


def test_explain_says_what_it_needs():
    assert "mosaic: not used, it runs on a GPU" in jaxkv.explain(jaxkv.create(config_of()))


REASONS = {
    "more tokens": ({}, 9, "serves up to 8 tokens a sequence, and this call has 9"),
    "tokens of a ring": (
        {"addressing": jaxkv.Ring(window=61, sinks=2, chunk=9)},
        2,
        "serves one token a sequence of ring caches, not 2",
    ),
    "float32": (
        {"codec": jaxkv.Dense("float32")},
        1,
        "reads bfloat16, float16, int8, rotated4 and rotated2, not float32",
    ),
    "float8": ({"codec": jaxkv.Float8()}, 1, "not float8"),
    "head_dim": ({"head_dim": 80}, 1, "head_dim is 80, and it takes 64, 128 or 256"),
    "scales": (
        {"codec": jaxkv.Int8(), "num_kv_heads": 5},
        1,
        "scales of 5 KV heads are not a multiple of 16 bytes",
    ),
    "scales of small pages": (
        {"codec": jaxkv.Int8(), "addressing": jaxkv.Paged(16)},
        1,
        "scales of 16 slots and 2 KV heads, a page's, are not a multiple of 128 bytes",
    ),
    "three bits": ({"codec": jaxkv.Centred(jaxkv.Rotated(3))}, 1, "not rotated3-centred"),
    "short codes": ({"codec": jaxkv.Rotated(2)}, 1, "rotated2 with a head_dim of 64 has 16"),
    "page size": ({"addressing": jaxkv.Paged(24)}, 1, "page_size 24 is not 8, 16, 32 or a"),
    "small pages": ({"addressing": jaxkv.Paged(4)}, 1, "page_size 4 is not 8, 16, 32 or a"),
    "kept": ({"addressing": jaxkv.Kept(100, 28, 2, 2)}, 1, "cannot read kept caches"),
    "odd context": (
        {"max_context_length": 100},
        1,
        "each sequence has 100 slots, which is not a multiple of 8",
    ),
    "odd ring": (
        {"max_context_length": 100, "addressing": jaxkv.Ring(window=128)},
        1,
        "each sequence has 100 slots, which is not a multiple of 8",
    ),
    "short context": (
        {"max_context_length": 56},
        1,
        "reads 64 slots at once, and the cache has 56",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_it_cannot_read(case):
    fields, tokens, reason = REASONS[case]
    assert reason in mosaic.cannot_read(jaxkv.create(config_of(**fields)), tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head_dim": 128},
        {"head_dim": 256, "codec": jaxkv.Dense("float16")},
        {"codec": jaxkv.Int8(), "num_kv_heads": 8},
        {"codec": jaxkv.Int8(), "num_kv_heads": 1},
        {"codec": jaxkv.Int8(), "num_kv_heads": 3},
        {"codec": jaxkv.Rotated(4), "num_kv_heads": 4, "addressing": jaxkv.Paged(16)},
        {"codec": jaxkv.Rotated(4), "num_kv_heads": 8},
        {"codec": jaxkv.Centred(jaxkv.Rotated(4)), "num_kv_heads": 8},
        {"addressing": jaxkv.Paged(16)},
        {"addressing": jaxkv.Ring(window=61, sinks=2, chunk=9)},
        {"addressing": jaxkv.Paged(64, num_pages=9), "batch_size": 3},
    ],
)
def test_what_it_can_read(fields):
    assert mosaic.cannot_read(jaxkv.create(config_of(**fields)), 1) is None


def test_a_group_that_fills_the_registers_is_left_to_others(served):
    cache = jaxkv.create(config_of(num_kv_heads=1))
    assert "33 queries read each KV head" in mosaic.should_not_serve(cache, 1, 33, "gpu")
    served()
    with pytest.raises(ValueError, match="34 queries read each KV head, and it takes 32"):
        jaxkv.attend(cache, jnp.ones((2, 17, 64)), layer=0, implementation="mosaic")


@pytest.mark.parametrize(
    ("codec", "addressing"),
    [
        (jaxkv.Dense("bfloat16"), jaxkv.Contiguous()),
        (jaxkv.Int8(), jaxkv.Paged(16, num_pages=20)),
        (jaxkv.Rotated(4), jaxkv.Contiguous()),
        (
            jaxkv.Centred(jaxkv.Int8(), rope=jaxkv.Rope.of(1e4, rotary_dim=64)),
            jaxkv.Contiguous(),
        ),
    ],
    ids=["bfloat16", "int8 pages", "rotated4", "two centres"],
)
def test_it_lowers_and_is_given_the_whole_cache(served, codec, addressing):
    served(platform="gpu")
    config = config_of(codec=codec, addressing=addressing, num_kv_heads=8, batch_size=2)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    dtypes = {name: dtype for name, (_, dtype) in codec.leaves(64).items()}
    storage = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in cache.storage.items()
    }
    lowered = (
        jax.jit(lambda c, q, layer: jaxkv.attend(c, q, layer=layer, implementation="mosaic"))
        .trace(
            dataclasses.replace(cache, storage=storage),
            jax.ShapeDtypeStruct((2, 1, 16, 64), jnp.bfloat16),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    whole = re.findall(rf"tensor<2x2x{config.num_slots}x8(?:x\d+)?x\w+>", lowered)
    taking_it = [line for line in lowered.splitlines() if whole[0] in line]
    assert [line for line in taking_it if "stablehlo." in line] == [
        line for line in taking_it if "custom_call @mosaic_gpu" in line
    ]
    assert len(taking_it) >= 2  # the signature and the call


# Two sequences, several tiles, pages and options; and codes, whose scales want 8 heads. As many
# tokens at once as each sequence has of them, padded to the most.
INTERPRETED = {
    "bfloat16": (
        {"batch_size": 2, "num_kv_heads": 1, "addressing": jaxkv.Paged(16, window=50)},
        (70, 3),
        {"softcap": 5.0, "sink_logits": jnp.asarray([0.5, -0.5])},
        (1, 1),
    ),
    "tokens": (
        {"batch_size": 2, "num_kv_heads": 1, "addressing": jaxkv.Paged(16, window=50)},
        (70, 5),
        {"sink_logits": jnp.asarray([0.5, -0.5])},
        (7, 3),
    ),
    # The second ring has turned, and both leave out a tile of hidden slots.
    "ring": (
        {
            "batch_size": 2,
            "num_kv_heads": 1,
            "max_context_length": 1000,
            "addressing": jaxkv.Ring(window=20, sinks=3, chunk=240),
        },
        (180, 275),
        {"sink_logits": jnp.asarray([0.5])},
        (1, 1),
    ),
    "float16": (
        {"batch_size": 1, "num_kv_heads": 1, "head_dim": 256, "codec": jaxkv.Dense("float16")},
        (70,),
        {"softcap": 5.0},
        (1,),
    ),
    "rotated4 of 256": (
        {"num_kv_heads": 8, "batch_size": 1, "head_dim": 256, "codec": jaxkv.Rotated(4)},
        (70,),
        {},
        (1,),
    ),
    "int8": (
        {"batch_size": 1, "num_kv_heads": 8, "max_context_length": 72, "codec": jaxkv.Int8()},
        (40,),
        {},
        (1,),
    ),
    "int8 tokens": (
        {"batch_size": 1, "num_kv_heads": 8, "max_context_length": 72, "codec": jaxkv.Int8()},
        (67,),
        {},
        (5,),
    ),
    "int8, one head": (
        {"batch_size": 2, "num_kv_heads": 1, "codec": jaxkv.Int8()},
        (130, 70),
        {},
        (1, 1),
    ),
    "two centres, three heads": (
        {
            "batch_size": 1,
            "num_kv_heads": 3,
            "codec": jaxkv.Centred(jaxkv.Int8(), rope=jaxkv.Rope.of(1e4, rotary_dim=64)),
            "addressing": jaxkv.Paged(64),
        },
        (100,),
        {},
        (1,),
    ),
    "rotated4, four heads": (
        {
            "batch_size": 1,
            "num_kv_heads": 4,
            "codec": jaxkv.Rotated(4),
            "addressing": jaxkv.Paged(16),
        },
        (70,),
        {},
        (1,),
    ),
    "rotated4": (
        {"num_kv_heads": 8, "batch_size": 1, "codec": jaxkv.Rotated(4)},
        (70,),
        {"softcap": 5.0, "window": 66},
        (1,),
    ),
    "two centres": (
        {
            "batch_size": 1,
            "num_kv_heads": 8,
            "codec": jaxkv.Centred(jaxkv.Int8(), rope=jaxkv.Rope.of(1e4, rotary_dim=64)),
            "addressing": jaxkv.Paged(16),
        },
        (70,),
        {"sink_logits": jnp.linspace(-1, 1, 8)},
        (1,),
    ),
    "two centres, rotated": (
        {
            "batch_size": 2,
            "num_kv_heads": 8,
            "max_context_length": 1000,
            "codec": jaxkv.Centred(jaxkv.Rotated(4)),
            "addressing": jaxkv.Ring(window=20, sinks=3, chunk=240),
        },
        (180, 3),
        {"softcap": 5.0},
        (1, 1),
    ),
    "rotated2": (
        {
            "num_kv_heads": 8,
            "batch_size": 1,
            "head_dim": 128,
            "codec": jaxkv.Rotated(2),
            "addressing": jaxkv.Paged(32),
        },
        (100,),
        {"window": 60, "sink_logits": jnp.linspace(-1, 1, 8)},
        (3,),
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        "bfloat16",
        "tokens",
        "ring",
        pytest.param("float16", marks=pytest.mark.slow),
        "int8",
        "int8, one head",
        "two centres, three heads",
        pytest.param("rotated4, four heads", marks=pytest.mark.slow),
        pytest.param("int8 tokens", marks=pytest.mark.slow),
        "rotated4",
        "two centres",
        pytest.param("two centres, rotated", marks=pytest.mark.slow),
        pytest.param("rotated4 of 256", marks=pytest.mark.slow),
        pytest.param("rotated2", marks=pytest.mark.slow),
    ],
)
def test_interpreted_it_equals_the_reference_without_races(served, case):
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this JAX has no interpreter of Mosaic GPU kernels (0.11 has)")
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    served(lambda request: mosaic._attend(request, interpret)[0])
    fields, lengths, options, added = INTERPRETED[case]
    config, generator = config_of(**fields), np.random.default_rng(0)
    shape = (len(lengths), max(lengths), config.num_kv_heads, config.head_dim)
    keys, values = jnp.asarray(generator.standard_normal((2, *shape), np.float32))
    heads = config.num_kv_heads * (2 if config.num_kv_heads == 1 and case != "ring" else 1)
    queries = jnp.asarray(
        generator.standard_normal((len(lengths), max(added), heads, config.head_dim), np.float32)
    )
    options = {**options, "num_tokens": jnp.asarray(added)}
    cache = poisoned(jaxkv.create(config))
    for start in range(0, max(lengths), 200):  # a ring takes no more at once
        part = slice(start, start + 200)
        number = jnp.clip(jnp.asarray(lengths) - start, 0, 200)
        cache = jaxkv.append(cache, keys[:, part], values[:, part], layer=1, num_tokens=number)
        cache = jaxkv.advance(cache, number)
    cache = cache.with_lengths(jnp.asarray(lengths) - jnp.asarray(added))
    expected, actual = (
        jit(functools.partial(jaxkv.attend, layer=1, implementation=name, **options))(
            cache, queries
        )
        for name in ("reference", "mosaic")
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5 if config.codec.levels is None else 5e-5)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        jaxkv.Rope.of(1e4, rotary_dim=64),
        jaxkv.Rope.of(1e4, rotary_dim=32),
        jaxkv.Rope.of(5e5, rotary_dim=64, interleaved=True),
    ],
)
def test_scores_of_centres_are_a_table_times_what_turns(rope):
    """Up to 20,000 tokens, where a tile's number has two digits; in float64 as the kernel does."""
    generator, batch, group, dim = np.random.default_rng(0), 2, 2, 64
    config = config_of(
        batch_size=batch,
        max_context_length=20032,
        codec=jaxkv.Centred(jaxkv.Int8(), rope=rope),
    )
    state = {
        name: jnp.asarray(generator.standard_normal(array.shape, np.float32))
        for name, array in jax.eval_shape(lambda: jaxkv.create(config)).codec_state.items()
    }
    cache = dataclasses.replace(jaxkv.create(config), codec_state=state)
    queries = generator.standard_normal((batch, 1, 2 * group, dim), np.float32)
    request = request_of(cache, jnp.asarray(queries), 1)
    turning = mosaic_centres.turning_of(request)
    of_centres = jnp.moveaxis(request.offset_queries, 4, 2).reshape(batch, 2, 2, group, -1)
    made = mosaic_centres.centres_of(request, turning, mosaic._columns(of_centres))
    with_cos, with_sin = np.moveaxis(np.asarray(made.columns, np.float64), 2, 0)[..., :4, :]
    high, low = np.asarray(made.table, np.float64)
    cosines, sines = (high + low / mosaic_plan.LOW_STEPS) / 127
    for position in (0, 63, 64, 200, 8191, 8192, 12345, 19999):
        tile, slot = divmod(position, mosaic_plan.TILE)
        cos, sin = with_cos, with_sin
        digits = mosaic_centres.tile_digits(tile, turning)
        for turns, digit in zip(np.asarray(made.turns, np.float64), digits, strict=True):
            by_cos, by_sin = turns[digit]
            cos, sin = cos * by_cos + sin * by_sin, sin * by_cos - cos * by_sin
        found = (cos * cosines[slot] + sin * sines[slot]).sum(-1).reshape(batch, 2, 2, group)
        keys = np.stack([np.asarray(state[name][1, 0], np.float64) for name in ("means", "sinks")])
        if rope is not None:
            turn = np.exp(1j * position * np.asarray(rope.frequencies))
            first, second, rest = (np.asarray(part) for part in rope.pairs(keys))
            pairs = (first + 1j * second) * turn
            keys = np.asarray(rope.joined(pairs.real, pairs.imag, rest))
        grouped = queries[:, 0].reshape(batch, 2, group, dim) * dim**-0.5
        expected = np.einsum("bkgd,ckd->bkcg", grouped, keys)
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("window", [None, 2, 15, 70])
@pytest.mark.parametrize("ring", [(20, 3, 44), (20, 0, 8), (60, 5, 3), (1, 3, 64)])
def test_the_visible_slots_of_a_ring_are_a_range_with_a_gap(ring, window):
    lengths = np.arange(200, dtype=np.int32)
    added = (lengths % 7 != 6).astype(np.int32)  # some rows are padding
    config = config_of(
        num_layers=1, batch_size=200, max_context_length=150, addressing=jaxkv.Ring(*ring)
    )
    shapes = jax.eval_shape(lambda: jaxkv.create(config))

    @jit
    def bounds_and_visible(taken_back):
        index = config.addressing.init(150, 200).with_lengths(lengths + taken_back)
        cache = dataclasses.replace(shapes, index=index.with_lengths(jnp.asarray(lengths)))
        request = request_of(cache, jnp.ones((200, 1, 2, 64)), 0, added, window=window)
        return mosaic.visible_slots(request), request.visible(0, index.extent)[:, 0, 0, 0]

    for taken_back in (0, 1, ring[2], 120):  # and more than it can
        bounds, visible = jax.tree.map(np.asarray, bounds_and_visible(np.int32(taken_back)))
        low, high, gap, gap_end = (bound[:, None] for bound in bounds)
        slots = np.arange(visible.shape[-1])
        found = (slots >= low) & (slots < high) & ~((slots >= gap) & (slots < gap_end))
        np.testing.assert_array_equal(found, visible)
        assert ((low <= gap) & (gap_end <= high) | (gap == gap_end)).all()


def test_its_gradient_is_the_blockwise_one(served):
    served()
    config = config_of(codec=jaxkv.Int8(), num_kv_heads=8)
    cache = jaxkv.append(jaxkv.create(config), *jnp.ones((2, 1, 8, 64)), layer=0)
    queries = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 64), np.float32))

    def tangent(name):
        run = functools.partial(jaxkv.attend, cache, layer=0, implementation=name)
        return jax.jvp(run, (queries,), (queries,))[1]

    np.testing.assert_array_equal(tangent("mosaic"), tangent("blockwise"))


numbers = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=30, deadline=None)
@given(st.lists(numbers, min_size=16, max_size=16))
def test_queries_in_two_parts_keep_16_bits(row):
    queries = jnp.asarray(row, jnp.float32).reshape(8, 2)
    high, low, step = kernel_queries.in_two_bytes(queries)
    assert jnp.abs(jnp.stack([high, low])).max() <= 127
    whole = (high * kernel_queries.LOW_STEPS + low) * step
    largest = jnp.abs(queries).max(axis=0)
    assert (jnp.abs(whole - queries) <= largest * 2**-15 + 1e-30).all()
    high, low = kernel_queries.in_two_parts(queries, jnp.bfloat16)
    assert high.dtype == low.dtype == jnp.bfloat16
    whole = high.astype(jnp.float32) + low.astype(jnp.float32)
    np.testing.assert_allclose(whole, queries, rtol=2**-16, atol=1e-37)


@pytest.mark.parametrize("codec", [jaxkv.Dense("bfloat16"), jaxkv.Int8(), jaxkv.Rotated(4)])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "extent"), [(1, 8, 64), (1, 8, 1 << 20), (64, 32, 4096)]
)
def test_parts_fit_a_multiprocessor(batch, kv_heads, extent, codec):
    shape = {"batch_size": batch, "num_kv_heads": kv_heads, "max_context_length": extent}
    config = config_of(**shape, codec=codec, head_dim=128)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    splits, stages = mosaic_plan.parts(cache, rows=16)
    assert 1 <= splits <= mosaic_plan.MOST_PARTS
    assert splits >= min(extent // 8192, mosaic_plan.MOST_PARTS)
    assert stages >= 2


# Microseconds on an H200 say so: of 8 lists and 1,000 tokens 7.1 with 8 parts and 10.4 with 16.
@pytest.mark.parametrize(
    ("batch", "context", "codec", "expected"),
    [
        (1, 1280, jaxkv.Dense("bfloat16"), 8),
        (1, 1280, jaxkv.Int8(), 8),
        (1, 4352, jaxkv.Dense("bfloat16"), 8),
        (1, 16640, jaxkv.Dense("bfloat16"), 16),
        (8, 4352, jaxkv.Dense("bfloat16"), 2),
        (8, 4352, jaxkv.Int8(), 6),
        (8, 4352, jaxkv.Rotated(4), 8),
        (64, 1280, jaxkv.Dense("bfloat16"), 1),
    ],
)
def test_a_short_context_is_cut_into_few_parts(batch, context, codec, expected):
    shape = {"batch_size": batch, "num_kv_heads": 8, "max_context_length": context}
    cache = jax.eval_shape(lambda: jaxkv.create(config_of(**shape, codec=codec, head_dim=128)))
    assert mosaic_plan.parts(cache, rows=16)[0] == expected


def test_the_polynomial_gives_the_levels_of_four_bits():
    """As the GPU computes it: a rounding to bfloat16 a step, and fused products."""
    levels = pytest.importorskip("jaxkv.attention.mosaic.levels")

    def rounded(exact):
        return np.asarray(exact, jnp.bfloat16).astype(np.float64)

    t = rounded(rounded(16 + np.arange(16)) - 23.5)
    square = rounded(t * t)
    more = rounded(rounded(square * levels.C + levels.B) * square + levels.A)
    found = rounded(t * 10 + rounded(rounded(more * t + 192) - 192))
    assert tuple(found) == jaxkv.Rotated(4).levels
