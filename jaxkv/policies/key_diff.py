"""Keys that are unlike the others."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxkv.policies.policy import Positions, Queries, Scores, Vectors

_SMALLEST_NORM = 1e-12


@dataclasses.dataclass(frozen=True)
class KeyDiff:
    """Minus the cosine between a key and the mean direction of all keys.

    Park et al., "KeyDiff: key similarity-based KV cache eviction" (2025), section 3. Needs no
    queries, so it fits any attention kernel and serves before any question is known.
    """

    window: ClassVar[int] = 0  # queries that it looks at

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        directions = _directions(keys)
        held = (positions >= 0).T[..., None]
        total = jnp.where(held, directions, 0).sum(axis=0)  # as good as the mean for a cosine
        return -jnp.einsum("tkd,kd->kt", directions, _directions(total))


def _directions(vectors: Array) -> Array:
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(norms, _SMALLEST_NORM)
