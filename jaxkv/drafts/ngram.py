"""Guesses from the text itself: what followed when its last tokens stood there before."""

import dataclasses

import jax.numpy as jnp

from jaxkv.counts import check_fields
from jaxkv.drafts.draft import NO_GUESS, Guesses, Lengths, Tokens


@dataclasses.dataclass(frozen=True)
class NGram:
    """Prompt look-up (Saxena, 2023): for code, extracts, edits, and whatever repeats itself.

    Looks for the last ``n`` tokens earlier in the sequence, the prompt included, and guesses what
    followed there the last time. Needs no weights, and takes microseconds.

    Args:
      n: tokens that must agree. Fewer find more, and are wrong more often.

    Raises:
      ValueError: a number that is not one of tokens.

    >>> import jax.numpy as jnp, jaxkv
    >>> tokens = jnp.array([[5, 6, 7, 8, 9, 5, 6, 0, 0]])
    >>> jaxkv.drafts.NGram(2).propose(tokens, jnp.array([7]), 3).tolist()
    [[7, 8, 9]]
    """

    n: int = 3

    def __post_init__(self) -> None:
        check_fields(self, "n")

    def propose(self, tokens: Tokens, lengths: Lengths, k: int) -> Guesses:
        """See `Draft`. A text that has begun to repeat itself goes on doing so."""
        room = tokens.shape[1]
        places = jnp.arange(room, dtype=jnp.int32)[None]
        ends = (places >= self.n - 1) & (places < lengths[:, None] - 1)
        for back in range(self.n):
            newest = jnp.take_along_axis(tokens, jnp.maximum(lengths[:, None] - 1 - back, 0), 1)
            ends &= jnp.roll(tokens, back, axis=1) == newest
        end = jnp.where(ends, places, -1).max(axis=1, keepdims=True)
        period = lengths[:, None] - 1 - end
        following = end + 1 + jnp.arange(k, dtype=jnp.int32)[None] % jnp.maximum(period, 1)
        guesses = jnp.take_along_axis(tokens, following, axis=1)
        return jnp.where(end >= 0, guesses, NO_GUESS)
