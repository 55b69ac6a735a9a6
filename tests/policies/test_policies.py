"""What every policy promises: scores of the tokens that are held, whatever stands beside them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.policies import POLICIES, ExpectedAttention, HeavyHitters, Oracle, Random, select
from jaxkv.policies.policy import QUERY_BLOCK, attention_weights
from tests.oracle import jit

TOKENS, KV_HEADS, HEADS, HEAD_DIM = 10, 2, 4, 8

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def arrays(tokens=TOKENS, window=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (tokens, KV_HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM), (window, HEADS, HEAD_DIM)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def every_token(tokens=TOKENS):
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (KV_HEADS, tokens))


@each_policy
def test_empty_slots_change_nothing(policy):
    keys, values, queries = arrays()
    scores = jit(policy)(keys, values, queries, every_token())
    assert scores.shape == (KV_HEADS, TOKENS)
    wider = [jnp.pad(vectors, ((3, 4), (0, 0), (0, 0))) for vectors in (keys, values)]
    positions = jnp.pad(every_token(), ((0, 0), (3, 4)), constant_values=-1)
    padded = jit(policy)(*wider, queries, positions)[:, 3:-4]
    if isinstance(policy, Random):
        assert padded.shape == scores.shape
    else:
        np.testing.assert_allclose(padded, scores, rtol=1e-5, atol=1e-6)


@each_policy
def test_heads_may_hold_different_tokens(policy):
    """A head's scores are those that it has in a cache where both heads hold its tokens."""
    if policy == POLICIES["tova"] or isinstance(policy, Random):
        pytest.skip("heads choose together, or by chance")
    keys, values, queries = arrays()
    odd = jnp.asarray([0, 1, 2, 4, 5, 7, 8, 10, 11, 13], jnp.int32)
    even = jnp.asarray([0, 2, 3, 5, 6, 7, 9, 11, 12, 13], jnp.int32)
    run = jit(policy)
    mixed = run(keys, values, queries, jnp.stack([odd, even]))
    for head, positions in enumerate((odd, even)):
        alone = run(keys, values, queries, jnp.stack([positions, positions]))
        np.testing.assert_allclose(mixed[head], alone[head], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["snapkv", "tova", "expected_attention", "h2o", "oracle"])
def test_a_policy_without_its_queries_says_how_to_get_them(name):
    keys, values, _ = arrays()
    with pytest.raises(ValueError, match=r"queries=\[layers.*jaxkv\.observed"):
        POLICIES[name](keys, values, None, every_token())


def test_heavy_hitters_are_those_of_the_whole_matrix():
    """In blocks of queries as all at once, and step by step as in one go."""
    tokens = QUERY_BLOCK + 20
    keys, values, queries = arrays(tokens, window=tokens)
    at, positions = jnp.arange(tokens, dtype=jnp.int32), every_token(tokens)
    whole = attention_weights(queries, keys, at, positions).sum(axis=2).mean(axis=1)
    policy = HeavyHitters()
    np.testing.assert_allclose(policy.accumulate(keys, queries, positions), whole, rtol=1e-4)
    seen_by = np.asarray(tokens - positions, np.float32)
    np.testing.assert_allclose(policy(keys, values, queries, positions), whole / seen_by, rtol=1e-4)
    only_sum = HeavyHitters(mean=False)(keys, values, queries, positions)
    np.testing.assert_allclose(only_sum, whole, rtol=1e-4)


def test_expected_attention_is_the_mean_over_gaussian_queries():
    """Without rope the formula is that of E[exp(q.k)]; held to a mean over many draws."""
    rng = np.random.default_rng(1)
    keys = 0.5 * rng.standard_normal((TOKENS, 1, HEAD_DIM)).astype(np.float32)
    queries = rng.standard_normal((4000, 1, HEAD_DIM)).astype(np.float32) + 0.3
    values = np.ones_like(keys)
    positions = jnp.arange(5000 - TOKENS, 5000, dtype=jnp.int32)[None]
    scores = jit(ExpectedAttention(sinks=0))(*map(jnp.asarray, (keys, values, queries)), positions)
    exponentials = np.exp(np.einsum("whd,tkd->wt", queries, keys) * HEAD_DIM**-0.5).mean(axis=0)
    np.testing.assert_allclose(
        scores[0] / scores.sum(), exponentials / exponentials.sum(), rtol=0.05
    )


def test_random_differs_by_content_and_seed_alone():
    keys, values, queries = arrays()
    others = arrays(seed=1)[0]
    first = Random()(keys, values, None, every_token())
    assert (first == Random()(keys, values, queries, every_token())).all()
    assert (first != Random()(others, values, None, every_token())).any()
    assert (first != Random(seed=1)(keys, values, None, every_token())).any()


def test_the_oracle_sees_all_tokens_from_every_query():
    keys, values, queries = arrays()
    weights = attention_weights(queries, keys, jnp.full(6, TOKENS), every_token())
    expected = weights.max(axis=(1, 2))
    np.testing.assert_allclose(Oracle()(keys, values, queries, every_token()), expected, rtol=1e-5)


_select = jit(select, static_argnames=("keep", "sinks", "recent"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-1, 20), st.sampled_from([0.0, 1.0, 2.0, np.inf, -np.inf, np.nan])),
        min_size=12,
        max_size=12,
        unique_by=lambda one: one[0] if one[0] >= 0 else object(),
    ),
    st.integers(0, 6),
    st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 1)]),
)
def test_select_keeps_the_best_and_the_protected(held, most, protected):
    sinks, recent = protected
    positions, scores = (np.asarray(column)[None] for column in zip(*held, strict=True))
    slots, kept = _select(
        jnp.asarray(scores, jnp.float32), jnp.asarray(positions, jnp.int32), keep=6,
        most=most, sinks=sinks, recent=recent,
    )  # fmt: skip
    slots, kept = np.asarray(slots)[0], np.asarray(kept)[0]
    end = positions.max() + 1

    def rank(slot):
        position, score = positions[0, slot], scores[0, slot]
        is_protected = position < sinks or position >= end - recent
        return is_protected, -np.inf if np.isnan(score) else score, position

    held_slots = [slot for slot in range(12) if positions[0, slot] >= 0]
    best = sorted(held_slots, key=rank, reverse=True)[: min(6, most)]
    assert slots[kept >= 0].tolist() == sorted(best)
    assert kept[kept >= 0].tolist() == positions[0, sorted(best)].tolist()
    assert (kept[len(best) :] == -1).all()
    assert len(set(slots.tolist())) == 6
