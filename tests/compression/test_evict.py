"""A cache that evicts while it decodes: held to sets of positions, kept by hand."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig
from jaxkv.policies import (
    HeavyHitters,
    KeyDiff,
    SinksAndRecent,
    attention_weights,
    query_positions,
)
from tests.compiled import assert_in_place, compile_donating
from tests.compression.layouts import in_bfloat16, positions_of
from tests.oracle import SMALL, jit, random_step, step

LAYERS, KV_HEADS, HEADS, KEPT, NEW = 2, 2, 4, 5, 3
GROUP = HEADS // KV_HEADS


def config_of(batch_size, within, **fields):
    kept = jaxkv.Kept(KEPT, NEW, LAYERS, KV_HEADS, within=SMALL[within], **fields)
    float32 = jaxkv.Dense("float32")
    return jaxkv.KVCacheConfig(LAYERS, 64, KV_HEADS, 8, batch_size, float32, kept)


@dataclasses.dataclass(frozen=True)
class Strongest:
    """A policy of a user's own, which remembers the most that was drawn at once, and how often."""

    state = ("most", "often")

    def observe(self, state, keys, values, queries, positions):
        at = query_positions(queries, positions)
        drawn = attention_weights(queries, keys, at, positions).mean(axis=1)  # over a group
        often = state["often"] + jnp.float32(drawn > OFTEN).sum(axis=1)
        return {"most": jnp.maximum(state["most"], drawn.max(axis=1)), "often": often}

    def scores(self, state, positions, first_query=0):
        return state["most"] + state["often"]

    def __call__(self, keys, values, queries, positions):
        none = dict.fromkeys(self.state, jnp.zeros(positions.shape))
        return self.scores(self.observe(none, keys, values, queries, positions), positions)


OFTEN = 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "newest"),
    [(HeavyHitters(), 0), (HeavyHitters(), 3), (Strongest(), 0)],
    ids=["h2o", "h2o, newest", "a user's own"],
)
def test_what_has_drawn_attention_stays(policy, newest):
    """Each head against what its tokens have drawn, in float64, over the tokens it has left.

    And over the newest, which it reads in bfloat16 where the cache keeps them so as well.
    """
    config, kind = config_of(2, "paged", sums=policy.state), HEADS_OF[type(policy)]
    if newest:
        config = config.replace(newest=jaxkv.Newest(newest, jaxkv.Dense("bfloat16")))
    cache = jaxkv.create(config)
    held_bytes = cache.config.size_bytes + cache.config.index_bytes
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == held_bytes

    @functools.partial(jit, donate_argnums=0)
    def decode(cache, queries, keys, values):
        cache, outputs = step(cache, queries, keys, values)
        return jaxkv.evict(cache, policy, queries=queries, sinks=1, after=outputs), outputs

    heads = [kind(newest) for _ in range(LAYERS * 2 * KV_HEADS)]
    for token in range(14):
        arrays = random_step(cache.config, 1, heads=HEADS, seed=token)
        cache, outputs = decode(cache, *arrays)
        queries, keys, values = (array.reshape(LAYERS * 2, -1, 8) for array in arrays)
        queries, outputs = (
            np.reshape(array, (len(heads), GROUP, 8)) for array in (queries, outputs)
        )
        held = np.concatenate([positions_of(cache, layer) for layer in range(LAYERS)])
        held = held.reshape(len(heads), -1)
        vectors = keys.reshape(-1, 8), values.reshape(-1, 8)
        for head, query, key, value, output, positions in zip(
            heads, queries, *vectors, outputs, held, strict=True
        ):
            np.testing.assert_allclose(output, head.attend(query, key, value), atol=1e-5)
            if head.next % NEW == 0:  # the slots for new tokens are used up
                head.evict(KEPT)
            assert sorted(positions[positions >= 0]) == sorted(head.tokens)
    assert decode._cache_size() == 1
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == held_bytes


class Head:
    """One KV head: tokens by position, what each has drawn, and the newest in bfloat16."""

    def __init__(self, newest):
        self.tokens, self.drawn, self.next = {}, {}, 0
        self.newest = collections.deque(maxlen=newest)

    def attend(self, queries, key, value):
        self.tokens[self.next] = key.astype(np.float64), value.astype(np.float64)
        self.newest.append((self.next, in_bfloat16((key, value))))
        self.drawn[self.next] = []
        self.next += 1
        weights, _ = self.weights(queries, self.tokens)
        for position, weight in zip(self.tokens, weights.mean(axis=0), strict=True):
            self.drawn[position].append(weight)
        weights, values = self.weights(queries, self.tokens | dict(self.newest))
        return weights @ values

    def weights(self, queries, tokens):
        keys, values = (np.stack(vectors) for vectors in zip(*tokens.values(), strict=True))
        weights = np.exp(queries @ keys.T * queries.shape[-1] ** -0.5)
        return weights / weights.sum(axis=1, keepdims=True), values

    def score(self, position):
        return sum(self.drawn[position]) / (self.next - position)

    def evict(self, count):
        def rank(position):
            return position == 0, self.score(position)

        best = sorted(self.tokens, key=rank, reverse=True)[:count]
        self.tokens = {
            position: self.tokens[position] for position in self.tokens if position in best
        }


