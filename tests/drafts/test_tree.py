"""Trees of tokens: each branch sees what it would see alone, and the one that is kept is all."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.attention import IMPLEMENTATIONS
from tests.compiled import assert_in_place, compile_donating
from tests.oracle import (
    EACH_ONCE,
    KINDS,
    Oracle,
    assert_same_storage,
    jit,
    layer_step,
    poisoned,
    random_step,
    run_step,
    shuffled,
    step,
)

BEFORE, TOKENS, ROWS = (6, 2, 5), 5, 3
# At which a window ends within a tree, a ring turns and pages end.
SMALL = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(window=4, sinks=1, chunk=6),
    "chunked": jaxkv.Chunked(size=4, chunk=6),
    "paged": jaxkv.Paged(page_size=4),
}
assert SMALL.keys() == ADDRESSINGS.keys(), "give a new addressing its row here"
SMALL["kept"] = jaxkv.Kept(tokens=2, new=14, num_layers=2, num_kv_heads=2)  # which evicted nothing
ROPELESS = KINDS | {"rotated2-centred": jaxkv.Centred(jaxkv.Rotated(2))}


def config_of(codec="float32", addressing="contiguous", **fields):
    kind = {"codec": ROPELESS.get(codec, codec), "addressing": SMALL.get(addressing, addressing)}
    kind["batch_size"] = ROWS
    config = jaxkv.KVCacheConfig(2, 16, 2, 16, **kind)
    return config.replace(**fields) if fields else config


def before(config):
    """A cache full of garbage but for some tokens, and an oracle that holds the same."""
    cache, oracle = shuffled(poisoned(jaxkv.create(config))), Oracle(config)
    for tokens in (max(BEFORE) - 1, 1):
        arrays = random_step(config, tokens, heads=4, seed=tokens)
        counts = np.clip(np.array(BEFORE) - np.ravel(cache.lengths), 0, tokens)
        oracle.step(*arrays, counts)
        cache = run_step(cache, *arrays, counts)[0]
    return cache, oracle


def ancestors_of(parents):
    ancestors = np.zeros((len(parents), len(parents)), bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            ancestors[token] = ancestors[parent]
            ancestors[token, parent] = True
    return ancestors


def branch(ancestors, token):
    return [*np.flatnonzero(ancestors[token]).tolist(), token]


def picked(arrays, numbers):
    """Of each sequence one token of a step's arrays."""
    return [array[:, np.arange(ROWS), numbers][:, :, None] for array in arrays]


def alone(oracle, arrays, paths, **options):
    """What the last token of each sequence's path gives after no others than those; its oracle."""
    grown, outputs = Oracle(oracle.config), None
    grown.state = list(oracle.state)
    grown.tokens = [[list(tokens) for tokens in layer] for layer in oracle.tokens]
    for number in range(max(map(len, paths))):
        of_row = [path[number] if number < len(path) else 0 for path in paths]
        real = np.array([number < len(path) for path in paths], int)
        step_outputs = grown.step(*picked(arrays, of_row), real, **options)[:, :, 0]
        outputs = step_outputs if outputs is None else outputs
        outputs = np.where(real[None, :, None, None] > 0, step_outputs, outputs)
    return outputs, grown


@functools.partial(jit, static_argnames=("name", "window"))
def layer_of_tree(cache, number, queries, keys, values, ancestors, name, window):
    cache = jaxkv.append(cache, keys, values, layer=number)
    options = {"implementation": name, "window": window, "ancestors": ancestors}
    return cache, jaxkv.attend(cache, queries, layer=number, **options)


def tree_step(cache, arrays, ancestors, name=None, window=None):
    outputs = []
    for number in range(cache.config.num_layers):
        layer = (array[number] for array in arrays)
        cache, output = layer_of_tree(cache, number, *layer, ancestors, name, window)
        outputs.append(np.asarray(output))
    return jaxkv.advance(cache, TOKENS), np.stack(outputs)


