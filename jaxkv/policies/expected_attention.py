"""What queries to come are expected to attend to."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.policies.policy import (
    Positions,
    Queries,
    Scores,
    Vectors,
    needed,
    next_position,
    query_positions,
)


@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    """Attention of a Gaussian query, averaged over the next positions, times the value's norm.

    Devoto et al., "Expected attention: KV cache compression by estimating attention from future
    queries distribution" (2025), section 3: for q ~ N(m, C), E[exp(q.k)] = exp(m.k + k.C.k / 2).
    m and C are those of the queries given, rotated back to before rope and on to where the next
    ``future`` tokens stand. Give many queries: the whole prompt's, or a few hundred.

    Args:
      frequencies: of the model's rope, radians a position for each pair of numbers, as a tuple
        (``tuple(rope.frequencies(context).tolist())``); () for a model without rope.
      future: positions to average over.
      sinks: first tokens, whose queries are not counted and which stay.
      scale: of the logits; ``head_dim ** -0.5`` if None.
    """

    frequencies: tuple[float, ...] = ()
    future: int = 512
    sinks: int = 4
    scale: float | None = None

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        newest = needed(queries, "ExpectedAttention")
        *_, kv_heads, head_dim = keys.shape
        scale = head_dim**-0.5 if self.scale is None else self.scale
        at = query_positions(newest, positions)
        before_rope = self._turned(newest, -at[:, None])
        counted = (at >= self.sinks)[:, None, None]
        count = jnp.maximum(counted.sum(dtype=jnp.float32), 1)
        mean = jnp.where(counted, before_rope, 0).sum(axis=0) / count
        rest = jnp.where(counted, before_rope - mean, 0)
        covariance = jnp.einsum("whi,whj->hij", rest, rest) / count

        next_ones = next_position(positions) + jnp.arange(self.future, dtype=jnp.int32)
        rotate = jax.vmap(self._mean_rotated, in_axes=(0, None))
        mean = rotate(mean[:, None], next_ones)[:, 0]
        covariance = rotate(rotate(covariance, next_ones).mT, next_ones)

        mean = mean.reshape(kv_heads, -1, head_dim)
        covariance = covariance.reshape(*mean.shape, head_dim)
        logits = scale * jnp.einsum("kgd,tkd->kgt", mean, keys)
        logits += scale**2 / 2 * jnp.einsum("tki,kgij,tkj->kgt", keys, covariance, keys)
        candidates = (positions >= self.sinks)[:, None]
        weights = jax.nn.softmax(logits, axis=-1, where=candidates).mean(axis=1)
        scores = weights * jnp.linalg.norm(values, axis=-1).T
        return jnp.where(positions < self.sinks, jnp.inf, scores)

    def _turned(self, vectors: Float[Array, "*shape head_dim"], at: Array) -> Array:
        """Rope: number i of the first half with number i of the second, for positions ``at``."""
        pairs = len(self.frequencies)
        angles = at[..., None].astype(jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        return _rotated(vectors, jnp.cos(angles), jnp.sin(angles), pairs)

    def _mean_rotated(self, vectors: Float[Array, "rows head_dim"], at: Array) -> Array:
        """The mean of ``vectors`` rotated to each of the positions ``at``."""
        pairs = len(self.frequencies)
        angles = at[:, None].astype(jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        return _rotated(vectors, jnp.cos(angles).mean(axis=0), jnp.sin(angles).mean(axis=0), pairs)


def _rotated(vectors: Array, cos: Array, sin: Array, pairs: int) -> Array:
    first, second, rest = jnp.split(vectors, [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
