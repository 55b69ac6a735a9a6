"""A policy's scores for a whole cache, a layer at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.addressing import PolicyState
from jaxkv.cache.kv_cache import KVCache, Layer
from jaxkv.cache.shards import check_sequences_whole, in_each_shard, where_it_is
from jaxkv.cache.vectors import read
from jaxkv.policies import Policy, StatefulPolicy
from jaxkv.policies.policy import needed
from jaxkv.programs import one_program

LayerScores = Float[Array, "layers *batch kv_heads slots"]
LayerQueries = Float[Array, "layers *batch window heads head_dim"]
_BY_HEAD = (None, "batch", "kv_heads", None)


# Compiled once for a policy and a shape of cache, outside jit too; a policy is static.
_jit = functools.partial(jax.jit, static_argnames="policy")


@_jit
def score(cache: KVCache, policy: Policy, queries: LayerQueries | None = None) -> LayerScores:
    """What a policy says of every logical slot of a cache. Of empty ones it means nothing.

    Args:
      policy: see `jaxkv.policies`; hashable, as functions and frozen dataclasses are.
      queries: of the newest tokens, for policies that look at them.

    >>> import jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(2, 4, 1, 8)), 3)
    >>> jaxkv.compression.score(cache, jaxkv.policies.SinksAndRecent(sinks=1)).shape
    (2, 1, 4)
    """
    check_sequences_whole(cache, "score")
    return where_it_is(_score, cache, queries, policy=policy)


@in_each_shard(_BY_HEAD)
def _score(cache: KVCache, layer_queries: LayerQueries | None, *, policy: Policy) -> LayerScores:
    def one_layer(layer: Layer, queries: Array | None) -> Array:
        return per_sequence(cache, policy)(*held(cache, layer, queries))

    return map_layers(cache, one_layer, layer_queries)


@_jit
def observed_state(
    cache: KVCache,
    policy: StatefulPolicy,
    queries: LayerQueries | None,
    before: PolicyState | None = None,
) -> PolicyState:
    """What a policy remembers after these queries of the newest tokens; of them alone if None."""
    given = needed(queries, type(policy).__name__)
    if before is None:
        shape = (*cache.config.batch_shape, cache.config.num_kv_heads, cache.index.extent)
        none = jnp.zeros((cache.config.num_layers, *shape), jnp.float32)
        since = cache.lengths - given.shape[-3]
        before = PolicyState(dict.fromkeys(policy.state, none), since)
    tokens = _observed(cache, given, before.tokens, policy=policy)
    return dataclasses.replace(before, tokens=tokens)


@in_each_shard(_BY_HEAD)
def _observed(
    cache: KVCache, layer_queries: Array, remembered: dict[str, Array], *, policy: StatefulPolicy
) -> dict[str, Array]:
    first_query = cache.lengths - layer_queries.shape[-3]

    def one_layer(layer: Layer, queries: Array, tokens: dict[str, Array]) -> dict[str, Array]:
        keys, values, _, positions = held(cache, layer, queries)
        # The slot of a new token may hold the numbers of one that was rolled back.
        was_there = positions < first_query[..., None, None]
        tokens = {name: jnp.where(was_there, array, 0) for name, array in tokens.items()}
        return per_sequence(cache, policy.observe)(tokens, keys, values, queries, positions)

    observed: dict[str, Array] = map_layers(cache, one_layer, layer_queries, remembered)
    return observed


@_jit
def remembered_scores(cache: KVCache, policy: StatefulPolicy, state: PolicyState) -> LayerScores:
    """Scores from what a policy remembers."""
    return _remembered(cache, state.tokens, state.since, policy=policy)


@in_each_shard(_BY_HEAD)
def _remembered(
    cache: KVCache, remembered: dict[str, Array], since: Array, *, policy: StatefulPolicy
) -> LayerScores:
    def one_layer(layer: Layer, tokens: dict[str, Array]) -> Array:
        positions = held_positions(cache, layer)
        return per_sequence(cache, policy.scores)(tokens, positions, since)

    return map_layers(cache, one_layer, remembered)


def scores_of(
    cache: KVCache, policy: Policy, queries: LayerQueries | None
) -> tuple[LayerScores, PolicyState | None]:
    """Scores, and what a policy that remembers does after these queries; None for others."""
    if not isinstance(policy, StatefulPolicy):
        return score(cache, policy, queries), None
    state = observed_state(cache, policy, queries)
    return remembered_scores(cache, policy, state), state


@one_program()
@in_each_shard(_BY_HEAD)
def positions_of_slots(cache: KVCache) -> Int[Array, "layers *batch kv_heads slots"]:
    """The positions of the tokens in all layers' logical slots, -1 for none."""
    return map_layers(cache, lambda layer: held_positions(cache, layer))


def for_all_slots(cache: KVCache, scores: Array) -> LayerScores:
    """Scores of the first slots, with the lowest for the rest.

    Raises:
      ValueError: scores of another shape.
    """
    config = cache.config
    expected = (config.num_layers, *config.batch_shape, config.num_kv_heads, cache.index.extent)
    if scores.shape[:-1] != expected[:-1] or scores.shape[-1] > expected[-1]:
        axes = ["layers", *["batch"] * len(config.batch_shape), "kv_heads", "slots"]
        raise ValueError(
            f"a policy must give [kv_heads, tokens], in all [{', '.join(axes)}] = "
            f"{list(expected)}, got {list(scores.shape)}."
        )
    missing = expected[-1] - scores.shape[-1]
    return jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def held(
    cache: KVCache, layer: Layer, queries: Array | None
) -> tuple[Array, Array, Array | None, Int[Array, "*batch kv_heads slots"]]:
    """What a policy is given of a layer: keys and values are zero in empty slots."""
    positions = held_positions(cache, layer)
    keys, values = read(cache, layer, 0, cache.index.extent, jnp.float32)
    filled = jnp.swapaxes(positions >= 0, -1, -2)[..., None]
    keys, values = jnp.where(filled, keys, 0), jnp.where(filled, cache.config.pair.cut(values), 0)
    return keys, values, queries, positions


def held_positions(cache: KVCache, layer: Layer) -> Int[Array, "*batch kv_heads slots"]:
    """The positions of the tokens in each head's logical slots, -1 for none."""
    index, config = cache.index, cache.config
    positions = index.key_positions(layer, index.lengths, 0, index.extent)
    shape = (*config.batch_shape, config.num_kv_heads, index.extent)
    if positions.ndim < len(shape):  # all heads hold the same tokens
        positions = positions[..., None, :]
    return jnp.broadcast_to(positions, shape)


def per_sequence(cache: KVCache, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one sequence's arrays as one of the whole batch's."""
    return jax.vmap(function) if cache.config.batch_shape else function


def map_layers(cache: KVCache, function: Callable[..., Any], *arrays: Any) -> Any:
    """``function(layer, *arrays of the layer)``, one after the other: one layer is decoded."""
    layers = jnp.arange(cache.config.num_layers, dtype=jnp.int32)
    return lax.map(lambda one: function(*one), (layers, *arrays))
