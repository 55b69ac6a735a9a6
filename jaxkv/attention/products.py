"""The two products of attention, in the form that each platform runs best."""

import jax
import jax.numpy as jnp

from jaxkv.attention.call import Grouped, Scores, Vectors
from jaxkv.devices import by_platform, num_devices_of

# Up to this many query rows, XLA's CPU backend reads the cache faster through one matrix
# product over all heads, most of it zeros, than through one a head, for which it first
# transposes keys and values (measured: ARCHITECTURE.md, "Reading on a CPU").
_PACKED_ROWS = 48
# Up to this many query rows a KV head, XLA's GPU backend reads the cache fastest as sums of
# products, all rows in one loop. A matrix product makes it copy keys and values first, in
# float32; this form makes no copy, and is exact where a product is rounded to TF32.
_SUMMED_ROWS = 8


def sums_in_place(platform: str, tokens: int, group: int) -> bool:
    """Whether the products read a cache where it is, codes and all."""
    return platform == "gpu" and tokens * group <= _SUMMED_ROWS


@jax.jit
def scores_of(queries: Grouped, keys: Vectors) -> Scores:
    """``queries . keys`` for each query head and the KV head that it reads."""
    _, kv_heads, tokens, group, _ = queries.shape
    packs = _packs(keys, kv_heads * tokens * group)
    sums = sums_in_place("gpu", tokens, group)
    runs = {
        "cpu": packed_scores if packs else scores_by_head,
        "gpu": summed_scores if sums else scores_by_head,
        "tpu": scores_by_head,
    }
    return by_platform(runs, queries, keys)


@jax.jit
def mix_of(weights: Scores, values: Vectors) -> Grouped:
    """``weights . values`` for each query head and the KV head that it reads."""
    _, kv_heads, tokens, group, _ = weights.shape
    packs = _packs(values, kv_heads * tokens * group)
    sums = sums_in_place("gpu", tokens, group)
    runs = {
        "cpu": packed_mix if packs else mix_by_head,
        "gpu": summed_mix if sums else mix_by_head,
        "tpu": mix_by_head,
    }
    return by_platform(runs, weights, values)


def _packs(vectors: Vectors, rows: int) -> bool:
    # With several devices the heads may be sharded, and mixing them would gather the cache.
    return rows <= _PACKED_ROWS and num_devices_of(vectors) == 1


def scores_by_head(queries: Grouped, keys: Vectors) -> Scores:
    """A matrix product a KV head."""
    return jnp.einsum("bktgd,bskd->bktgs", queries, keys)


def mix_by_head(weights: Scores, values: Vectors) -> Grouped:
    """Likewise."""
    return jnp.einsum("bktgs,bskd->bktgd", weights, values)


def summed_scores(queries: Grouped, keys: Vectors) -> Scores:
    """Sums of products, a query head of each KV head at a time."""
    rows = (queries[:, None, :, :, row] for row in range(queries.shape[3]))
    summed = [(row * keys[:, :, :, None]).sum(-1) for row in rows]
    return jnp.stack([jnp.moveaxis(one, 1, -1) for one in summed], axis=3)


def summed_mix(weights: Scores, values: Vectors) -> Grouped:
    """Likewise."""
    rows = (jnp.moveaxis(weights[:, :, :, row], -1, 1) for row in range(weights.shape[3]))
    summed = [(row[..., None] * values[:, :, :, None]).sum(1) for row in rows]
    return jnp.stack(summed, axis=3)


def packed_scores(queries: Grouped, keys: Vectors) -> Scores:
    """One matrix product over all KV heads, in which a query is zero at those of others."""
    batch, kv_heads, tokens, group, head_dim = queries.shape
    own_head = jnp.eye(kv_heads, dtype=queries.dtype)[:, None, None, :, None]
    packed = (queries[..., None, :] * own_head).reshape(batch, -1, kv_heads * head_dim)
    scores = jnp.einsum("brc,bsc->brs", packed, keys.reshape(batch, -1, kv_heads * head_dim))
    return scores.reshape(batch, kv_heads, tokens, group, -1)


def packed_mix(weights: Scores, values: Vectors) -> Grouped:
    """Likewise: each query's mix of all KV heads' values, of which its own is kept."""
    batch, kv_heads, tokens, group, slots = weights.shape
    flat_values = values.reshape(batch, slots, -1)
    mixed = jnp.einsum("brs,bsc->brc", weights.reshape(batch, -1, slots), flat_values)
    every_head = mixed.reshape(batch, kv_heads, tokens, group, kv_heads, -1)
    return jnp.einsum("bktgkd->bktgd", every_head)