def assert_holds_the_same(actual, expected):
    """Bit for bit, wherever both hold tokens."""
    assert actual.lengths.tolist() == expected.lengths.tolist()
    places = [
        np.asarray(cache.index.key_positions(0, cache.lengths, 0, cache.index.extent))
        for cache in (actual, expected)
    ]
    places = [each[:, 0] if each.ndim == 3 else each for each in places]  # of all heads alike
    both = (places[0] == places[1]) & (places[0] >= 0)
    assert both.any(-1).all()
    for number in range(actual.config.num_layers):
        sides = zip(jaxkv.layer(actual, number), jaxkv.layer(expected, number), strict=True)
        for mine, other in sides:
            np.testing.assert_array_equal(np.asarray(mine)[both], np.asarray(other)[both])


ONCE = (hypothesis.Phase.generate,)  # a failure is told at once
# Each token's parent: any before it, or the text.
PARENTS = st.tuples(*(st.integers(-1, token - 1) for token in range(TOKENS)))
TREES = st.lists(PARENTS, min_size=ROWS, max_size=ROWS)
LAST = st.lists(st.integers(0, TOKENS - 1), min_size=ROWS, max_size=ROWS)
PLACES = {"streamed": jaxkv.HostMemory(resident=6, block=4)}
CASES = [(*pair, "blockwise") for pair in EACH_ONCE]
CASES += [("float32", addressing, "native") for addressing in SMALL]
CASES += [("int8", "ring", "native"), ("float32", "paged", "reference")]
CASES += [("float32", addressing, "streamed") for addressing in ("ring", "paged")]


@pytest.mark.full_cases(r"float16|float8|rotated[23]")
@pytest.mark.slow_cases(r"^(?!(int8-ring-blockwise|float32-paged-native)$)")
@pytest.mark.parametrize(("codec", "addressing", "name"), CASES)
def test_a_branch_sees_what_it_would_alone_and_is_kept_bit_for_bit(codec, addressing, name):
    config = config_of(codec, addressing, placement=PLACES.get(name))
    cache, oracle = before(config)
    if reason := IMPLEMENTATIONS[name].cannot_serve(cache, TOKENS):
        pytest.skip(reason)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}

    @settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=ONCE)
    @given(TREES, LAST, st.sampled_from([None, 3]))
    def holds(trees, last, window):
        ancestors = np.stack([ancestors_of(parents) for parents in trees])
        options = {} if window is None else {"window": window}
        arrays = random_step(config, TOKENS, heads=4, seed=9)
        grown, outputs = tree_step(cache, arrays, ancestors, name, window)
        for token in range(TOKENS):
            paths = [branch(of_row, token) for of_row in ancestors]
            expected, _ = alone(oracle, arrays, paths, **options)
            np.testing.assert_allclose(outputs[:, :, token], expected, **tolerance)

        paths = [branch(*pair) for pair in zip(ancestors, last, strict=True)]
        padded = [path + [-1] * (TOKENS - len(path)) for path in paths]
        kept, straight = jaxkv.keep_path(grown, np.array(padded), TOKENS), cache
        order = np.where(np.array(padded) < 0, 0, padded)
        taken = [array[:, np.arange(ROWS)[:, None], order] for array in arrays]
        straight, _ = run_step(straight, *taken, np.array([len(path) for path in paths]))
        assert_holds_the_same(kept, straight)
        _, longer = alone(oracle, arrays, paths)
        more = random_step(config, 1, heads=4, seed=10)
        _, outputs = run_step(kept, *more)
        np.testing.assert_allclose(outputs, longer.step(*more), **tolerance)

    holds()


natively = functools.partial(step, run=jit(functools.partial(layer_step, implementation="native")))


