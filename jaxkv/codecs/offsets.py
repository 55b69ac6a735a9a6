"""What vectors were stored less: one vector per side and head, that of keys under the rope."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.codecs.rope import Rope


@dataclasses.dataclass(frozen=True)
class Offsets:
    """A layer stores ``k_t - R_t m`` and ``v - n``, where R_t is the rope of position t.

    Attention adds ``q . R_t m`` to its logits, and n to its output.

    Attributes:
      vectors: m and n of each KV head.
      rope: R; None for a model without one.
    """

    vectors: Float[Array, "2 kv_heads head_dim"]
    rope: Rope | None

    @property
    def values(self) -> Float[Array, "kv_heads head_dim"]:
        return self.vectors[1]

    def at(
        self, positions: Int[Array, "*batch tokens #kv_heads"]
    ) -> Float[Array, "2 *batch tokens kv_heads head_dim"]:
        """What the tokens of these positions are stored less; the same to the bit everywhere."""
        keys, values = self.vectors
        shape = (*positions.shape[:-1], *values.shape)
        if self.rope:
            cos, sin = self.rope.cos_sin(positions)
            first, second, rest = self.rope.pairs(keys)
            first, second = first * cos - second * sin, second * cos + first * sin
            rest = jnp.broadcast_to(rest, (*first.shape[:-1], rest.shape[-1]))
            keys = self.rope.joined(first, second, rest)
        return jnp.stack([jnp.broadcast_to(side, shape) for side in (keys, values)])

    def queries(
        self, queries: Float[Array, "batch kv_heads tokens group head_dim"]
    ) -> Float[Array, "batch kv_heads tokens group features"]:
        """What `features` are multiplied with to give ``q . R_t m`` for all t.

        It is a sum over pairs of cosines and sines of t times what only q and m enter.
        """
        vectors = self.vectors[0][:, None, None, :]
        if not self.rope:
            return jnp.sum(queries * vectors, axis=-1, keepdims=True)
        first, second, rest = self.rope.pairs(queries)
        own_first, own_second, own_rest = self.rope.pairs(vectors)
        with_cos = first * own_first + second * own_second
        with_sin = second * own_first - first * own_second
        without_rope = jnp.sum(rest * own_rest, axis=-1, keepdims=True)
        return jnp.concatenate([with_cos, with_sin, without_rope], axis=-1)

    def features(
        self, positions: Int[Array, "batch #kv_heads slots"]
    ) -> Float[Array, "batch #kv_heads slots features"]:
        """A table for a block of slots that all heads and layers share."""
        ones = jnp.ones((*positions.shape, 1), jnp.float32)
        return (
            jnp.concatenate([*self.rope.cos_sin(positions), ones], axis=-1) if self.rope else ones
        )
