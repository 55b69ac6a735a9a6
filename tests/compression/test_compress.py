"""Compression keeps what was chosen, as it was stored, and lets go of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import CODECS
from jaxkv.compression import adaptive, pyramid, score
from jaxkv.compression.budgets import limits_of
from jaxkv.compression.scoring import held
from jaxkv.policies import POLICIES, HeavyHitters, KeyDiff, SinksAndRecent, select
from tests.compression.layouts import KV_HEADS, LAYERS, LENGTHS, Filled, positions_of, run_step
from tests.oracle import EACH_ONCE, jit, random_step

BY_HEAD = np.array([[2, 6], [5, 3]])
KEEPS = {"a head": 4, "a layer": (6, 3), "by head": BY_HEAD, "a share": 0.4}


@jit
def all_scores(keys, values, queries, positions):
    """By policy, of all layers and sequences; of the same shapes whatever codec and addressing."""
    return {
        name: jax.vmap(jax.vmap(policy))(keys, values, queries, positions)
        for name, policy in POLICIES.items()
    }


@pytest.mark.slow_cases(r"^(?!int8-contiguous)")
@pytest.mark.parametrize(
    ("codec", "addressing"), [kind for kind in EACH_ONCE if kind[1] not in ("ring", "chunked")]
)
def test_every_policy_keeps_the_codes_of_what_it_chose(codec, addressing):
    filled = Filled(codec, addressing, batch_size=2)
    cache = filled.cache
    layers = [held(cache, layer, filled.queries[layer]) for layer in range(LAYERS)]
    compress = jit(lambda scores: jaxkv.compress(cache, scores, keep=4, new=3, sinks=1))
    for name, scores in all_scores(*map(jnp.stack, zip(*layers, strict=True))).items():
        small = compress(scores)
        assert small.lengths.tolist() == LENGTHS.tolist()
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(small)) == (
            small.config.size_bytes + small.config.index_bytes
        )
        for layer in range(LAYERS):
            before, after = positions_of(cache, layer), positions_of(small, layer)
            expected = selected(scores[layer], before)
            np.testing.assert_array_equal(after[..., 3:], expected, err_msg=name)
            for leaf in cache.storage:
                rows = stored(cache, leaf, layer), stored(small, leaf, layer)
                for sequence in range(2):
                    for head in range(KV_HEADS):
                        old, new = (row[:, sequence, :, head] for row in rows)
                        moved = old[:, after[sequence, head, 3:]]
                        assert moved.tobytes() == new[:, 3:7].tobytes(), (name, leaf)


@jit
@jax.vmap
def selected(scores, positions):
    return select(scores, positions, 4, sinks=1)[1]


def stored(cache, leaf, layer):
    return np.asarray(cache.index.read(cache.storage[leaf], layer, 0, cache.index.extent))


@pytest.mark.slow_cases(r"head-pages|single|head-batch-0")
@pytest.mark.parametrize(
    ("keep", "kind", "newest"),
    [
        *(("a head", "pages", 0), ("a layer", "single", 0), ("a share", "batch", 0)),
        *(("by head", "batch", 0), ("a head", "pages", 3), ("a layer", "single", 7)),
        ("by head", "batch", 3),
    ],
)
def test_attention_is_over_exactly_the_tokens_kept(keep, kind, newest):
    """And over the newest, where they are kept by a finer codec too, whatever a policy drops."""
    addressing = "paged" if kind == "pages" else "contiguous"
    batch_size = None if kind == "single" else 2
    filled = Filled(addressing=addressing, batch_size=batch_size, newest=newest)
    small = jaxkv.compress(filled.cache, SinksAndRecent(1), keep=KEEPS[keep], new=2, sinks=1)
    for seed in range(2):
        small, output, expected = filled.next_step(small, seed)
        np.testing.assert_allclose(output, expected, atol=1e-5)
    with pytest.raises(jaxkv.CacheFullError, match=r"jaxkv\.evict"):
        jaxkv.advance(small, 1)
    # The same from what is left after a rollback, and then after a second compression.
    small = filled.one_token_less(small)
    small, output, expected = filled.next_step(small, 3)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    if keep == "a head":
        small = jaxkv.compress(small, SinksAndRecent(1), keep=3, new=1)
        small, output, expected = filled.next_step(small, 4)
        np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [11, np.full((2, 2), 11)], ids=["a head", "by head"])
def test_codecs_with_a_space_of_their_own_are_read_as_before(keep):
    """Where nothing is dropped, rotated and centred vectors give what they gave."""
    filled = Filled("rotated4-centred", head_dim=32)
    small = jaxkv.compress(filled.cache, SinksAndRecent(1), keep=keep, new=1)
    arrays = random_step(filled.cache.config, 1, heads=4, seed=1)
    expected = run_step(filled.cache, *arrays)[1]
    np.testing.assert_allclose(run_step(small, *arrays)[1], expected, atol=1e-5)


def test_a_rollback_before_the_choice_forgets_what_was_kept_of_later():
    filled = Filled()
    small = jaxkv.compress(filled.cache, SinksAndRecent(1), keep=5, new=3, sinks=0)
    assert sorted(positions_of(small, 0)[0]) == [-1, -1, -1, 0, 7, 8, 9, 10]
    small = jaxkv.truncate(small, 9)
    for seed in range(3):
        small, output, expected = filled.next_step(small, seed)
        np.testing.assert_allclose(output, expected, atol=1e-5)
    assert sorted(positions_of(small, 0)[0]) == [-1, -1, 0, 7, 8, 9, 10, 11]


@pytest.mark.slow
def test_a_fork_of_a_compressed_cache_goes_on_alone():
    filled = Filled(addressing="paged")
    compress = jit(
        lambda cache, queries: jaxkv.compress(cache, HeavyHitters(), keep=4, new=2, queries=queries)
    )
    small = compress(filled.cache, filled.queries)
    both = jaxkv.fork(small, 2)
    assert both.config.index_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(both.index))
    for layer in range(LAYERS):
        forks = positions_of(both, layer)
        np.testing.assert_array_equal(forks, np.stack([positions_of(small, layer)] * 2))
        keys, _ = jaxkv.layer(both, layer)
        np.testing.assert_array_equal(keys[0], keys[1])
        np.testing.assert_array_equal(keys[0], jaxkv.layer(small, layer)[0])


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_memory_is_freed(codec, share):
    """Positions and slots for new tokens included, and where one head takes most of it."""
    config = jaxkv.KVCacheConfig(2, 1024, 2, 128, codec=CODECS[codec])
    keep = int(share * 1020)
    uneven = np.array([[2 * keep - 8, 8], [keep, keep]])
    for budget in (keep, uneven, pyramid(2, keep, least=keep // 2)):
        scores = jnp.zeros((2, 2, 1024))
        small = jax.eval_shape(
            lambda budget=budget, scores=scores: jaxkv.compress(
                jaxkv.advance(jaxkv.create(config), 1020), scores, keep=budget, new=4
            )
        )
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(small))
        assert held <= (share + 0.05) * config.size_bytes
        assert held == small.config.size_bytes + small.config.index_bytes


def against_the_protected(keys, values, queries, positions):
    """A policy that must have every token but the first two and the newest two."""
    protected = (positions < 2) | (positions > positions.max() - 2)
    return jnp.where(protected, jnp.nan, jnp.inf)


@pytest.mark.parametrize("keep", ["a head", "a layer", "by head"])
def test_sinks_and_recent_tokens_stay_whatever_a_policy_says(keep):
    """When a cache is compressed, and each time that it evicts."""
    policy, cache = against_the_protected, Filled().cache
    budgets = {"a head": 5, "a layer": (6, 4)}
    if keep == "by head":
        scores = jnp.where(
            jnp.arange(16) % 9 < 2, jnp.nan, jnp.full((LAYERS, KV_HEADS, 16), jnp.inf)
        )
        budgets[keep] = adaptive(cache, scores, 5, least=0.8, across_layers=True)
    options = {"sinks": 2, "recent": 2}
    compress = jit(
        lambda cache: jaxkv.compress(cache, policy, keep=budgets[keep], new=2, **options)
    )
    evict = jit(lambda cache: jaxkv.evict(jaxkv.advance(cache, 2), policy, tokens=2, **options))
    small, limits = compress(cache), limits_of(cache, budgets[keep])
    for length in (11, 13, 15):
        for layer in range(LAYERS):
            for positions, limit in zip(positions_of(small, layer), limits[layer], strict=True):
                kept = {*positions[positions >= 0].tolist()}
                assert len(kept) == limit
                assert kept >= {0, 1, length - 2, length - 1}
        small = evict(small) if length < 15 else small


@pytest.mark.parametrize("number", [np.inf, np.nan, -np.inf])
def test_heads_whose_scores_are_equal_share_alike(number):
    cache = Filled().cache
    budgets = adaptive(cache, jnp.full((LAYERS, KV_HEADS, 16), number), 4, across_layers=True)
    assert budgets.tolist() == [[4, 4], [4, 4]]


def test_adaptive_budgets_follow_the_scores():
    filled = Filled(batch_size=2)
    scores = np.array(score(filled.cache, KeyDiff()))
    scores[0, 0, 1] += 10
    budgets = adaptive(filled.cache, jnp.asarray(scores), 4, least=0.5)
    assert (budgets.sum(axis=-1) == 8).all()
    assert budgets[0, 0].tolist() == [2, 6]
    assert budgets.min() >= 2


def test_heads_of_all_layers_share_a_budget_of_each_sequence():
    cache = Filled(batch_size=2).cache
    scores = np.random.default_rng(0).standard_normal((LAYERS, 2, KV_HEADS, 16))
    scores[1, 0] += 1  # the second layer matters more to the first sequence
    budgets = adaptive(cache, jnp.asarray(scores), 4, least=0, across_layers=True)
    ranked = np.where(positions_of(cache, 0) >= 0, scores, -np.inf)
    for sequence in range(2):
        highest = np.sort(ranked[:, sequence].ravel())[-4 * LAYERS * KV_HEADS]
        expected = (ranked[:, sequence] >= highest).sum(axis=-1)
        np.testing.assert_array_equal(budgets[:, sequence], expected)
    assert budgets[0, 0].sum() < budgets[1, 0].sum()
    small = jaxkv.compress(cache, jnp.asarray(scores), keep=budgets, new=2, sinks=0)
    for layer in range(LAYERS):
        kept = (positions_of(small, layer) >= 0).sum(axis=-1)
        np.testing.assert_array_equal(kept, budgets[layer])


def test_layers_that_slide_stay_as_they_are():
    full = jaxkv.KVCacheConfig(1, 64, 1, 4)
    config = jaxkv.HybridConfig(
        (full.replace(addressing=jaxkv.Ring(4, chunk=64)), full), group_of_layer=(0, 1)
    )
    cache = jaxkv.advance(jaxkv.create(config), 40)
    small = jaxkv.compress(cache, SinksAndRecent(), keep=(9, 6), new=3)
    assert small.groups[0] is cache.groups[0]
    assert small.config.group_of_layer == (0, 1)
    assert (small.groups[1].index.positions >= 0).sum() == 6


REFUSED = {
    "more than there is": ({"keep": 17}, ValueError, r"from 1 to the 16 slots"),
    "nothing": ({"keep": 0}, ValueError, r"from 1 to the 16 slots"),
    "a share above one": ({"keep": 1.5}, ValueError, r"\(0, 1\]"),
    "too few layers": ({"keep": (3,)}, ValueError, r"one number, or 2 for layers, got 1"),
    "too few heads": ({"keep": np.ones((2, 3), int)}, ValueError, r"\[2, 2\].*got \[2, 3\]"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused(options, error, message):
    cache = Filled().cache
    with pytest.raises(error, match=message):
        jaxkv.compress(cache, KeyDiff(), **options)


def test_scores_and_caches_that_do_not_fit_are_refused():
    cache = Filled().cache
    with pytest.raises(ValueError, match=r"\[layers, kv_heads, slots\] = \[2, 2, 16\]"):
        jaxkv.compress(cache, jnp.zeros((2, 16)), keep=3)
    with pytest.raises(TypeError, match="keep cannot be a share"):
        jax.jit(lambda cache: jaxkv.compress(cache, KeyDiff(), keep=0.5, new=1))(cache)
    for windowed in (jaxkv.Ring(4), jaxkv.Paged(4, window=4)):
        sliding = jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4, addressing=windowed))
        with pytest.raises(TypeError, match=f"the 4 newest tokens of this {windowed.name} cache"):
            jaxkv.compress(sliding, KeyDiff(), keep=2)
    uneven = jaxkv.compress(cache, KeyDiff(), keep=BY_HEAD, new=2)
    with pytest.raises(TypeError, match="Fork before"):
        jaxkv.fork(uneven, 2)