def test_attention_by_the_native_kernel_has_the_bits_of_the_branch_alone():
    config = config_of(codec="bfloat16", addressing="paged")
    cache, _ = before(config)
    if reason := IMPLEMENTATIONS["native"].cannot_serve(cache, TOKENS):
        pytest.skip(reason)
    ancestors = ancestors_of([-1, 0, 0, 1, 2])
    arrays = random_step(config, TOKENS, heads=4, seed=9)
    _, outputs = tree_step(cache, arrays, ancestors, "native")
    for token in (3, 4):
        path, straight = branch(ancestors, token), cache
        for number in path:
            one = [array[:, :, [number]] for array in arrays]
            straight, expected = natively(straight, *one)
        np.testing.assert_array_equal(outputs[:, :, token], expected[:, :, 0])


@pytest.mark.slow
def test_beside_newest_tokens():
    """The finer copies move too, as many as the ring still has."""
    config = config_of("int8", newest=jaxkv.Newest(6, jaxkv.Dense("float32")))
    cache, _ = before(config)
    arrays = random_step(config, TOKENS, heads=4, seed=9)
    ancestors = ancestors_of([-1, 0, 0, 2, 1])
    grown, outputs = tree_step(cache, arrays, ancestors)
    path = np.array([[0, 2, 3]] * ROWS)
    taken = [array[:, :, path[0]] for array in arrays]
    straight, expected = run_step(cache, *taken)
    kept = jaxkv.keep_path(grown, path, TOKENS)
    assert_holds_the_same(kept, straight)
    assert_holds_the_same(kept.newest, straight.newest)
    # In the straight step the ring still has the older tokens' finer copies.
    np.testing.assert_allclose(outputs[:, :, path[0]], expected, atol=0.05)


def test_rows_with_padding_and_paths_of_no_tokens():
    config = config_of()
    cache, _ = before(config)
    arrays = [array[0] for array in random_step(config, TOKENS, heads=4, seed=9)]
    counts = np.array([5, 0, 2])
    options = {"ancestors": ancestors_of([-1, -1, 1, 0, 2]), "num_tokens": counts}
    grown = jaxkv.append(cache, *arrays[1:], layer=0, num_tokens=counts)
    output = jaxkv.attend(grown, arrays[0], layer=0, **options)
    alone = jaxkv.attend(grown, arrays[0], layer=0, num_tokens=counts)
    assert not output[1].any()
    np.testing.assert_allclose(output[2, 0], alone[2, 0], atol=1e-6)
    kept = jaxkv.keep_path(jaxkv.advance(grown, counts), [[1, 2, 4], [-1] * 3, [-1] * 3], counts)
    assert kept.lengths.tolist() == [BEFORE[0] + 3, BEFORE[1], BEFORE[2]]


def test_positions_count_ancestors():
    cache, ancestors = before(config_of())[0], ancestors_of([-1, 0, 0, 2, -1])
    positions = jaxkv.next_positions(cache, TOKENS, ancestors=ancestors)
    assert positions.tolist() == [[n, n + 1, n + 1, n + 2, n] for n in BEFORE]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"codec": jaxkv.Centred(jaxkv.Int8(), jaxkv.Rope.of(100.0, rotary_dim=4))}, "the rope"),
        ({"newest": jaxkv.Newest(4)}, "newest= keeps 4 tokens, and the tree has 5"),
        ({"placement": jaxkv.HostMemory(4, 4)}, "HostMemory keeps 4 tokens"),
        ({"placement": jaxkv.HostMemory(8, 4, 1)}, "blocks_per_query"),
        ({"addressing": jaxkv.Kept(8, 6, 2, 2, sums=True)}, "a policy sums up"),
    ],
    ids=["rope", "newest", "resident", "blocks", "sums"],
)
def test_caches_that_are_refused(fields, reason):
    cache = jaxkv.create(config_of(**fields))
    queries, ancestors = jnp.ones((ROWS, TOKENS, 2, 16)), np.eye(TOKENS, dtype=bool)
    with pytest.raises(jaxkv.ConfigError, match=f"attend: no tree.*{reason}"):
        jaxkv.attend(cache, queries, layer=0, ancestors=ancestors)
    with pytest.raises(jaxkv.ConfigError, match=f"keep_path: no tree.*{reason}"):
        jaxkv.keep_path(cache, np.zeros((ROWS, 1), np.int32), TOKENS)


