"""What vectors were stored less: a centre per side and head, that of keys under the rope."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.codecs.rope import Rope


@dataclasses.dataclass(frozen=True)
class Offsets:
    """A layer stores ``k_t - R_t m`` and ``v - n``, where R_t is the rope of position t.

    Attention adds ``q . R_t m`` to its logits, and n to its output.

    Attributes:
      vectors: m and n of each KV head.
      rope: R; None for a model without one.
      second: other m and n, which some vectors were stored less instead; `Codec.is_second` says
        which. None where there are none.
    """

    vectors: Float[Array, "2 kv_heads head_dim"]
    rope: Rope | None
    second: Float[Array, "2 kv_heads head_dim"] | None = None

    @property
    def centres(self) -> tuple[Float[Array, "2 kv_heads head_dim"], ...]:
        """The vectors, and the second ones if there are any."""
        return (self.vectors,) if self.second is None else (self.vectors, self.second)

    def each_at(
        self, positions: Int[Array, "*batch tokens #kv_heads"]
    ) -> list[Float[Array, "2 *batch tokens kv_heads head_dim"]]:
        """Each of `centres` as of the tokens of these positions; the same to the bit everywhere."""
        shape = (*positions.shape[:-1], *self.vectors.shape[1:])
        cos_sin = self.rope.cos_sin(positions) if self.rope else None
        offsets = []
        for keys, values in self.centres:
            if self.rope and cos_sin:
                cos, sin = cos_sin
                first, second, rest = self.rope.pairs(keys)
                first, second = first * cos - second * sin, second * cos + first * sin
                rest = jnp.broadcast_to(rest, (*first.shape[:-1], rest.shape[-1]))
                keys = self.rope.joined(first, second, rest)
            offsets.append(jnp.stack([jnp.broadcast_to(side, shape) for side in (keys, values)]))
        return offsets

    def at(
        self,
        positions: Int[Array, "*batch tokens #kv_heads"],
        is_second: Bool[Array, "2 *batch tokens kv_heads"] | None = None,
    ) -> Float[Array, "2 *batch tokens kv_heads head_dim"]:
        """What the tokens of these positions are stored less."""
        return chosen(self.each_at(positions), is_second)

    def queries(
        self, queries: Float[Array, "batch kv_heads tokens group head_dim"]
    ) -> Float[Array, "batch kv_heads tokens group centres features"]:
        """What `features` are multiplied with to give ``q . R_t m`` for all t.

        It is a sum over pairs of cosines and sines of t times what only q and m enter.
        """
        return jnp.stack([self._queries(queries, keys) for keys, _ in self.centres], axis=-2)

    def _queries(self, queries: Array, keys: Float[Array, "kv_heads head_dim"]) -> Array:
        vectors = keys[:, None, None, :]
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


def chosen(
    each: list[Float[Array, "sides *shape numbers"]], is_second: Bool[Array, "sides *shape"] | None
) -> Float[Array, "sides *shape numbers"]:
    """Of one or two arrays the second where it says so."""
    if len(each) == 1 or is_second is None:
        return each[0]
    return jnp.where(is_second[..., None], each[1], each[0])
