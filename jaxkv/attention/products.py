"""The two products of attention, in the form that each backend runs best."""

import jax
import jax.numpy as jnp

from jaxkv.attention.request import Grouped, Scores, Vectors

# Up to this many query rows, XLA's CPU backend reads the cache faster through one matrix
# product over all heads, most of it zeros, than through one a head, for which it first
# transposes keys and values (measured: ARCHITECTURE.md, "Reading on a CPU").
_PACKED_ROWS = 48
# Up to this many query rows a KV head, XLA's GPU backend reads the cache fastest as sums of
# products, all rows in one loop. A matrix product makes it copy keys and values first, in
# float32; this form makes no copy, and is exact where a product is rounded to TF32.
_SUMMED_ROWS = 8


def _packs(kv_heads: int, tokens: int, group: int) -> bool:
    # With several devices the heads may be sharded, and mixing them would gather the cache.
    alone = jax.default_backend() == "cpu" and jax.local_device_count() == 1
    return alone and kv_heads * tokens * group <= _PACKED_ROWS


def sums_in_place(tokens: int, group: int) -> bool:
    """Whether the products read a cache where it is, codes and all."""
    return jax.default_backend() == "gpu" and tokens * group <= _SUMMED_ROWS


def scores_of(queries: Grouped, keys: Vectors) -> Scores:
    """``queries . keys`` for each query head and the KV head that it reads."""
    batch, kv_heads, tokens, group, head_dim = queries.shape
    if sums_in_place(tokens, group):
        rows = (queries[:, None, :, :, row] for row in range(group))
        summed = [(row * keys[:, :, :, None]).sum(-1) for row in rows]
        return jnp.stack([jnp.moveaxis(one, 1, -1) for one in summed], axis=3)
    if not _packs(kv_heads, tokens, group):
        return jnp.einsum("bktgd,bskd->bktgs", queries, keys)
    own_head = jnp.eye(kv_heads, dtype=queries.dtype)[:, None, None, :, None]
    packed = (queries[..., None, :] * own_head).reshape(batch, -1, kv_heads * head_dim)
    scores = jnp.einsum("brc,bsc->brs", packed, keys.reshape(batch, -1, kv_heads * head_dim))
    return scores.reshape(batch, kv_heads, tokens, group, -1)


def mix_of(weights: Scores, values: Vectors) -> Grouped:
    """``weights . values`` for each query head and the KV head that it reads."""
    batch, kv_heads, tokens, group, slots = weights.shape
    if sums_in_place(tokens, group):
        rows = (jnp.moveaxis(weights[:, :, :, row], -1, 1) for row in range(group))
        summed = [(row[..., None] * values[:, :, :, None]).sum(1) for row in rows]
        return jnp.stack(summed, axis=3)
    if not _packs(kv_heads, tokens, group):
        return jnp.einsum("bktgs,bskd->bktgd", weights, values)
    flat_values = values.reshape(batch, slots, -1)
    mixed = jnp.einsum("brs,bsc->brc", weights.reshape(batch, -1, slots), flat_values)
    every_head = mixed.reshape(batch, kv_heads, tokens, group, kv_heads, -1)
    return jnp.einsum("bktgkd->bktgd", every_head)
