"""The policy contract: which tokens of one layer of one sequence are worth keeping.

A policy is any function ``policy(keys, values, queries, positions) -> scores``: one number for
each KV head and token, higher for what should stay. It sees no cache, no batch and no layer, so
one of a user's own is a few lines. Those here are frozen dataclasses, one file a paper.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.counts import ceil_div

Vectors = Float[Array, "tokens kv_heads head_dim"]
Queries = Float[Array, "window heads head_dim"]
Positions = Int[Array, "kv_heads tokens"]
Scores = Float[Array, "kv_heads tokens"]

QUERY_BLOCK = 128  # queries whose weights are in memory at once


class Policy(Protocol):
    """What `jaxkv.compress` and `jaxkv.evict` call, for each layer and sequence.

    One that looks at few queries may say at how many of the newest, in an attribute ``window``:
    `jaxkv.generate` then keeps no more for it. Without, it is shown those of the whole prompt.
    It must be hashable, as functions and frozen dataclasses are: programs are compiled for it.
    """

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        """Score the tokens that a layer holds of one sequence.

        Args:
          keys: float32, as attention sees them (after rope).
          values: float32.
          queries: float32, of the newest tokens, the last one's last; None if none were given.
          positions: of each head's tokens, -1 for a slot that holds none. Heads of a cache that
            was compressed before hold different tokens. The score of an empty slot means nothing.

        Returns:
          Higher for what should stay. Infinity for what must; NaN counts as lowest.
        """
        ...


@runtime_checkable
class StatefulPolicy(Policy, Protocol):
    """A policy that remembers: `jaxkv.evict` shows it the queries of each step.

    What it remembers is numbers per token and head, float32, by name. They stand beside the tokens
    in the cache's index (`jaxkv.Kept(..., sums=policy.state)`), which moves, saves and forks them.
    Give them names that no other policy uses: a cache tells by these whose they are.

    `jaxkv.compress` calls `observe` once, from zeros, with the queries that it is given; then each
    `jaxkv.evict` does, room or no room, with those of its step.
    """

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the numbers."""
        ...

    def observe(
        self,
        state: dict[str, Scores],
        keys: Vectors,
        values: Vectors,
        queries: Queries,
        positions: Positions,
    ) -> dict[str, Scores]:
        """The numbers after the queries of the newest tokens; those of a new token are zero before.

        The queries' own tokens are among the keys. Each call has other queries than the last one,
        ``len(queries)`` of them: a sum that fades, fades by as many steps.

        Args:
          keys, values, queries, positions: as when it is called.
        """
        ...

    def scores(
        self, state: dict[str, Scores], positions: Positions, first_query: Array | int = 0
    ) -> Scores:
        """Scores of tokens, from what all queries from position ``first_query`` on have shown."""
        ...


def next_position(positions: Positions) -> Int[Array, ""]:
    """The position of the next token: the newest one is always held when a policy is asked."""
    return positions.max() + 1


def query_positions(queries: Queries, positions: Positions) -> Int[Array, " window"]:
    """Positions of the given queries: the last query is the newest token's."""
    window = len(queries)
    return next_position(positions) - window + jnp.arange(window, dtype=jnp.int32)


def needed(queries: Queries | None, who: str) -> Queries:
    """The queries, or an error that says how to get them.

    Raises:
      ValueError: there are none.
    """
    if queries is None:
        raise ValueError(
            f"{who} scores tokens by queries, and none were given. Pass queries=[layers, *batch, "
            "window, heads, head_dim], those of the newest tokens; jaxkv.observed(model) returns "
            "them with the logits."
        )
    return queries


def refuse_name(policy: object, who: str) -> None:
    """Refuse a policy's name, where the policy itself is needed.

    Raises:
      TypeError: it is a string.
    """
    if isinstance(policy, str):
        raise TypeError(
            f"{who}: policy must be a function or a policy such as jaxkv.policies.KeyDiff(), got "
            f"the name {policy!r}. jaxkv.policies.POLICIES has policies by name."
        )


def attention_weights(
    queries: Queries,
    keys: Vectors,
    query_positions: Int[Array, " window"],
    positions: Positions,
    scale: float | None = None,
) -> Float[Array, "kv_heads group window tokens"]:
    """The softmax of attention: what each query gives to each token not after it.

    Args:
      query_positions: of the queries; one of -1 sees nothing and gives zeros.
      positions: of the keys; one of -1 is not seen.
      scale: of the logits; ``head_dim ** -0.5`` if None.
    """
    window, _, head_dim = queries.shape
    grouped = queries.reshape(window, keys.shape[1], -1, head_dim)
    logits = jnp.einsum("wkgd,tkd->kgwt", grouped, keys)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    held = positions[:, None, None, :]
    seen = (held >= 0) & (held <= query_positions[:, None])
    return jax.nn.softmax(logits, axis=-1, where=seen)


def fold_queries(
    step: Callable[[Array, Queries, Int[Array, " block"]], Array],
    start: Array,
    queries: Queries,
    query_positions: Int[Array, " window"],
) -> Array:
    """``step(state, queries, query_positions)`` over blocks of queries: few weights are held.

    The first block may begin with padding of position -1.
    """
    blocks = max(1, ceil_div(len(queries), QUERY_BLOCK))
    size = ceil_div(len(queries), blocks)
    padding = (blocks * size - len(queries), 0)
    padded = jnp.pad(queries, (padding, (0, 0), (0, 0))).reshape(blocks, size, *queries.shape[1:])
    at = jnp.pad(query_positions, padding, constant_values=-1).reshape(blocks, size)
    return lax.scan(lambda state, block: (step(state, *block), None), start, (padded, at))[0]
