"""All scores at once: the plainest form, and the one that others are held to."""

import jax.numpy as jnp

from jaxkv.attention.call import LOWEST, AttentionCall, Grouped, LogTotal
from jaxkv.attention.products import mix_of, scores_of


def reference(request: AttentionCall) -> Grouped:
    """Softmax over every slot of every sequence. Needs tokens x context scores per head."""
    return reference_part(request)[0]


def reference_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total, by which parts of a context are merged."""
    extent = request.cache.index.extent
    keys, values = request.keys_and_values(0, extent)
    seen = request.visible(0, extent)
    scores = jnp.where(seen, request.logits(scores_of(request.queries, keys), 0, extent), -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if request.sink_logits is not None:
        sink_logits = request.sink_logits[:, None, :, None]
        highest = jnp.maximum(highest, sink_logits)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)  # a query that sees nothing
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    if request.sink_logits is not None:
        total += jnp.exp(sink_logits - highest)
    seen_any = total > 0
    total = jnp.where(seen_any, total, 1)
    log_total = jnp.where(seen_any, highest + jnp.log(total), LOWEST)[..., 0]
    return mix_of(weights / total, values), log_total
