"""Attention by cuDNN, as far as a machine without a GPU can tell.

The maths is played with a plain softmax in cuDNN's place, in float32 so that it is held to the same
bounds as the other forms. `tests/gpu` compiles it for a GPU, `python -m benchmarks accelerator`
runs it on one.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.attention.cudnn import attend as cudnn
from jaxkv.attention.cudnn import call as cudnn_call
from jaxkv.attention.cudnn import slots as cudnn_slots
from tests.oracle import (
    OPTIONS,
    Oracle,
    attention,
    jit,
    padded,
    poisoned,
    random_step,
    shuffled,
    step,
)


def plain_call(
    queries, *, keys, values, query_counts, key_counts, causal=False, window=None, tables=None
):
    """What cuDNN computes; and what it leaves to its callers.

    Values behind the last key are multiplied by zero, and NaN stays. Rows that nobody asked for, or
    that see no key, get a logsumexp that says nothing.
    """
    if tables is not None:
        assert keys.shape[1] & (keys.shape[1] - 1) == 0
        assert keys.shape[1] * tables[0].shape[1] % 128 == 0, "it reads beyond the table"
        keys, values = (
            pool[table].reshape(len(queries), -1, *pool.shape[2:])
            for pool, table in zip((keys, values), tables, strict=True)
        )
    group = queries.shape[2] // keys.shape[2]
    keys, values = (jnp.repeat(side, group, axis=2) for side in (keys, values))
    keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    query, key = jnp.arange(queries.shape[1])[:, None], jnp.arange(keys.shape[1])
    seen = key < key_counts[:, None, None]
    if causal:
        seen &= key <= query
    if window is not None:
        assert causal
        seen &= key > query - window
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * queries.shape[-1] ** -0.5
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    highest = jnp.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1)
    output = jnp.einsum("bhts,bshd->bthd", weights, values)
    output /= jnp.where(total == 0, 1, total).swapaxes(1, 2)[..., None]
    logsumexp = jnp.where(total == 0, 0, highest[..., 0] + jnp.log(total))
    asked = jnp.arange(queries.shape[1]) < query_counts[:, None]
    output = jnp.where((asked & (key_counts > 0)[:, None])[..., None, None], output, 0)
    return output, jnp.where(asked[:, None], logsumexp, -jnp.inf)


@pytest.fixture
def served(monkeypatch):
    """As if the CPU were the GPU, with the plain softmax in cuDNN's place."""
    fields = {"cannot_read": cudnn.cannot_read, "platform": "cpu"}
    for name, other in (("cudnn", fields), ("native", {"platform": "gpu"})):
        row = IMPLEMENTATIONS[name]._replace(**other)
        monkeypatch.setitem(IMPLEMENTATIONS, name, row)
    monkeypatch.setattr(cudnn_call, "call", plain_call)
    for module in (cudnn, cudnn_slots):
        monkeypatch.setattr(module, "number_type", lambda codec: jnp.dtype("float32"))
    yield
    cudnn._merged.clear_cache()
    run_layer.clear_cache()


@pytest.fixture(params=["old pieces apart", "all together"])
def served_in_parts(served, monkeypatch, request):
    """Large contexts are read in parts, and those that a chunk all but fills are not."""
    if request.param == "old pieces apart":
        monkeypatch.setattr(cudnn, "_PAIRS_PER_TOKEN", 0)


# Each step's width, and how many of its tokens are real in each sequence. Pieces of 8 slots fill
# within a step, at the end of one, and while tokens come one at a time.
STEPS = [(9, (9, 2, 0)), (9, (5, 9, 8)), (1, (1, 0, 1)), (1, (1, 1, 1)), (9, (2, 9, 0))]
SHAPE = {"num_layers": 2, "max_context_length": 24, "num_kv_heads": 2, "head_dim": 8}
ROPE = jaxkv.Rope.of(100.0, rotary_dim=4)
CACHES = {
    "bfloat16": {},
    "float16 pages": {"codec": jaxkv.Dense("float16"), "addressing": jaxkv.Paged(8)},
    # Not in pieces of eight: pages are gathered, and rows padded.
    "small pages": {"addressing": jaxkv.Paged(4)},
    "odd context": {"max_context_length": 25},
    "int8": {"codec": jaxkv.Int8()},
    "rotated4 pages": {"codec": jaxkv.Rotated(4), "addressing": jaxkv.Paged(8)},
    "keys and values": {"codec": jaxkv.KeysValues(jaxkv.Rotated(4), jaxkv.Int8())},
    "centred": {"codec": jaxkv.Centred(jaxkv.Rotated(4), ROPE), "max_context_length": 25},
    "ring": {"addressing": jaxkv.Ring(window=6, sinks=2, chunk=9)},
    "ring of codes": {"codec": jaxkv.Int8(), "addressing": jaxkv.Ring(window=4, chunk=9)},
    "wide ring": {"addressing": jaxkv.Ring(window=100, sinks=1, chunk=9)},
    "windowed pages": {"addressing": jaxkv.Paged(8, window=6)},
}
CASES = [("bfloat16", "plain"), ("rotated4 pages", "sinks"), ("ring", "window")]
RARER = [(cache, "plain") for cache in CACHES] + [("bfloat16", options) for options in OPTIONS]
RARER += [("ring", "sinks"), ("int8", "sinks"), ("small pages", "window")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in RARER if case not in CASES]
OPTIONS_OF = {name: {k: v for k, v in o.items() if k != "softcap"} for name, o in OPTIONS.items()}


