"""Attention a block of slots at a time, by online softmax.

Memory is one block of one layer, and blocks that no query can see (unwritten, in the future,
before the window) are not read.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxkv.attention.call import AttentionCall, Grouped, LogTotal
from jaxkv.attention.online import Online

KEY_BLOCK = 1024  # slots
QUERY_BLOCK = 256  # tokens


def blockwise(request: AttentionCall) -> Grouped:
    """Attend with at most `QUERY_BLOCK` x `KEY_BLOCK` scores per head in memory."""
    return blockwise_part(request)[0]


def blockwise_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total, by which parts of a context are merged."""
    tokens = request.queries.shape[2]
    if tokens <= QUERY_BLOCK:
        return _one_query_block(request)
    num_blocks = -(-tokens // QUERY_BLOCK)

    def one_block(block: Array) -> tuple[Grouped, LogTotal]:
        return _one_query_block(request.take_queries(block * QUERY_BLOCK, QUERY_BLOCK))

    blocks = lax.map(one_block, jnp.arange(num_blocks, dtype=jnp.int32))

    def joined(parts: Array) -> Array:
        parts = jnp.moveaxis(parts, 0, 2)  # [batch, kv_heads, blocks, QUERY_BLOCK, group, ...]
        return parts.reshape(*parts.shape[:2], -1, *parts.shape[4:])[:, :, :tokens]

    output, log_total = blocks
    return joined(output), joined(log_total)


def unrotated_blockwise(request: AttentionCall) -> Grouped:
    """The same where neither queries nor outputs are rotated as keys and values are."""
    return unrotated_blockwise_part(request)[0]


def unrotated_blockwise_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total."""
    codec = request.cache.config.codec
    queries = codec.rotate(request.queries)
    output, log_total = blockwise_part(dataclasses.replace(request, queries=queries))
    return codec.unrotate(output), log_total


def _one_query_block(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    state = with_newest(request, _all_blocks(request))
    return state.output(), state.log_total()


def with_newest(request: AttentionCall, state: Online) -> Online:
    """After the `Newest` tokens too, where a cache has them."""
    if request.newest is None:
        return state
    newest, own = _all_blocks(request.newest), request.newest.cache.config.codec
    # Rotated as the codec of the whole cache rotates it.
    mix = request.cache.config.codec.rotate_values(own.unrotate(newest.mix))
    return state.joined(newest._replace(mix=mix))


def _all_blocks(request: AttentionCall) -> Online:
    extent = request.cache.index.extent
    size = min(KEY_BLOCK, extent)

    def one_key_block(state, block):
        # The last block is moved back to end with the cache; slots seen before are masked.
        start = jnp.minimum(block * size, extent - size)
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= block * size
        seen = request.visible(start, size) & fresh

        def read(state: Online) -> Online:
            return state.with_slots(request, start, size, seen)

        return lax.cond(seen.any(), read, lambda state: state, state), None

    blocks = jnp.arange(-(-extent // size), dtype=jnp.int32)
    return lax.scan(one_key_block, Online.start(request), blocks)[0]
