"""Softmax a block of slots at a time: the state of a query, and how a block changes it.

Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), and Rabe & Staats,
"Self-attention does not need O(n^2) memory" (2021): a running maximum, total and mix a
query, rescaled when the maximum grows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.attention.call import LOWEST, AttentionCall, Grouped, LogTotal
from jaxkv.attention.products import mix_of, scores_of


class Online(NamedTuple):
    """What each query knows of the blocks so far."""

    highest: Float[Array, "batch kv_heads tokens group"]
    total: Float[Array, "batch kv_heads tokens group"]
    mix: Grouped

    @classmethod
    def start(cls, request: AttentionCall) -> "Online":
        """Nothing seen yet but learned sinks."""
        rows = request.queries[..., 0]  # like it, so that an Explicit mesh shards them like it
        highest, total = jnp.full_like(rows, LOWEST), jnp.zeros_like(rows)
        if request.sink_logits is not None:  # as a slot that was read already and gave nothing
            sink_logits = jnp.broadcast_to(request.sink_logits[:, None, :], rows.shape)
            highest = lax.stop_gradient(jnp.maximum(highest, sink_logits))
            total = jnp.exp(sink_logits - highest)
        width = request.cache.config.pair.width
        mix = jnp.broadcast_to(jnp.zeros_like(request.queries[..., :1]), (*rows.shape, width))
        return cls(highest, total, mix)

    def with_slots(
        self,
        request: AttentionCall,
        start: Int[Array, ""] | int,
        size: int,
        seen: Bool[Array, "batch #kv_heads tokens 1 size"],
    ) -> "Online":
        """After some more logical slots, of which each query sees what ``seen`` says."""
        keys, values = request.keys_and_values(start, size)
        scores = request.logits(scores_of(request.queries, keys), start, size)
        scores = jnp.where(seen, scores, LOWEST)
        # The maximum cancels out of the result, so no gradient needs to flow through it.
        highest = lax.stop_gradient(jnp.maximum(self.highest, scores.max(axis=-1)))
        weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0)
        keep = jnp.exp(self.highest - highest)
        total = self.total * keep + weights.sum(axis=-1)
        return Online(highest, total, self.mix * keep[..., None] + mix_of(weights, values))

    def joined(self, other: "Online") -> "Online":
        """After the slots of both, of which no one is in both."""
        highest = lax.stop_gradient(jnp.maximum(self.highest, other.highest))
        ours, theirs = jnp.exp(self.highest - highest), jnp.exp(other.highest - highest)
        mix = self.mix * ours[..., None] + other.mix * theirs[..., None]
        return Online(highest, self.total * ours + other.total * theirs, mix)

    def log_total(self) -> LogTotal:
        """Of what each query saw; `LOWEST` where it saw nothing."""
        seen = self.total > 0
        return jnp.where(seen, self.highest + jnp.log(jnp.where(seen, self.total, 1)), LOWEST)

    def output(self) -> Grouped:
        """The attention output; zeros for a query that has seen nothing."""
        return self.mix / jnp.where(self.total == 0, 1, self.total)[..., None]
