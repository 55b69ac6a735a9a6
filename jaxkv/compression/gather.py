"""Tokens that were chosen, moved as they are stored to a cache of their own or to other pages."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import KeptIndex, PolicyState
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import in_each_shard
from jaxkv.codecs import Leaves
from jaxkv.compression.scoring import LayerScores, held_positions, per_sequence
from jaxkv.placement import in_host_memory, read_slots, scatter, to_device, to_host
from jaxkv.policies import select
from jaxkv.policies.policy import Positions, Scores


def picked(
    cache: KVCache, leaf: Array, layer: Array, slots: Int[Array, "*batch kv_heads kept"], size: int
) -> Array:
    """Stored vectors of each head, ``[batch * kv_heads * kept, sides, ...]``.

    Args:
      slots: logical ones, all of them among the first ``size``.
    """
    rows = read_slots(cache.index, leaf, layer, 0, size)
    sides, vector = rows.shape[0], leaf.shape[4:]
    kv_heads, kept = slots.shape[-2:]
    batch = math.prod(slots.shape[:-2])
    rows = rows.reshape(sides, batch, size, kv_heads, *vector)
    sequences, heads = (
        jnp.arange(batch, dtype=jnp.int32)[:, None, None],
        jnp.arange(kv_heads, dtype=jnp.int32)[:, None],
    )
    found = rows[:, sequences, slots.reshape(batch, kv_heads, kept), heads]
    return jnp.moveaxis(found, 0, 3).reshape(-1, sides, *vector)


def write_heads(
    leaf: Array, layer: Array, targets: Int[Array, "*batch kv_heads slots"], vectors: Array
) -> Array:
    """Write vectors where the ctx and KV head axes are one; those with a target of -1 nowhere.

    In host memory, where nothing can be scattered to, the layer is brought to the device and back.
    """
    if in_host_memory(leaf):
        whole = to_device(lax.dynamic_slice_in_dim(leaf, layer, 1))
        written = write_heads(whole, jnp.int32(0), targets, vectors)
        return lax.dynamic_update_slice_in_dim(leaf, to_host(written), layer, axis=0)
    layers, sides, ctx, kv_heads, *vector = leaf.shape
    flat = leaf.reshape(layers, sides, ctx * kv_heads, *vector)
    return scatter(flat, targets.reshape(-1), vectors, layer).reshape(leaf.shape)


def moves_of(
    scores: Scores,
    positions: Positions,
    limits: Array,
    full: Array,
    *,
    new: int,
    sinks: int,
    recent: int,
) -> tuple[Array, Array, Array]:
    """Which new tokens of one sequence go to the place of which kept one.

    Returns:
      Logical slots to move from and to ``[kv_heads, moves]``, -1 for no move; and which tokens
      stay, ``[kv_heads, slots]``.
    """
    keep = positions.shape[1] - new
    slots, kept = select(scores, positions, keep, most=limits, sinks=sinks, recent=recent)
    heads = jnp.arange(len(slots), dtype=jnp.int32)[:, None]
    stays = jnp.zeros(positions.shape, bool).at[heads, slots].set(kept >= 0)
    survivor = stays[:, :new]
    free = ~stays[:, new:] & (jnp.arange(keep, dtype=jnp.int32) < limits[:, None])
    count = min(new, keep)
    origins = jnp.argsort(~survivor, axis=1)[:, :count].astype(jnp.int32)
    places = jnp.argsort(~free, axis=1)[:, :count].astype(jnp.int32)
    moves = jnp.take_along_axis(survivor, origins, axis=1) & full
    return origins, jnp.where(moves, new + places, -1), stays | ~full


def move(values: Array, origins: Array, targets: Array) -> Array:
    """One sequence's ``[kv_heads, slots]`` with some also at other places."""
    heads = jnp.arange(len(values), dtype=jnp.int32)[:, None]
    moved = jnp.take_along_axis(values, origins, axis=1)
    places = jnp.where(targets < 0, values.shape[1], targets)
    return values.at[heads, places].set(moved, mode="drop")


