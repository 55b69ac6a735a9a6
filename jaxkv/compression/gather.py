"""Tokens that were chosen, moved as they are stored to a cache of their own or to other pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import Kept, KeptByHead, KeptIndex, PagedIndex, Sums
from jaxkv.codecs import Leaves
from jaxkv.compression.moves import picked, write_heads
from jaxkv.compression.scoring import LayerScores, held_positions, per_sequence
from jaxkv.config import KVCacheConfig
from jaxkv.kv_cache import KVCache
from jaxkv.policies import select


@functools.partial(
    jax.jit,
    static_argnames=("config", "addressing", "sinks", "recent"),
    donate_argnames="pool",
)
def gathered(
    cache: KVCache,
    scores: LayerScores,
    sums: Sums | None,
    layers: Int[Array, " kept_layers"],
    limits: Int[Array, "kept_layers *batch kv_heads"],
    *,
    pool: Leaves | None = None,
    pages: Int[Array, "*batch pages"] | None = None,
    config: KVCacheConfig,
    addressing: Kept | KeptByHead,
    sinks: int,
    recent: int,
) -> KVCache:
    """A cache of ``config`` that holds the best tokens of these layers of another.

    With a ``pool``, in these pages of it. It is the other's own buffers then, which comes without.
    """
    index: KeptIndex = addressing.init(config.max_context_length, config.batch_size)
    index = dataclasses.replace(index, lengths=cache.lengths)
    index = index.with_runs(limits)
    keep = index.extent - index.new
    if pool is None:
        storage = {
            name: jnp.zeros(
                (len(layers), leaf.shape[1], config.num_slots, *leaf.shape[3:]), leaf.dtype
            )
            for name, leaf in cache.storage.items()
        }
    else:
        assert isinstance(index.within, PagedIndex)
        assert pages is not None
        index = dataclasses.replace(index, within=index.within.with_table(pages))
        storage = pool

    def choose(scores: Array, positions: Array, limit: Array) -> tuple[Array, Array]:
        return select(scores, positions, keep, most=limit, sinks=sinks, recent=recent)

    def one_layer(state, job):
        storage, index = state
        number, layer, limit = job
        source = cache if pool is None else dataclasses.replace(cache, storage=storage)
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
        if index.sums is not None and sums is not None:
            drawn = jnp.take_along_axis(sums.attention[layer], slots, axis=-1)
            attention = index.sums.attention.at[number, ..., index.new :].set(drawn)
            index = index.with_sums(Sums(attention, sums.since))
        return (moved, index), None

    jobs = jnp.arange(len(layers), dtype=jnp.int32), layers, limits
    (storage, index), _ = lax.scan(one_layer, (storage, index), jobs)
    means = None if cache.means is None else cache.means[layers]
    newest = None if cache.newest is None else _of_layers(cache.newest, layers)
    return KVCache(storage, index, config, means, newest=newest)


def _of_layers(cache: KVCache, layers: Int[Array, " kept_layers"]) -> KVCache:
    """The same of these layers alone."""
    storage = {name: leaf[layers] for name, leaf in cache.storage.items()}
    means = None if cache.means is None else cache.means[layers]
    config = cache.config.replace(num_layers=len(layers))
    return dataclasses.replace(cache, storage=storage, means=means, config=config)
