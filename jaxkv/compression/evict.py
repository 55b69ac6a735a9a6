"""While decoding: choose again whenever the slots for new tokens are used up."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxkv.addressing import KeptIndex
from jaxkv.attention.observed import observed
from jaxkv.cache.checks import check_alive, check_stateless
from jaxkv.cache.hybrid import AnyCache, SameCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import in_each_shard, where_it_is
from jaxkv.compression.compress import of_layers
from jaxkv.compression.gather import move, moves_of, picked, write_heads
from jaxkv.compression.scoring import (
    LayerQueries,
    held,
    observed_state,
    per_sequence,
)
from jaxkv.policies import Policy, StatefulPolicy
from jaxkv.policies.policy import refuse_name
from jaxkv.programs import promotes_ranks


@promotes_ranks
def evict(
    cache: SameCache,
    policy: Policy,
    *,
    tokens: int = 1,
    queries: LayerQueries | Sequence[Array] | None = None,
    sinks: int = 4,
    recent: int = 0,
    after: Array | None = None,
) -> SameCache:
    """Drop the tokens that score lowest wherever there is no room for the next ones.

    For caches of `compress`, or with an addressing `Kept` from the start. Sequences that have
    room stay as they are. One that has none keeps as many of its kept and new tokens as it has
    places for kept ones, in each layer and head; surviving new tokens move to the places of those
    dropped, and all slots for new ones are free again. In place under donation, and of the same
    shapes: nothing is compiled again.

    Args:
      policy: see `jaxkv.policies`.
      tokens: how many are to come next, at most ``cache.index.new``.
      queries: of the newest tokens, ``[layers, *batch, window, heads, head_dim]``, for policies
        that look at them. One that remembers (`jaxkv.policies.StatefulPolicy`) needs those of each
        token once, in every call.
      sinks: first tokens of a sequence, which stay whatever a policy says, infinity included.
      recent: newest tokens, likewise. A head that keeps fewer than ``sinks + recent`` keeps those
        of them that score highest.
      after: an output of the step, such as its logits: XLA then knows that attention has read
        what is about to be moved. Without, it keeps a copy of the cache to be sure.

    Raises:
      TypeError: a cache of another addressing, or a policy's name.
      ValueError: more tokens than there are slots for new ones, or no queries for a policy that
        needs them.

    >>> import jax, jaxkv
    >>> def step(cache):  # a model would append and attend in between
    ...     cache = evict(cache, jaxkv.policies.SinksAndRecent(), tokens=2)
    ...     return jaxkv.advance(cache, 2)
    >>> kept = jaxkv.Kept(tokens=6, new=2, num_layers=1, num_kv_heads=1)
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 64, 1, 4, addressing=kept))
    >>> for _ in range(10):  # 20 tokens through 8 slots
    ...     cache = jax.jit(step, donate_argnums=0)(cache)
    >>> int(cache.lengths), cache.config.num_slots
    (20, 8)
    """
    check_stateless(cache, "evict", "Evict from caches of keys and values alone.")
    check_alive(cache)
    refuse_name(policy, "evict")
    groups = []
    for number, group in enumerate(cache.groups):
        if group.index.per_head or len(cache.groups) == 1:
            layers = np.asarray(cache.config.layers_of(number))
            own = None if queries is None else of_layers(queries, layers)
            group = where_it_is(_evict, group, policy, tokens, own, sinks, recent, after)
        groups.append(group)
    return cache.with_groups(groups)  # type: ignore[return-value]


def evicting(
    model: Callable[..., tuple[Array, AnyCache]],
    policy: Policy,
    *,
    sinks: int = 4,
    recent: int = 0,
) -> Callable[..., tuple[Array, AnyCache]]:
    """The same model, whose cache never fills up: it evicts after each step.

    Args:
      model: ``model(tokens, cache, ...) -> (logits, cache)``; see `jaxkv.observed`.
      policy: see `evict`.
      sinks, recent: see `evict`.

    Returns:
      A function of the same kind, for steps of one number of tokens. Not for prompts that are
      padded and rolled back after: padding would count as the newest tokens.

    >>> import jax, jax.numpy as jnp, jaxkv
    >>> def model(tokens, cache):
    ...     vectors = jnp.ones((len(tokens), 1, 4))
    ...     cache = jaxkv.append(cache, vectors, vectors, layer=0)
    ...     return jaxkv.attend(cache, vectors, layer=0), jaxkv.advance(cache, len(tokens))
    >>> kept = jaxkv.Kept(tokens=6, new=2, num_layers=1, num_kv_heads=1)
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 64, 1, 4, addressing=kept))
    >>> step = jax.jit(evicting(model, jaxkv.policies.SinksAndRecent()), donate_argnums=1)
    >>> for _ in range(10):  # through 8 slots
    ...     _, cache = step(jnp.arange(2), cache)
    >>> int(cache.lengths)
    20
    """

    def run(tokens: Array, cache: AnyCache, **options: Any) -> tuple[Array, AnyCache]:
        logits, cache, queries = observed(model)(tokens, cache, **options)
        count = tokens.shape[-1]
        kept = evict(
            cache, policy, tokens=count, queries=queries, sinks=sinks, recent=recent, after=logits
        )
        return logits, kept

    return run


@functools.partial(jax.jit, static_argnames=("policy", "tokens", "sinks", "recent"))
def _evict(
    cache: KVCache,
    policy: Policy,
    tokens: int,
    queries: Any,
    sinks: int,
    recent: int,
    after: Array | None,
) -> KVCache:
    index = _index_of(cache)
    if tokens > index.new:
        raise ValueError(
            f"evict: {tokens} tokens are to come, and there are slots for {index.new} new ones. "
            "Give the model fewer at a time, or create the cache with a larger new."
        )
    options: dict[str, Any] = {"policy": policy, "tokens": tokens, "sinks": sinks, "recent": recent}
    return _with_room(cache, queries, _is_there(after, cache), **options)


@in_each_shard()
def _with_room(
    cache: KVCache,
    layer_queries: Any,
    after: Array | bool,
    *,
    policy: Policy,
    tokens: int,
    sinks: int,
    recent: int,
) -> KVCache:
    if isinstance(policy, StatefulPolicy):
        cache = dataclasses.replace(cache, index=_observed(cache, policy, layer_queries))
    index = _index_of(cache)
    full = index.within.lengths + tokens > index.new
    return _chosen_again(cache, policy, layer_queries, full, sinks, recent, after)


def _index_of(cache: KVCache) -> KeptIndex:
    if not cache.index.per_head:
        raise TypeError(
            f"evict needs a cache of jaxkv.compress, or one with addressing=jaxkv.Kept(...); this "
            f"one is {cache.config.addressing.name}."
        )
    return cast(KeptIndex, cache.index)


def _observed(cache: KVCache, policy: StatefulPolicy, queries: LayerQueries | None) -> KeptIndex:
    """With what the policy remembers after the queries of the newest tokens."""
    index = _index_of(cache)
    if index.state is None or index.state.tokens.keys() != set(policy.state):
        who = type(policy).__name__
        raise ValueError(
            f"{who} needs a cache that keeps its numbers: one that jaxkv.compress made with {who} "
            "and one number of tokens for all heads, or one with addressing=jaxkv.Kept(..., "
            f"sums={policy.state!r})."
        )
    return index.with_state(observed_state(cache, policy, queries, index.state))


def _chosen_again(
    cache: KVCache,
    policy: Policy,
    queries: Any,
    full: Array,
    sinks: int,
    recent: int,
    after: Array | bool,
) -> KVCache:
    """Full sequences with the best of their kept and new tokens at the places of kept ones."""
    new = _index_of(cache).new
    moves = functools.partial(moves_of, new=new, sinks=sinks, recent=recent)

    def one_layer(layer: Array, state: KVCache) -> KVCache:
        index = _index_of(state)
        own_queries = None if queries is None else queries[layer]
        keys, values, _, positions = held(state, layer, own_queries)
        if isinstance(policy, StatefulPolicy) and index.state is not None:
            own = {name: array[layer] for name, array in index.state.tokens.items()}
            scores = per_sequence(state, policy.scores)(own, positions, index.state.since)
        else:
            scores = per_sequence(state, policy)(keys, values, own_queries, positions)
        origins, targets, stays = per_sequence(state, moves)(
            scores, positions, index.limits(layer), full
        )
        move_all = per_sequence(state, move)
        remaining = move_all(jnp.where(stays, positions, -1), origins, targets)
        places = index.head_slots(layer, targets)
        storage = {
            name: write_heads(leaf, layer, places, picked(state, leaf, layer, origins, new))
            for name, leaf in state.storage.items()
        }

        def moved(array: Array) -> Array:
            own = jnp.where(stays, array[layer], 0)
            return array.at[layer].set(move_all(own, origins, targets))

        index = index.with_state(index.state and index.state.map(moved))
        index = index.with_kept(layer, remaining[..., new:])
        return dataclasses.replace(state, storage=storage, index=index)

    # Not a cond, which would copy the whole cache on its way through (XLA on a CPU, jax 0.10).
    iterations = jnp.where(full.any() & after, cache.config.num_layers, 0)
    state = lax.fori_loop(0, iterations, one_layer, cache)
    return dataclasses.replace(state, index=_index_of(state).with_new_slots_free(full))


def _is_there(after: Array | None, cache: KVCache) -> Array | bool:
    """True, once an array is computed; `lax.optimization_barrier` orders nothing on a CPU."""
    if after is None:
        return True
    first = after.reshape(-1)[0] if cache.spread is None else after.max()  # however it is split
    return ~(jnp.isinf(first) & (first == 0))
