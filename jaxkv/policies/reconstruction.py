"""What a model needs to say its context again: KVzip."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.attention.observed import Call, watch
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.vectors import read
from jaxkv.devices import is_concrete
from jaxkv.policies.policy import attention_weights, fold_queries
from jaxkv.programs import moves_data

_OVERLAP = 8  # tokens before a chunk that say where it begins; as in the authors' code


@moves_data
def reconstruction_scores(
    model: Callable[..., tuple[Array, KVCache]],
    tokens: Int[Array, "*batch tokens"],
    cache: KVCache,
    *,
    prompt: Sequence[int] = (),
    chunk: int = 2048,
    sinks: int = 4,
) -> Float[Array, "layers *batch kv_heads tokens"]:
    """Scores for `jaxkv.compress` that hold whatever will be asked: KVzip.

    Kim et al., "KVzip: query-agnostic KV cache compression with context reconstruction" (2025),
    section 3: the model reads its context again, a chunk at a time after the context itself, and
    a token scores the most attention that any query of its chunk's second reading gives it. That
    costs two to three prefills, once, and serves any number of questions. The paper lets the heads
    of all layers share one budget (section 4.1): give `jaxkv.compress` the ``keep`` that
    `jaxkv.compression.adaptive` makes of the scores with ``across_layers=True``.

    Args:
      model: ``model(tokens, cache) -> (logits, cache)``, with a static layer in each `attend`.
      tokens: the whole context; the cache holds these tokens and no others.
      cache: after prefill. It needs room for prompt, overlap and chunk, and stays as it is.
      prompt: ids that ask for repetition, such as those of "Repeat the previous context exactly."
      chunk: tokens repeated at once.
      sinks: first tokens, which compete for attention with each chunk, and always stay.

    Raises:
      ValueError: the cache does not hold just these tokens.

    >>> import jax.numpy as jnp, jaxkv
    >>> def model(tokens, cache):
    ...     vectors = jnp.ones((len(tokens), 1, 4))
    ...     cache = jaxkv.append(cache, vectors, vectors, layer=0)
    ...     return jaxkv.attend(cache, vectors, layer=0), jaxkv.advance(cache, len(tokens))
    >>> context = jnp.arange(8)
    >>> _, cache = model(context, jaxkv.create(jaxkv.KVCacheConfig(1, 32, 1, 4)))
    >>> scores = reconstruction_scores(model, context, cache)
    >>> scores.shape
    (1, 1, 8)
    """
    length = tokens.shape[-1]
    if is_concrete(cache.lengths) and (np.asarray(cache.lengths) != length).any():
        raise ValueError(
            f"reconstruction_scores: {length} tokens were given, and the cache holds "
            f"{np.asarray(cache.lengths).tolist()}. Give the whole context, of one length."
        )
    batch = tokens.shape[:-1]
    asking = jnp.broadcast_to(jnp.asarray(prompt, tokens.dtype), (*batch, len(prompt)))
    # A model is passed to jit as the pytree that it is, or as a function without arrays.
    argument = jax.tree_util.Partial(model) if jax.tree_util.all_leaves([model]) else model
    parts = []
    for start in range(0, length, chunk):
        before = tokens[..., max(0, start - _OVERLAP) : start]
        again = tokens[..., start : start + chunk]
        replay = jnp.concatenate([asking, before, again], axis=-1)
        size = again.shape[-1]
        parts.append(
            _chunk_scores(argument, replay, cache, jnp.int32(start), size, min(sinks, start))
        )
    scores = jnp.concatenate(parts, axis=-1)
    return scores.at[..., :sinks].set(jnp.inf)


@functools.partial(jax.jit, static_argnames=("size", "sinks"))
def _chunk_scores(
    model: Any, replay: Array, cache: KVCache, start: Array, size: int, sinks: int
) -> Float[Array, "layers *batch kv_heads chunk"]:
    length = jnp.asarray(cache.lengths).reshape(-1)[0]
    with watch() as calls:
        model(replay, cache)
    by_layer = {call.layer: _most_attention(call, length, start, size, sinks) for call in calls}
    return jnp.stack([by_layer[layer] for layer in sorted(by_layer)])


def _most_attention(call: Call, length: Array, start: Array, size: int, sinks: int) -> Array:
    """The most that a query gives to each token of the chunk, among sinks, chunk and replay."""
    queries = call.queries.astype(jnp.float32)
    replayed = queries.shape[-3]
    spans: list[tuple[Array | int, int]] = [(0, sinks), (start, size), (length, replayed)]
    spans = [(first, count) for first, count in spans if count]
    keys = jnp.concatenate(
        [read(call.cache, call.layer, first, count, jnp.float32)[0] for first, count in spans],
        axis=-3,
    )
    at = jnp.concatenate([first + jnp.arange(count, dtype=jnp.int32) for first, count in spans])
    positions = jnp.broadcast_to(at, (keys.shape[-2], len(at)))

    def one_sequence(queries: Array, keys: Array) -> Array:
        def highest(so_far: Array, block: Array, block_at: Array) -> Array:
            weights = attention_weights(block, keys, block_at, positions)
            return jnp.maximum(so_far, weights.max(axis=(1, 2)))

        none = jnp.zeros(positions.shape, jnp.float32)
        weights = fold_queries(
            highest, none, queries, length + jnp.arange(replayed, dtype=jnp.int32)
        )
        return weights[:, sinks : sinks + size]

    return (jax.vmap(one_sequence) if keys.ndim == 4 else one_sequence)(queries, keys)