@functools.partial(jit, static_argnames="options")
def run_layer(options, cache, layer, queries, keys, values, num_tokens):
    cache = jaxkv.append(cache, keys, values, layer=layer, num_tokens=num_tokens)
    given = {"layer": layer, "num_tokens": num_tokens, **OPTIONS_OF[options]}
    return cache, jaxkv.attend(cache, queries, implementation="cudnn", **given)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_it_equals_the_oracle(served_in_parts, kind, options):
    check(jaxkv.KVCacheConfig(**(SHAPE | CACHES[kind]), batch_size=3), options)


@pytest.mark.parametrize("kind", ["bfloat16", "odd context", "int8"])
def test_cross_attention_equals_the_oracle(served, kind):
    """One query, and several that all see what was written: whole pieces, parts of one, none."""
    own = jaxkv.KVCacheConfig(**(SHAPE | CACHES[kind]), batch_size=5)
    text = own.replace(max_context_length=8)
    config = jaxkv.HybridConfig((text,), (0, 0), cross=(own,), cross_of_layer=(0, 0))
    lengths = np.array([0, 3, 8, 17, 24], np.int32)
    cache = jaxkv.create(config)
    cache = dataclasses.replace(cache, cross=(poisoned(cache.cross[0]),))
    _, keys, values = random_step(own, 24, heads=2)
    given = (padded(each[1], lengths, np.nan) for each in (keys, values))
    cache = jaxkv.write_cross(cache, *given, layer=1, lengths=lengths)
    oracle = Oracle(own.replace(num_layers=1))
    for tokens in (1, 5):
        queries = random_step(own, tokens, heads=4, seed=tokens)[0][1]
        outputs = jaxkv.attend_cross(cache, queries, layer=1, implementation="cudnn")
        stored = oracle._stored(0, keys[1:], values[1:], lengths)
        for row, length in enumerate(lengths):
            held = list(zip(*stored[:, row, :length], strict=True))
            for token in range(tokens):
                right = attention(queries[row, token], held) if length else np.zeros((4, 8))
                np.testing.assert_allclose(outputs[row, token], right, rtol=1e-5, atol=1e-5)
    assert "cudnn: used" in jaxkv.explain(cache, tokens=5).split("cross-attention")[1]
    seen = jnp.ones((5, 5), jnp.int32)
    with pytest.raises(ValueError, match="it serves no num_seen of several queries"):
        jaxkv.attend_cross(cache, queries, layer=1, num_seen=seen, implementation="cudnn")


def test_of_a_single_sequence_it_equals_the_oracle(served):
    check(jaxkv.KVCacheConfig(**SHAPE), "plain")


def check(config, options):
    cache, oracle = shuffled(poisoned(jaxkv.create(config))), Oracle(config)
    for number, (width, counts) in enumerate(STEPS):
        arrays = random_step(config, width, heads=4, seed=number)
        num_tokens = np.array(counts if config.batch_size else counts[0], np.int32)
        expected = oracle.step(*arrays, num_tokens, **OPTIONS_OF[options])
        arrays = [padded(array, num_tokens, np.nan) for array in arrays]
        run = functools.partial(run_layer, options)
        cache, outputs = step(cache, *arrays, num_tokens, run=run)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert not np.any(np.where(expected == 0, outputs, 0)), "padding must give exact zeros"


