"""What the newest queries attend to: SnapKV and TOVA."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxkv.policies.policy import (
    Positions,
    Queries,
    Scores,
    Vectors,
    attention_weights,
    needed,
    query_positions,
)


@dataclasses.dataclass(frozen=True)
class QueryWindow:
    """Keep the window of the newest tokens, and what their queries attend to.

    With the defaults SnapKV: Li et al., "SnapKV: LLM knows what you are looking for before
    generation" (2024), section 4. With ``window=1, pool=1, per_head=False`` TOVA: Oren et al.,
    "Transformers are multi-state RNNs" (2024), section 3.2. Both look at the prompt's end: where
    that is not the question, they do worse than a random choice (ARCHITECTURE.md).

    Args:
      window: the newest queries that vote; fewer where fewer are given.
      pool: neighbours, itself included, over which a token's weight is averaged; odd.
      per_head: each KV head chooses its own tokens, else all choose the same.
      scale: of the logits; ``head_dim ** -0.5`` if None.
    """

    window: int = 64
    pool: int = 5
    per_head: bool = True
    scale: float | None = None

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        newest = needed(queries, "QueryWindow (SnapKV, TOVA)")[-self.window :]
        at = query_positions(newest, positions)
        weights = attention_weights(newest, keys, at, positions, self.scale)
        mean = weights.mean(axis=2)  # [kv_heads, group, tokens]
        in_window = positions >= at[0]
        before = jnp.where(in_window[:, None], 0, mean).mean(axis=1)
        if not self.per_head:
            before = jnp.broadcast_to(before.mean(axis=0), before.shape)
        return jnp.where(in_window, jnp.inf, _pooled(before, self.pool))


def _pooled(scores: Scores, size: int) -> Scores:
    """The mean over neighbours; there are zeros beyond both ends."""
    sums = lax.reduce_window(scores, 0.0, lax.add, (1, size), (1, 1), "SAME")
    return sums / size
