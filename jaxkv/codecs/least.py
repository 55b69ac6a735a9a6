"""For each vector, which of some ways to code it errs least."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Num

from jaxkv.devices import by_platform

Errors = Num[Array, "*shape"]


def number_of_least(
    error: Callable[[Array | int], Errors], count: int, *, worst: Errors
) -> Int32[Array, "*shape"]:
    """The number of the first way with the least error.

    One after the other they need the memory of one. On a GPU, where the turn of a loop takes
    longer than all of them for the tokens of a decode step, they are tried at once.

    Args:
      error: of the way with this number, below ``count``.
      worst: more than any error.
    """

    def in_turn() -> Array:
        def keep_the_better(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            wrong = error(number)
            better = wrong < best[0]
            return jnp.where(better, wrong, best[0]), jnp.where(better, number, best[1])

        nothing = worst, jnp.zeros(worst.shape, jnp.int32)
        return lax.fori_loop(0, count, keep_the_better, nothing)[1]

    def at_once() -> Array:
        errors = jnp.stack([error(number) for number in range(count)])
        return jnp.argmin(errors, axis=0).astype(jnp.int32)

    return by_platform({"cpu": in_turn, "gpu": at_once, "tpu": in_turn})