def test_the_old_tokens_are_read_apart_where_queries_are_few(served, monkeypatch):
    """Two parts of the old pieces, of which the second has fewer, or none."""
    calls = []

    def seen_call(queries, **options):
        calls.append(queries.shape)
        return plain_call(queries, **options)

    monkeypatch.setattr(cudnn_call, "call", seen_call)
    monkeypatch.setattr(cudnn, "_BLOCKS", 4)
    monkeypatch.setattr(cudnn, "_PAIRS_PER_TOKEN", 0)
    fields = SHAPE | {"max_context_length": 64, "addressing": jaxkv.Paged(8), "batch_size": 1}
    config = jaxkv.KVCacheConfig(**fields)
    cache, oracle = jaxkv.create(config), Oracle(config)
    for width in (3, 3, 20, 3):
        arrays = random_step(config, width, heads=4, seed=width)
        run = functools.partial(run_layer, "sinks")
        cache, outputs = step(cache, *arrays, np.int32(width), run=run)
        expected = oracle.step(*arrays, **OPTIONS_OF["sinks"])
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    # Queries of two heads, a group's one after the other, two times; and those of all four heads.
    assert {(2, 3 * 2, 2, 8), (1, 3 + 7, 4, 8)} <= set(calls)


@pytest.mark.parametrize(("context", "parts"), [(2048, 1), (3072, 1), (4096, 2)])
def test_a_chunk_that_all_but_fills_the_cache_is_one_part(served, monkeypatch, context, parts):
    calls = []

    def seen_call(queries, **options):
        calls.append(queries.shape)
        return plain_call(queries, **options)

    monkeypatch.setattr(cudnn_call, "call", seen_call)
    config = jaxkv.KVCacheConfig(1, context, 2, 8, batch_size=1)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    queries = jax.ShapeDtypeStruct((1, 2048, 4, 8), jnp.bfloat16)
    jax.eval_shape(functools.partial(jaxkv.attend, layer=0, implementation="cudnn"), cache, queries)
    assert len(calls) == parts


def test_queries_past_the_end_of_the_cache_get_nothing_and_take_nothing(served):
    """Inside jit they cannot be refused; `check` tells of them."""
    config = jaxkv.KVCacheConfig(**SHAPE, batch_size=2)
    queries, keys, values = (part[0] for part in random_step(config, 24, heads=4))
    cache = jaxkv.append(jaxkv.create(config), keys, values, layer=0)
    cache = cache.with_lengths(jnp.array([20, 3]))
    attend = functools.partial(jaxkv.attend, cache, layer=0)
    found = jit(functools.partial(attend, implementation="cudnn"))(queries[:, :9])
    expected = attend(queries[:, :4], implementation="reference")
    np.testing.assert_allclose(found[:, :4], expected, rtol=1e-5, atol=1e-5)
    assert not found[0, 4:].any()
    assert found[1, 4:].any()


def test_a_pool_that_rows_share_is_decoded_once(served):
    """Each page once, which is less than what all rows might hold."""
    pages = jaxkv.Paged(8, num_pages=4)
    config = jaxkv.KVCacheConfig(**SHAPE, batch_size=3, codec=jaxkv.Int8(), addressing=pages)
    single = jaxkv.create(config.replace(batch_size=1, addressing=jaxkv.Paged(8)))
    keys, values, queries = (
        part[0] for part in random_step(config.replace(batch_size=1), 19, heads=2)
    )
    single = jaxkv.append(single, keys, values, layer=0)
    pool = jaxkv.create(config)
    storage = {
        name: leaf.at[:, :, 8:32].set(single.storage[name]) for name, leaf in pool.storage.items()
    }
    table = jnp.tile(jnp.array([[1, 2, 3]]), (3, 1))
    pool = dataclasses.replace(pool, storage=storage).with_pages(table, jnp.array([17, 18, 17]))
    assert cudnn_slots.pieces_of(pool, 0).keys.shape == (4, 8, 2, 8)
    number = jnp.array([2, 1, 0])
    outputs = jaxkv.attend(
        pool, jnp.tile(queries[:, 17:], (3, 1, 1, 1)), layer=0, num_tokens=number,
        implementation="cudnn",
    )  # fmt: skip
    expected = jaxkv.attend(single, queries, layer=0, implementation="reference")[0]
    np.testing.assert_allclose(outputs[0], expected[17:], atol=1e-5)
    np.testing.assert_allclose(outputs[1, 0], attended(single, queries[:, 17], 19)[0], atol=1e-5)
    assert not outputs[2].any()


def attended(cache, query, tokens):
    """One query over the first so many tokens."""
    cache = cache.with_lengths(jnp.array([tokens - 1]))
    return jaxkv.attend(cache, query[:, None], layer=0, implementation="reference")[0]


