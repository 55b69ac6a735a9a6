"""Attention a block of slots at a time, by online softmax.

Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), and Rabe & Staats,
"Self-attention does not need O(n^2) memory" (2021): a running maximum, total and mix a
query, rescaled when the maximum grows. Memory is one block of one layer, and blocks that no
query can see (unwritten, in the future, before the window) are not read.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxkv.attention.products import mix_of, scores_of
from jaxkv.attention.request import Grouped, Request

KEY_BLOCK = 1024  # slots
QUERY_BLOCK = 256  # tokens
_LOWEST = -1e30  # a finite "minus infinity": differences of it are never NaN


def blockwise(request: Request) -> Grouped:
    """Attend with at most `QUERY_BLOCK` x `KEY_BLOCK` scores a head in memory."""
    tokens = request.queries.shape[2]
    if tokens <= QUERY_BLOCK:
        return _one_query_block(request)
    num_blocks = -(-tokens // QUERY_BLOCK)

    def one_block(block: Array) -> Grouped:
        return _one_query_block(request.take_queries(block * QUERY_BLOCK, QUERY_BLOCK))

    blocks = lax.map(one_block, jnp.arange(num_blocks))
    joined = jnp.moveaxis(blocks, 0, 2)  # [batch, kv_heads, blocks, QUERY_BLOCK, group, head_dim]
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])[:, :, :tokens]


def _one_query_block(request: Request) -> Grouped:
    extent = request.cache.index.extent
    size = min(KEY_BLOCK, extent)

    def one_key_block(state, block):
        # The last block is moved back to end with the cache; slots seen before are masked.
        start = jnp.minimum(block * size, extent - size)
        fresh = start + jnp.arange(size) >= block * size
        seen = request.visible(start, size) & fresh

        def read(state):
            highest, total, mix = state
            keys, values = request.keys_and_values(start, size)
            scores = request.logits(scores_of(request.queries, keys), start, size)
            scores = jnp.where(seen, scores, _LOWEST)
            # The maximum cancels out of the result, so no gradient needs to flow through it.
            new_highest = lax.stop_gradient(jnp.maximum(highest, scores.max(axis=-1)))
            weights = jnp.where(seen, jnp.exp(scores - new_highest[..., None]), 0)
            keep = jnp.exp(highest - new_highest)
            total = total * keep + weights.sum(axis=-1)
            return new_highest, total, mix * keep[..., None] + mix_of(weights, values)

        return lax.cond(seen.any(), read, lambda state: state, state), None

    rows = request.queries[..., 0]  # like it, so that in an Explicit mesh they are sharded like it
    highest, total = jnp.full_like(rows, _LOWEST), jnp.zeros_like(rows)
    if request.sinks is not None:  # as a slot that was read already and gave nothing
        sinks = jnp.broadcast_to(request.sinks[:, None, :], rows.shape)
        highest = lax.stop_gradient(jnp.maximum(highest, sinks))
        total = jnp.exp(sinks - highest)
    state = highest, total, jnp.zeros_like(request.queries)
    (_, total, mix), _ = lax.scan(one_key_block, state, jnp.arange(-(-extent // size)))
    return mix / jnp.where(total == 0, 1, total)[..., None]