class StrongestHead(Head):
    def score(self, position):
        drawn = np.array(self.drawn[position])
        return drawn.max() + (drawn > OFTEN).sum()


HEADS_OF = {HeavyHitters: Head, Strongest: StrongestHead}

TINY = DecoderConfig(32, 16, 32, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.mark.slow
def test_sinks_and_recent_is_a_ring():
    """With one new token at a time, the choice of StreamingLLM is what a ring holds."""
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    config = model.cache_config(max_context_length=64, batch_size=2)
    ring = jaxkv.create(config.replace(addressing=jaxkv.Ring(window=5, sinks=2, chunk=1)))
    kept = jaxkv.create(config.replace(addressing=jaxkv.Kept(6, 1, 2, 2)))
    evicting = jit(lambda *step: jaxkv.evicting(model, SinksAndRecent(2), sinks=0)(*step))
    plain = jit(lambda tokens, cache: model(tokens, cache))
    tokens = np.random.default_rng(0).integers(0, 32, (14, 2, 1))
    for token in tokens:
        expected, ring = plain(token, ring)
        logits, kept = evicting(token, kept)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert evicting._cache_size() == 1


def test_only_full_sequences_choose_again():
    cache = jaxkv.create(config_of(2, "contiguous"))
    for token in range(NEW):
        arrays = random_step(cache.config, 1, heads=HEADS, seed=token)
        cache, _ = jit(step)(cache, *arrays)
    cache = jaxkv.truncate(cache, np.array([NEW, 1]))
    evicted = jaxkv.evict(cache, KeyDiff(), sinks=0)
    assert evicted.index.within.lengths.tolist() == [0, 1]
    assert evicted.lengths.tolist() == [NEW, 1]
    for layer in range(LAYERS):
        for before, after in zip(
            positions_of(cache, layer).reshape(-1, KEPT + NEW),
            positions_of(evicted, layer).reshape(-1, KEPT + NEW),
            strict=True,
        ):
            assert sorted(before) == sorted(after)
    room = jaxkv.evict(evicted, KeyDiff(), tokens=2, sinks=0)
    np.testing.assert_array_equal(room.index.positions, evicted.index.positions)


@pytest.mark.slow_cases(r"newest")
@pytest.mark.parametrize("newest", [None, jaxkv.Newest(16)])
def test_eviction_is_in_place(newest):
    """No copy of the cache in the step, though most of its runs evict nothing."""
    policy, layers = HeavyHitters(), 4
    kept = jaxkv.Kept(1000, 24, num_layers=layers, num_kv_heads=2, sums=True)
    float32 = jaxkv.Dense("float32")
    config = jaxkv.KVCacheConfig(
        layers, 10**6, 2, 64, codec=float32, addressing=kept, newest=newest
    )
    cache = jax.eval_shape(lambda: jaxkv.create(config))

    def decode(cache, queries, keys, values):
        output = jnp.zeros(())
        for layer in range(layers):  # each depends on the one before, as in a model
            cache = jaxkv.append(cache, keys[layer] + output, values[layer], layer=layer)
            output = jaxkv.attend(cache, queries[layer], layer=layer).mean()
        cache = jaxkv.advance(cache, 1)
        return jaxkv.evict(cache, policy, queries=queries, after=output), output

    shapes = [jax.ShapeDtypeStruct((layers, 1, heads, 64), jnp.float32) for heads in (4, 2, 2)]
    assert_in_place(compile_donating(decode, cache, *shapes), cache, temp_share=0.5)


def test_what_cannot_evict_is_refused():
    full = jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4))
    with pytest.raises(TypeError, match=r"jaxkv\.compress.*this one is contiguous"):
        jaxkv.evict(full, KeyDiff())
    cache = jaxkv.create(config_of(None, "contiguous"))
    with pytest.raises(ValueError, match="4 tokens are to come, and there are slots for 3"):
        jaxkv.evict(cache, KeyDiff(), tokens=4)
    with pytest.raises(ValueError, match=r"sums=\('sums',\)"):
        jaxkv.evict(cache, HeavyHitters(), queries=jnp.zeros((2, 1, 4, 8)))
    with pytest.raises(TypeError, match=r"evict: .*the name 'keydiff'.*POLICIES"):
        jaxkv.evict(cache, "keydiff")
    with pytest.raises(TypeError, match=r"compress: .*the name 'keydiff'.*POLICIES"):
        jaxkv.compress(full, "keydiff", keep=4)
