"""From scores to slots: a static number of tokens per head, with some that are never dropped."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.policies.policy import Positions, Scores, next_position


def select(
    scores: Scores,
    positions: Positions,
    keep: int,
    *,
    most: Int[Array, ""] | Int[Array, " kv_heads"] | int | None = None,
    sinks: int = 0,
    recent: int = 0,
) -> tuple[Int[Array, "kv_heads keep"], Positions]:
    """The slots of the ``keep`` tokens that score highest in each head, in ascending order.

    Equal scores: the newer token stays.

    Args:
      scores: as a policy gives them.
      positions: of each slot's token, -1 for none.
      keep: slots to return a head; those that too few tokens are held for come last.
      most: tokens to keep at most, for all heads or a head; ``keep`` if None.
      sinks: the first tokens of the sequence, kept before all others whatever those score.
      recent: the newest tokens, likewise. Of more protected tokens than a head may keep, those
        that score highest stay.

    Returns:
      Slots, and the positions of their tokens: -1 where a slot is not to be kept.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[0.1, 0.9, 0.3, 0.2, 0.5]])
    >>> slots, positions = select(scores, jnp.arange(5)[None], keep=3, sinks=1)
    >>> positions.tolist()
    [[0, 1, 4]]
    """
    protected = (positions < sinks) | (positions >= next_position(positions) - recent)
    # A score may itself be infinite, so protection is a rank of its own.
    rank = jnp.where(positions < 0, 2, jnp.where(protected, 0, 1))
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    every_slot = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    # Tokens before empty slots, protected ones first, then high scores, then newer ones.
    ranked = lax.sort((rank, -scores, -positions, every_slot), num_keys=3)[-1][:, :keep]
    found = jnp.take_along_axis(positions, ranked, axis=1)
    if most is not None:
        kept = jnp.arange(keep, dtype=jnp.int32) < jnp.asarray(most, jnp.int32)[..., None]
        found = jnp.where(kept, found, -1)
    # Back to ascending slots, those that are not kept last.
    _, slots, found = lax.sort(((found < 0).astype(jnp.int32), ranked, found), num_keys=2)
    return slots, found
