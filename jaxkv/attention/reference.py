"""All scores at once: the plainest form, and the one that others are held to."""

import jax.numpy as jnp

from jaxkv.attention.call import Grouped, Request
from jaxkv.attention.products import mix_of, scores_of


def reference(request: Request) -> Grouped:
    """Softmax over every slot of every sequence. Needs tokens x context scores a head."""
    extent = request.cache.index.extent
    keys, values = request.keys_and_values(0, extent)
    seen = request.visible(0, extent)
    scores = jnp.where(seen, request.logits(scores_of(request.queries, keys), 0, extent), -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if request.sinks is not None:
        sinks = request.sinks[:, None, :, None]
        highest = jnp.maximum(highest, sinks)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)  # a query that sees nothing
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    if request.sinks is not None:
        total += jnp.exp(sinks - highest)
    return mix_of(weights / jnp.where(total == 0, 1, total), values)