@functools.partial(jax.jit, static_argnames=("config", "sinks", "recent"), donate_argnames="pool")
def gathered(
    cache: KVCache,
    scores: LayerScores,
    remembered: PolicyState | None,
    layers: Int[Array, " kept_layers"],
    limits: Int[Array, "kept_layers *batch kv_heads"],
    *,
    pool: Leaves | None = None,
    pages: Int[Array, "*batch pages"] | None = None,
    config: KVCacheConfig,
    sinks: int,
    recent: int,
) -> KVCache:
    """A cache of ``config`` that holds the best tokens of these layers of another.

    With a ``pool``, in these pages of it. It is the other's own buffers then, which comes without.
    """
    in_pool = pool is not None
    if pool is not None:
        cache = dataclasses.replace(cache, storage=pool)
    tokens, since = (None, None) if remembered is None else (remembered.tokens, remembered.since)
    arrays = scores, tokens, since, layers, limits, pages
    options: dict[str, Any] = {
        "config": config,
        "in_pool": in_pool,
        "sinks": sinks,
        "recent": recent,
    }
    return _gathered(dataclasses.replace(cache, real_tokens=None), *arrays, **options)


@in_each_shard(config_of=lambda cache, *arrays, config, **options: config)
def _gathered(
    cache: KVCache,
    scores: LayerScores,
    remembered: dict[str, Array] | None,
    since: Array | None,
    layers: Int[Array, " kept_layers"],
    limits: Int[Array, "kept_layers *batch kv_heads"],
    pages: Int[Array, "*batch pages"] | None,
    *,
    config: KVCacheConfig,
    in_pool: bool,
    sinks: int,
    recent: int,
) -> KVCache:
    if cache.part_of is not None:
        config = cache.part_of.local(config)
    addressing: Any = config.addressing
    index: KeptIndex = addressing.init(config.max_context_length, config.batch_size)
    index = dataclasses.replace(index, lengths=cache.lengths)
    index = index.with_runs(limits)
    keep = index.extent - index.new
    if not in_pool:
        storage = {
            name: jnp.zeros(
                (len(layers), leaf.shape[1], config.num_slots, *leaf.shape[3:]), leaf.dtype
            )
            for name, leaf in cache.storage.items()
        }
    else:
        assert index.pages is not None
        assert pages is not None
        index = dataclasses.replace(index, within=index.pages.with_table(pages))
        storage = cache.storage

    def choose(scores: Array, positions: Array, limit: Array) -> tuple[Array, Array]:
        return select(scores, positions, keep, most=limit, sinks=sinks, recent=recent)

    def one_layer(state: Any, job: Any) -> Any:
        storage, index = state
        number, layer, limit = job
        source = dataclasses.replace(cache, storage=storage) if in_pool else cache
        positions = held_positions(cache, layer)
        slots, kept = per_sequence(cache, choose)(scores[layer], positions, limit)
        logical = jnp.broadcast_to(index.new + jnp.arange(keep, dtype=jnp.int32), slots.shape)
        targets = index.head_slots(number, jnp.where(kept >= 0, logical, -1))
        moved = {
            name: write_heads(
                leaf,
                number,
                targets,
                picked(source, source.storage[name], layer, slots, source.index.extent),
            )
            for name, leaf in storage.items()
        }
        index = index.with_kept(number, kept)
        if remembered is not None and index.state is not None:

            def chosen(array: Array, found: Array) -> Array:
                own = jnp.take_along_axis(found[layer], slots, axis=-1)
                return array.at[number, ..., index.new :].set(own)

            kept_state = index.state.map(chosen, remembered)
            index = index.with_state(dataclasses.replace(kept_state, since=since))
        return (moved, index), None

    jobs = jnp.arange(len(layers), dtype=jnp.int32), layers, limits
    (storage, index), _ = lax.scan(one_layer, (storage, index), jobs)
    state = {name: array[layers] for name, array in cache.codec_state.items()}
    newest = None if cache.newest is None else _of_layers(cache.newest, layers)
    return KVCache(storage, index, config, state, newest=newest, learns=cache.learns)


def _of_layers(cache: KVCache, layers: Int[Array, " kept_layers"]) -> KVCache:
    """A cache of these layers alone."""
    storage = {name: leaf[layers] for name, leaf in cache.storage.items()}
    state = {name: array[layers] for name, array in cache.codec_state.items()}
    config = cache.config.replace(num_layers=len(layers))
    return dataclasses.replace(cache, storage=storage, codec_state=state, config=config)