REASONS = {
    "float32": ({"codec": jaxkv.Dense("float32")}, "16 bits, and this cache keeps float32"),
    "half of it": (
        {"codec": jaxkv.KeysValues(jaxkv.Dense("float32"), jaxkv.Int8())},
        "16 bits, and this cache keeps float32",
    ),
    "kept": ({"addressing": jaxkv.Kept(8, 16, 2, 2)}, "it cannot read kept caches"),
    "head_dim": ({"head_dim": 12}, "head_dim is 12, and it takes multiples of 8 up to 256"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_it_cannot_read(case):
    fields, reason = REASONS[case]
    assert reason in cudnn.cannot_read(jaxkv.create(jaxkv.KVCacheConfig(**(SHAPE | fields))), 5)


def test_explain_says_who_serves(served):
    config = jaxkv.KVCacheConfig(1, 4096, 8, 128)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    assert "cudnn: used" in jaxkv.explain(cache, tokens=64)
    assert "cudnn: not used, it has no softcap" in jaxkv.explain(cache, tokens=64, softcap=50.0)
    ring = config.replace(addressing=jaxkv.Ring(window=1024))
    ring = jax.eval_shape(lambda: jaxkv.create(ring))
    assert "cudnn: used" in jaxkv.explain(ring, tokens=1)
    assert "cudnn: used" in jaxkv.explain(ring, tokens=128)
    reason = "8 queries would stand behind a window of 1024 rows without one"
    assert f"cudnn: not used, {reason}" in jaxkv.explain(ring, tokens=8)
    with pytest.raises(ValueError, match="'cudnn' cannot serve this call: it has no softcap"):
        jaxkv.attend(
            jaxkv.create(config), jnp.ones((1, 8, 128)), layer=0, softcap=1.0,
            implementation="cudnn",
        )  # fmt: skip


def test_its_gradient_is_the_blockwise_one(served):
    config = jaxkv.KVCacheConfig(**SHAPE, codec=jaxkv.Rotated(4))
    cache = jaxkv.append(jaxkv.create(config), *jnp.ones((2, 3, 2, 8)), layer=0)
    queries = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 8), np.float32))

    def tangent(name):
        run = functools.partial(jaxkv.attend, cache, layer=0, implementation=name)
        return jax.jvp(run, (queries,), (queries,))[1]

    np.testing.assert_allclose(tangent("cudnn"), tangent("blockwise"), atol=1e-6)


def lowered(config, tokens, **options):
    """For a GPU, with the real call: its text, and the settings of each call of cuDNN."""
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    dtypes = {name: spec[1] for name, spec in config.codec.leaves(config.head_dim).items()}
    storage = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in cache.storage.items()
    }
    queries = jax.ShapeDtypeStruct((*config.batch_shape, tokens, 4, config.head_dim), jnp.bfloat16)
    run = functools.partial(jaxkv.attend, layer=1, implementation="cudnn", **options)
    traced = jax.jit(run).trace(dataclasses.replace(cache, storage=storage), queries)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @__cudnn\$fmhaSoftmax\(.*?backend_config = "(.*?)", op', text)
    settings = [json.loads(one.replace("\\22", '"')) for one in found]
    return text, [one["cudnn_fmha_backend_config"] for one in settings]


def test_it_lowers_to_calls_that_read_the_cache_in_place(monkeypatch):
    row = IMPLEMENTATIONS["cudnn"]._replace(cannot_read=cudnn.cannot_read)
    monkeypatch.setitem(IMPLEMENTATIONS, "cudnn", row)
    config = jaxkv.KVCacheConfig(
        2, 256, 2, 64, batch_size=2, addressing=jaxkv.Paged(16, num_pages=32)
    )
    text, (old, rest) = lowered(config, 8)
    assert (old["mask_type"], old["is_paged_attention"]) == ("PADDING", True)
    assert (rest["mask_type"], rest["is_paged_attention"]) == ("PADDING_CAUSAL", False)
    # All layers, keys and values of the pool as pieces: a view, and no gather of that size.
    assert "tensor<2x2x512x2x64xbf16>) -> tensor<128x16x2x64xbf16>" in text
    assert old["fmha_scale"] == 64**-0.5
    ring = config.replace(addressing=jaxkv.Ring(window=32, chunk=32))
    _, (only,) = lowered(ring, 8)
    assert (only["mask_type"], only["sliding_window_length"]) == ("PADDING_CAUSAL", 32)
