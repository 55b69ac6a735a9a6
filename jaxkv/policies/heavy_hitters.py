"""Tokens that have drawn the most attention so far."""

import dataclasses

import jax.numpy as jnp
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
    query_positions,
)


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """Keep what has drawn the most attention a query: H2O, with a mean in place of a sum.

    Zhang et al., "H2O: heavy-hitter oracle for efficient generative inference of large language
    models" (2023), section 4. Their sum favours old tokens, which more queries have seen; the
    mean over the queries that could see a token does not. While a cache evicts as it decodes,
    `observe` is called at each step and the sums are kept beside the positions.

    Args:
      mean: over the queries that could see a token; False for the paper's sum.
      scale: of the logits; ``head_dim ** -0.5`` if None.
    """

    mean: bool = True
    scale: float | None = None

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        given = needed(queries, "HeavyHitters (H2O)")
        state = {"sums": self.accumulate(keys, given, positions)}
        first = next_position(positions) - len(given)
        return self.scores(state, positions, first)

    @property
    def state(self) -> tuple[str, ...]:
        return ("sums",)

    def observe(
        self,
        state: dict[str, Scores],
        keys: Vectors,
        values: Vectors,
        queries: Queries,
        positions: Positions,
    ) -> dict[str, Scores]:
        return {"sums": state["sums"] + self.accumulate(keys, queries, positions)}

    def accumulate(self, keys: Vectors, queries: Queries, positions: Positions) -> Scores:
        """What the queries of the newest tokens give to each token, summed."""

        def add(sums: Scores, block: Queries, at: Array) -> Scores:
            weights = attention_weights(block, keys, at, positions, self.scale)
            return sums + weights.sum(axis=2).mean(axis=1)

        none = jnp.zeros(positions.shape, jnp.float32)
        return fold_queries(add, none, queries, query_positions(queries, positions))

    def scores(
        self, state: dict[str, Scores], positions: Positions, first_query: Array | int = 0
    ) -> Scores:
        """Scores of tokens from sums over all queries from position ``first_query`` on."""
        if not self.mean:
            return state["sums"]
        seen_by = next_position(positions) - jnp.maximum(positions, first_query)
        return state["sums"] / jnp.maximum(seen_by, 1).astype(jnp.float32)
