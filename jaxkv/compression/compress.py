"""After prefill: score, choose, and gather what stays into a smaller cache."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import Contiguous, Kept, KeptByHead, KeptIndex, Paged, Ring, Sums
from jaxkv.addressing.kept_by_head import KeptByHeadIndex
from jaxkv.checks import check_alive
from jaxkv.compression.budgets import Keep, host_lengths, is_by_head, limits_of
from jaxkv.compression.moves import picked, write_heads
from jaxkv.compression.scoring import (
    LayerQueries,
    LayerScores,
    averaged,
    held_positions,
    per_sequence,
    score,
    summed,
)
from jaxkv.config import KVCacheConfig
from jaxkv.hybrid import AnyCache, HybridCache, HybridConfig
from jaxkv.kv_cache import KVCache
from jaxkv.policies import HeavyHitters, Policy, select


def compress(
    cache: AnyCache,
    policy: Policy | LayerScores,
    *,
    keep: Keep,
    new: int | None = None,
    queries: LayerQueries | Sequence[Array] | None = None,
    sinks: int = 4,
    recent: int = 0,
) -> AnyCache:
    """A smaller cache that holds the tokens which a policy scores highest, in each layer and head.

    What is kept is gathered as it is stored, codes and scales, never encoded anew, and keeps its
    position: attention over the result is attention over exactly the tokens kept. The old cache
    is as it was; let go of it to free its memory.

    Args:
      cache: after prefill, with any codec. A paged one gives one with pages of its own. Rings in
        a hybrid cache, which are bounded already, stay as they are.
      policy: see `jaxkv.policies`, or scores ``[layers, *batch, kv_heads, slots]`` of one's own.
      keep: tokens that each head keeps; a float is a share of each sequence's tokens. One
        number; or one a layer, such as of `jaxkv.compression.pyramid`, which gives a hybrid cache;
        or one a head, ints ``[layers, kv_heads]`` or ``[layers, batch, kv_heads]``, such as of
        `jaxkv.compression.adaptive`, which are packed.
      new: tokens that fit beside those kept; as many as before if None.
      queries: of the newest tokens, for policies that look at them; `jaxkv.observed` gives them.
      sinks: first tokens of a sequence that stay whatever their score.
      recent: newest tokens of a sequence that stay whatever their score.

    Raises:
      ValueError: a number of tokens that cannot be kept, scores of another shape, or a policy
        without the queries that it needs.
      TypeError: a ring, or something that needs lengths while they are traced.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 100, num_kv_heads=1, head_dim=4))
    >>> cache = jaxkv.advance(cache, 80)
    >>> small = compress(cache, jaxkv.policies.SinksAndRecent(), keep=0.25)
    >>> small.size_bytes / cache.size_bytes, int(small.lengths)
    (0.4, 80)
    """
    check_alive(cache)
    options = {"new": new, "sinks": sinks, "recent": recent}
    every_layer = np.arange(cache.config.num_layers)
    if not isinstance(cache, HybridCache):
        return _joined(_compressed(cache, every_layer, policy, keep, queries, options))
    parts = []
    for number, group in enumerate(cache.groups):
        layers = np.flatnonzero(np.equal(cache.config.group_of_layer, number))
        if isinstance(group.config.addressing, Ring):
            parts.append((layers, group))
            continue
        own_policy = policy if callable(policy) else of_layers(policy, layers)
        own_keep = np.asarray(keep)[layers] if np.ndim(keep) else keep
        own_queries = None if queries is None else of_layers(queries, layers)
        parts += _compressed(group, layers, own_policy, own_keep, own_queries, options)
    return _joined(parts)


# Numbers of layers, and a cache of them.
Part = tuple[np.ndarray, KVCache]


def _compressed(cache: KVCache, layers, policy, keep, queries, options) -> list[Part]:
    """A smaller cache for each number of tokens to keep."""
    config, new = cache.config, options["new"]
    if isinstance(config.addressing, Ring):
        raise TypeError("compress: a ring keeps a bounded number of tokens already.")
    if new is None:
        new = max(1, config.max_context_length - host_lengths(cache, "new must be given").max())
    limits = limits_of(cache, keep)
    sums = None
    if isinstance(policy, HeavyHitters) and not is_by_head(keep):
        sums = summed(cache, policy, queries)
        policy = averaged(cache, policy, sums)
    scores = score(cache, policy, queries) if callable(policy) else policy
    scores = _for_all_slots(cache, scores)

    by_head = is_by_head(keep)
    per_layer = limits.reshape(len(limits), -1)
    sizes = per_layer.sum(axis=1) if by_head else per_layer.max(axis=1)
    parts = []
    for size in dict.fromkeys(sizes.tolist()):
        chosen = np.flatnonzero(sizes == size)
        shape = {"new": int(new), "num_layers": len(chosen), "num_kv_heads": config.num_kv_heads}
        addressing: Kept | KeptByHead
        if by_head:
            addressing = KeptByHead(places=size, longest=int(limits[chosen].max()), **shape)
        else:
            within = _like(config.addressing)
            addressing = Kept(tokens=size, sums=sums is not None, within=within, **shape)
        smaller = _gathered(
            cache,
            scores,
            sums,
            jnp.asarray(chosen, jnp.int32),
            jnp.asarray(limits[chosen]),
            config=config.replace(num_layers=len(chosen), addressing=addressing),
            addressing=addressing,
            sinks=options["sinks"],
            recent=options["recent"],
        )
        parts.append((layers[chosen], smaller))
    return parts


def _joined(parts: list[Part]) -> AnyCache:
    if len(parts) == 1:
        return parts[0][1]
    group_of_layer = {layer: group for group, (layers, _) in enumerate(parts) for layer in layers}
    numbers = tuple(group_of_layer[layer] for layer in sorted(group_of_layer))
    groups = tuple(cache for _, cache in parts)
    return HybridCache(groups, HybridConfig(tuple(group.config for group in groups), numbers))


@functools.partial(jax.jit, static_argnames=("config", "addressing", "sinks", "recent"))
def _gathered(
    cache: KVCache,
    scores: LayerScores,
    sums: Sums | None,
    layers: Int[Array, " kept_layers"],
    limits: Int[Array, "kept_layers *batch kv_heads"],
    *,
    config: KVCacheConfig,
    addressing: Kept | KeptByHead,
    sinks: int,
    recent: int,
) -> KVCache:
    """A cache of ``config`` that holds the best tokens of these layers of another."""
    index: KeptIndex = addressing.init(config.max_context_length, config.batch_size)
    index = dataclasses.replace(index, lengths=cache.lengths)
    if isinstance(index, KeptByHeadIndex):
        index = index.with_runs(limits)
    keep = index.extent - index.new
    storage = {
        name: jnp.zeros((len(layers), leaf.shape[1], config.num_slots, *leaf.shape[3:]), leaf.dtype)
        for name, leaf in cache.storage.items()
    }

    def choose(scores: Array, positions: Array, limit: Array) -> tuple[Array, Array]:
        return select(scores, positions, keep, most=limit, sinks=sinks, recent=recent)

    def one_layer(state, job):
        storage, index = state
        number, layer, limit = job
        positions = held_positions(cache, layer)
        slots, kept = per_sequence(cache, choose)(scores[layer], positions, limit)
        logical = jnp.broadcast_to(index.new + jnp.arange(keep, dtype=jnp.int32), slots.shape)
        targets = index.head_slots(number, jnp.where(kept >= 0, logical, -1))
        moved = {
            name: write_heads(
                leaf,
                number,
                targets,
                picked(cache, cache.storage[name], layer, slots, cache.index.extent),
            )
            for name, leaf in storage.items()
        }
        index = index.with_kept(number, kept)
        if index.sums is not None and sums is not None:
            drawn = jnp.take_along_axis(sums.attention[layer], slots, axis=-1)
            attention = index.sums.attention.at[number, ..., index.new :].set(drawn)
            index = index.with_sums(Sums(attention, sums.since))
        return (moved, index), None

    jobs = jnp.arange(len(layers), dtype=jnp.int32), layers, limits
    (storage, index), _ = lax.scan(one_layer, (storage, index), jobs)
    means = None if cache.means is None else cache.means[layers]
    return KVCache(storage, index, config, means)


def _like(addressing) -> Contiguous | Paged:
    """Where a compressed cache has its slots: pages for a paged one, of its own."""
    if isinstance(addressing, Kept):
        return addressing.within
    return Paged(addressing.page_size) if isinstance(addressing, Paged) else Contiguous()


def of_layers(arrays: Array | Sequence[Array], layers: np.ndarray) -> Array:
    if isinstance(arrays, Sequence):
        return jnp.stack([arrays[layer] for layer in layers])
    return arrays[layers]


def _for_all_slots(cache: KVCache, scores: Array) -> LayerScores:
    """Scores of the first slots, with the lowest for the rest."""
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