@pytest.mark.parametrize(
    ("ancestors", "message"),
    [
        (np.eye(TOKENS), "must be a bool array"),
        (np.eye(4, dtype=bool), r"\[5, 5\] or \[3, 5, 5\] here; got \[4, 4\]"),
        (~np.eye(TOKENS, dtype=bool), "token 1 of the step is said to be an ancestor of token 0"),
    ],
)
def test_ancestors_that_are_none(ancestors, message):
    cache = jaxkv.create(config_of())
    with pytest.raises((TypeError, ValueError), match=message):
        jaxkv.attend(cache, jnp.ones((ROWS, TOKENS, 2, 16)), layer=0, ancestors=ancestors)


@pytest.mark.parametrize("path", [[[2, 1]], [[0, 5]], [[-1, 0]], [[0, 0]]])
def test_paths_that_are_none(path):
    cache, _ = before(config_of())
    with pytest.raises(ValueError, match="numbers of tokens in order"):
        jaxkv.keep_path(cache, path * ROWS, 2)
    misused = jax.jit(jaxkv.keep_path)(cache, jnp.array(path * ROWS), 2)
    assert misused.misused.all()
    assert_same_storage(misused, cache)


def test_a_path_with_a_dropped_token_leaves_its_row_full():
    cache, keys = jaxkv.create(config_of(max_context_length=4)), jnp.ones((ROWS, 5, 2, 16))

    def step(cache, path):
        cache = jaxkv.advance(jaxkv.append(cache, keys, keys, layer=0), TOKENS)
        return jaxkv.keep_path(cache, path, TOKENS)

    kept = jax.jit(step)(cache, jnp.array([[0, 2], [0, 4], [3, -1]]))
    assert kept.lengths.tolist() == [2, 5, 1]
    assert kept.overflowed.tolist() == [False, True, False]


@pytest.mark.parametrize("addressing", ["paged", "ring"])
def test_the_path_moves_in_place(addressing):
    kinds = {"paged": jaxkv.Paged(16), "ring": jaxkv.Ring((1 << 18) - 127)}
    config = config_of("int8", addressing=kinds[addressing], max_context_length=1 << 18)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    path = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32)
    keep = functools.partial(jaxkv.keep_path, num_tokens=8)
    assert_in_place(compile_donating(keep, cache, path), cache, temp_share=0.03)


@pytest.mark.slow
@pytest.mark.devices(4)
def test_over_a_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "heads"))
    axes = jaxkv.Axes(batch="data", heads="heads")
    config = config_of(batch_size=2)
    arrays = random_step(config, TOKENS, heads=4, seed=9)
    ancestors = ancestors_of([-1, 0, 0, 2, 1])
    results = []
    for place in ({}, {"mesh": mesh, "axes": axes}):
        cache, outputs = tree_step(jaxkv.create(config, **place), arrays, ancestors, "blockwise")
        cache = jaxkv.keep_path(cache, [[0, 2, 3], [0, 1, -1]], TOKENS)
        results.append((outputs, cache.lengths, *jaxkv.layer(cache, 1)))
    for mine, other in zip(*results, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_explain_says_who_serves_trees():
    lines = jaxkv.explain(jaxkv.create(config_of()), tokens=8, tree=True).splitlines()
    assert "reference: used" in lines or "native: used" in lines
    with pytest.raises(ValueError, match="mosaic"):
        jaxkv.attend(
            jaxkv.create(config_of()),
            jnp.ones((ROWS, TOKENS, 2, 16)),
            layer=0,
            ancestors=np.eye(TOKENS, dtype=bool),
            implementation="mosaic",
        )
