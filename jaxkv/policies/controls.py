"""What every policy must lie between: chance, and knowing the future."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxkv.policies.policy import (
    Positions,
    Queries,
    Scores,
    Vectors,
    attention_weights,
    fold_queries,
    needed,
    next_position,
)


@dataclasses.dataclass(frozen=True)
class Random:
    """Keep a random choice. A policy that is no better than this has found nothing.

    The keys enter the seed, so that layers and sequences differ.
    """

    seed: int = 0
    window: ClassVar[int] = 0  # queries that it looks at

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        content = lax.bitcast_convert_type(keys.astype(jnp.float32).sum(), jnp.uint32)
        key = jax.random.fold_in(jax.random.key(self.seed), content)
        return jax.random.uniform(key, positions.shape)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Keep what queries *to come* will attend to most: pass those as ``queries``.

    Not a policy that one can have, but the bound that shows what a budget allows.
    """

    scale: float | None = None

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        future = needed(queries, "Oracle")

        def highest(so_far: Scores, block: Queries, at: Array) -> Scores:
            weights = attention_weights(block, keys, at, positions, self.scale)
            return jnp.maximum(so_far, weights.max(axis=(1, 2)))

        at = next_position(positions) + jnp.arange(len(future), dtype=jnp.int32)
        return fold_queries(highest, jnp.zeros(positions.shape, jnp.float32), future, at)
